"""Measure an index before it is published: recall against exact search, precision by label, latency, bytes."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.index import Hit, Index
from serving.manifest import SearchSettings
from serving.quantizer import Quantizer
from transforms.sampling import LiveRows, sample

SALT = 0x7175_6572_79
QUERIES = 1000
K = 10
TARGET = 0.97
"""Recall@10 that `tune` looks for; a little more than what is promised, for it is met on a sample."""

_TIE = 2e-6
_SPARE = 3 * K
_LATENCY_QUERIES = 300
_LATENCY_PASSES = 3


@dataclass(frozen=True, slots=True)
class Probe:
    """Live rows to ask with, each with its exact neighbours but itself, in the raw and in the index's own space.

    None where more rows are equally near than are kept.
    """

    rows: LiveRows
    vectors: npt.NDArray[np.float32]
    raw: list[frozenset[str]]
    reduced: list[frozenset[str]]


def make_probe(live: LiveRows, quantizer: Quantizer, queries: int = QUERIES, k: int = K) -> Probe:
    """Sample queries by hash and search for them exactly, streaming over all live rows."""
    asked = sample(live, queries, SALT)
    vectors = asked.vectors()
    uris = live.column("uri")
    place = {uri: number for number, uri in enumerate(uris)}
    own = np.array([place[uri] for uri in asked.column("uri")])
    raw, reduced = _unit(vectors), quantizer.reduce(vectors)
    best_raw, best_reduced = _Best(len(asked)), _Best(len(asked))
    for places, chunk in live.chunks():
        itself = places[np.newaxis, :] == own[:, np.newaxis]
        best_raw.add(np.where(itself, -np.inf, raw @ _unit(chunk).T), places)
        best_reduced.add(np.where(itself, -np.inf, reduced @ quantizer.reduce(chunk).T), places)
    return Probe(asked, vectors, best_raw.neighbours(uris, k), best_reduced.neighbours(uris, k))


def recall(found: Sequence[Sequence[str]], truth: Sequence[frozenset[str]], k: int = K) -> float:
    """Return the mean share of the `k` exact neighbours that were found; equally near ones count alike."""
    shares = [
        len(truth_of.intersection(uris[:k])) / min(k, len(truth_of))
        for uris, truth_of in zip(found, truth, strict=True)
        if truth_of
    ]
    return float(np.mean(np.minimum(shares, 1.0))) if shares else 1.0


def ask(index: Index, probe: Probe, k: int = K, settings: SearchSettings | None = None) -> list[list[Hit]]:
    """Search for the probe's vectors; each one's own uri is left out of its answer."""
    options = {"nprobe": settings.nprobe, "rerank": settings.rerank} if settings else {}
    answers = index.search(probe.vectors, k + 1, **options)
    own = probe.rows.column("uri")
    return [[hit for hit in hits if hit.uri != uri][:k] for hits, uri in zip(answers, own, strict=True)]


def tune(index: Index, probe: Probe, target: float = TARGET) -> SearchSettings:
    """Choose the cheapest settings whose recall@10 in the index's space reaches `target`, else the best there are."""
    nlist = index.info.parameters["nlist"]
    if index.info.kind == "exact":
        return SearchSettings(nlist, 0)
    probes = [2**power for power in range((nlist - 1).bit_length())] + [nlist]
    reranks = [20, 40, 80, 160, 320, 640]
    best, best_recall = SearchSettings(nlist, reranks[-1]), -1.0
    for settings in sorted(itertools.starmap(SearchSettings, itertools.product(probes, reranks)), key=_cost(index)):
        reached = recall([[hit.uri for hit in hits] for hits in ask(index, probe, settings=settings)], probe.reduced)
        if reached > best_recall:
            best, best_recall = settings, reached
        if reached >= target:
            break
    return best


def measure(index: Index, probe: Probe, settings: SearchSettings) -> dict[str, Any]:
    """Return what a manifest promises: recall@10, precision@1 by label, latency in microseconds, bytes a vector.

    Latency is of single queries, the best of three passes.
    """
    answers = ask(index, probe, settings=settings)
    uris = [[hit.uri for hit in hits] for hits in answers]
    judged = [
        hits[0].label == label
        for hits, label in zip(answers, probe.rows.column("label"), strict=True)
        if hits and label is not None
    ]
    stored = sum(
        entry.size for shard in index.info.shards for entry in (shard.lists, shard.refine, shard.records) if entry
    )
    return {
        "queries": len(probe.rows),
        "recall_at_10": round(recall(uris, probe.reduced), 4),
        "recall_at_10_raw": round(recall(uris, probe.raw), 4),
        "precision_at_1": round(float(np.mean(judged)), 4) if judged else None,
        "bytes_per_vector": round(stored / max(1, index.info.rows), 1),
        **_latency(index, probe, settings),
    }


def _latency(index: Index, probe: Probe, settings: SearchSettings) -> dict[str, float]:
    """Return the best p50 and p99 of three passes: what else the machine does at one moment is no promise."""
    passes = [np.percentile(_times(index, probe, settings), [50, 99]) for _ in range(_LATENCY_PASSES)]
    p50, p99 = np.min(passes, axis=0)
    return {"p50_us": round(float(p50), 1), "p99_us": round(float(p99), 1)}


def _times(index: Index, probe: Probe, settings: SearchSettings) -> list[float]:
    """Ask one vector at a time and return the microseconds of each query."""
    times = []
    for vector in itertools.islice(itertools.cycle(probe.vectors), _LATENCY_QUERIES):
        started = time.perf_counter()
        index.search(vector, K, nprobe=settings.nprobe, rerank=settings.rerank)
        times.append((time.perf_counter() - started) * 1e6)
    return times


def _cost(index: Index) -> Any:
    """Order settings by the bytes that a query touches."""
    info = index.info
    per_list = info.rows / info.parameters["nlist"] * info.parameters["code_bytes"]
    return lambda settings: settings.nprobe * per_list + settings.rerank * info.reduced_dim


class _Best:
    """The best places so far of each query, and some spare ones to see ties by."""

    def __init__(self, queries: int) -> None:
        self._scores = np.full((queries, _SPARE), -np.inf, np.float32)
        self._places = np.full((queries, _SPARE), -1, np.int64)

    def add(self, scores: npt.NDArray[np.float32], places: npt.NDArray[np.int64]) -> None:
        scores = np.concatenate([self._scores, scores], axis=1)
        places = np.concatenate([self._places, np.broadcast_to(places, (len(scores), len(places)))], axis=1)
        best = np.argpartition(-scores, _SPARE - 1, axis=1)[:, :_SPARE]
        self._scores = np.take_along_axis(scores, best, axis=1)
        self._places = np.take_along_axis(places, best, axis=1)

    def neighbours(self, uris: Sequence[str | None], k: int) -> list[frozenset[str]]:
        last = -np.sort(-self._scores, axis=1)[:, k - 1 : k]
        near = (self._scores >= last - _TIE) & np.isfinite(self._scores)
        # All kept are equally near, as among many copies of one picture: more such ones may have been dropped, and
        # the query cannot be judged.
        near[near.all(axis=1)] = False
        return [
            frozenset(uris[place] or "" for place in places[mask])
            for places, mask in zip(self._places, near, strict=True)
        ]


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
