"""Tune an index to a recall, and measure what it promises: recall, precision by label, latency, bytes."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from serving.index import Hit, Index
from serving.manifest import SearchSettings
from serving.quantizer import Quantizer
from transforms.designing import Design
from transforms.probing import DEEPEST, K, Neighbours, Probe, recall, shares_found

TARGET = 0.97
"""Recall@10 that is looked for unless the user names one."""

Against = Literal["reduced", "raw"]

_RERANKS = (20, 30, 40, 50, 60, 80, 100, 120, 160, 240, 320, 640)
_RERANKS_RAW = (20, 30, 40, 60, 80, 120, 160, 240, 320)
_CANDIDATES_A_RAW = (2, 3)
"""Candidates ranked by their reduced codes, for each that is ranked by its whole vector."""
_EFFORTS = (1.0, 1.5, 2.0, 4.0)
_RERANK_COST, _RAW_COST = 16, 3
"""Reading a byte of a code picked at random takes as long as scanning so many in a row; of a long code fewer."""
_CONFIDENCE = 1.645
"""Standard errors above the target at which 19 samples in 20 of the queries would reach it."""
_LATENCY_QUERIES = 300
_LATENCY_PASSES = 3


@dataclass(frozen=True, slots=True)
class Tuned:
    """Settings, and the recall@10 that they reach on the probe."""

    settings: SearchSettings
    recall: float


def ask(index: Index, probe: Probe, k: int = K, settings: SearchSettings | None = None) -> list[list[Hit]]:
    """Search for the probe's vectors; each one's own uri is left out of its answer."""
    answers = index.search(probe.vectors, k + 1, settings=settings)
    own = probe.rows.column("uri")
    return [[hit for hit in hits if hit.uri != uri][:k] for hits, uri in zip(answers, own, strict=True)]


def tune(index: Index, shape: Design, probe: Probe, target: float = TARGET, against: Against = "reduced") -> Tuned:
    """Find the cheapest settings that reach `target`, with some to spare for other queries; else the best there are."""
    if shape.kind == "exact":
        settings = SearchSettings(shape.nlist, 0)
        return Tuned(settings, _Trial(index, probe, target, against)(settings).recall)
    trial, cost = _Trial(index, probe, target, against), _cost(index, shape)
    best: Tuned | None = None
    for family in _families(shape):
        ladder = [_with_nprobe(family, nprobe, shape.graph) for nprobe in _ladder(shape.nlist)]
        cheapest = math.inf if best is None else cost(best.settings)
        best = _first_reaching(trial, [step for step in ladder if cost(step) < cheapest]) or best
    if best is None:
        return trial.best
    return _least_effort(trial, best) if shape.graph else best


def measure(
    index: Index, shape: Design, probe: Probe, settings: SearchSettings, quantizer: Quantizer
) -> dict[str, Any]:
    """Return what a manifest promises; latency in microseconds of single queries, the best of three passes.

    `bytes_per_vector` is what the opened index holds in memory, `stored_bytes_per_vector` what all its files take.
    """
    answers = ask(index, probe, settings=settings)
    stored = sum(entry.size for shard in index.info.shards for entry in shard.files)
    return {
        "queries": len(probe.rows),
        "held_out": probe.held_out,
        **_recalls(index, probe, settings, answers),
        "precision_at_1": _precision(answers, probe),
        "distortion": round(quantizer.distortion(probe.vectors), 5),
        "bytes_per_vector": shape.resident_bytes,
        "stored_bytes_per_vector": round(stored / max(1, index.info.rows), 1),
        **_latency(index, probe, settings),
    }


class _Trial:
    """Searches for the probe with some settings and remembers the best."""

    def __init__(self, index: Index, probe: Probe, target: float, against: Against) -> None:
        self._index, self._probe, self._target = index, probe, target
        self._truth = _space(probe, against).truth(K)
        self.best = Tuned(index.info.search, -1.0)

    def __call__(self, settings: SearchSettings) -> "Tuned":
        tuned, _ = self._measure(settings)
        return tuned

    def reaches(self, settings: SearchSettings) -> Tuned | None:
        """Return what was measured if it is enough."""
        tuned, margin = self._measure(settings)
        return tuned if tuned.recall >= min(1.0, self._target + margin) else None

    def _measure(self, settings: SearchSettings) -> tuple[Tuned, float]:
        answers = ask(self._index, self._probe, settings=settings)
        shares = shares_found(_uris(answers), self._truth)
        reached = float(shares.mean()) if len(shares) else 1.0
        margin = _CONFIDENCE * float(shares.std()) / math.sqrt(len(shares)) if len(shares) else 0.0
        tuned = Tuned(settings, reached)
        if reached > self.best.recall:
            self.best = tuned
        return tuned, margin


def _families(shape: Design) -> Iterator[SearchSettings]:
    """Yield settings that differ in all but nprobe, those with the fewest candidates first."""
    if shape.raw_bytes:
        for raw, share in itertools.product(_RERANKS_RAW, _CANDIDATES_A_RAW if shape.refine_bytes else (0,)):
            yield SearchSettings(1, round(raw * share), 0, raw)
    else:
        for rerank in _RERANKS if shape.refine_bytes else (0,):
            yield SearchSettings(1, rerank)


def _with_nprobe(family: SearchSettings, nprobe: int, graph: bool) -> SearchSettings:
    return replace(family, nprobe=nprobe, ef_search=round(nprobe * _EFFORTS[-1]) if graph else 0)


def _first_reaching(trial: _Trial, ladder: list[SearchSettings]) -> Tuned | None:
    """Find by bisection the first step that reaches the target; None when the last does not."""
    low, high, found = 0, len(ladder) - 1, None
    while low <= high:
        middle = (low + high) // 2
        reached = trial.reaches(ladder[middle])
        found = reached or found
        low, high = (low, middle - 1) if reached else (middle + 1, high)
    return found


def _least_effort(trial: _Trial, tuned: Tuned) -> Tuned:
    """Search the graph of centroids no wider than needed."""
    for effort in _EFFORTS:
        settings = replace(tuned.settings, ef_search=round(tuned.settings.nprobe * effort))
        found = trial.reaches(settings)
        if found is not None:
            return found
    return tuned


def _ladder(nlist: int) -> list[int]:
    """Return values of nprobe from 1 to `nlist`, each about a fifth above the last."""
    steps = [1]
    while steps[-1] < nlist:
        steps.append(min(nlist, max(steps[-1] + 1, round(steps[-1] * 1.2))))
    return steps


def _cost(index: Index, shape: Design) -> Callable[[SearchSettings], float]:
    """Rank settings by the bytes that a query touches, those picked at random counted dearer."""
    per_list = index.info.rows / shape.nlist * shape.code_bytes

    def cost(settings: SearchSettings) -> float:
        picked = _RERANK_COST * settings.rerank * shape.refine_bytes + _RAW_COST * settings.rerank_raw * shape.raw_bytes
        return settings.nprobe * per_list + picked

    return cost


def _recalls(index: Index, probe: Probe, settings: SearchSettings, answers: list[list[Hit]]) -> dict[str, float]:
    """Return recall@1, @10 and @100 against both spaces."""
    found = {K: answers, DEEPEST: ask(index, probe, DEEPEST, settings)}
    recalls = {}
    for against, ending in (("reduced", ""), ("raw", "_raw")):
        neighbours = _space(probe, against)
        for k in (1, K, DEEPEST):
            uris = _uris(found[max(k, K)])
            recalls[f"recall_at_{k}{ending}"] = round(recall(uris, neighbours.truth(k), k), 4)
    return recalls


def _space(probe: Probe, against: str) -> Neighbours:
    return probe.raw if against == "raw" else probe.reduced


def _uris(answers: Iterable[list[Hit]]) -> list[list[str]]:
    return [[hit.uri for hit in hits] for hits in answers]


def _precision(answers: list[list[Hit]], probe: Probe) -> float | None:
    judged = [
        hits[0].label == label
        for hits, label in zip(answers, probe.rows.column("label"), strict=True)
        if hits and label is not None
    ]
    return round(float(np.mean(judged)), 4) if judged else None


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
        index.search(vector, K, settings=settings)
        times.append((time.perf_counter() - started) * 1e6)
    return times
