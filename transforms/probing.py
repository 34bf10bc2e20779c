"""Queries to measure an index with, and their exact neighbours in the raw and in the index's own space."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from serving.quantizer import Quantizer
from transforms.designing import QUERIES, held_out
from transforms.sampling import LiveRows, sample

SALT = 0x7175_6572_79
K = 10
DEEPEST = 100
"""The largest k that recall is measured at."""

_TIE = 2e-6
_SPARE = DEEPEST + 28
"""Neighbours kept of each query: the deepest, and some more to see ties by."""

_AT_ONCE = 16_384
"""Rows compared with all queries at a time."""

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Truth = list[frozenset[str]]


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The nearest rows of some queries in one space, exactly: scores and uris, best first, `[N, spare]`."""

    scores: Floats
    uris: list[list[str]]

    def truth(self, k: int = K) -> Truth:
        """Return each query's `k` nearest; more where some are as near as the last.

        Empty where all that were kept are equally near, as among many copies of one picture: more such may have been
        dropped, and the query cannot be judged.
        """
        last = self.scores[:, min(k, self.scores.shape[1]) - 1][:, np.newaxis]
        near = (self.scores >= last - _TIE) & np.isfinite(self.scores)
        near[near.all(axis=1) & (self.scores.shape[1] >= _SPARE)] = False
        return [
            frozenset(uris[place] for place in np.flatnonzero(mask)) for uris, mask in zip(self.uris, near, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Probe:
    """Live rows to ask with, each with its exact neighbours but itself."""

    rows: LiveRows
    vectors: Floats
    raw: Neighbours
    reduced: Neighbours
    held_out: bool
    """Whether the queries were left out of training."""


def queries_of(live: LiveRows) -> tuple[LiveRows, bool]:
    """Return the rows that measure an index, and whether training leaves them out.

    They are those whose salted hashes are smallest, so that a growing collection keeps most of them.
    """
    spared = held_out(len(live))
    return sample(live, spared or min(QUERIES, len(live)), SALT), spared > 0


def without_queries(live: LiveRows) -> LiveRows:
    """Return the rows that may be trained on."""
    asked, spared = queries_of(live)
    return live.without(asked) if spared else live


def make_probe(
    live: LiveRows, quantizer: Quantizer, queries: int | None = None, seen: Callable[[int], None] | None = None
) -> Probe:
    """Choose queries and search for them exactly in float32, streaming over all live rows.

    `seen` is told how many rows were looked at so far.
    """
    asked, spared = queries_of(live)
    if queries is not None:
        asked = asked.take(np.arange(min(queries, len(asked))))
    vectors = asked.vectors()
    uris = live.column("uri")
    own = {uri: number for number, uri in enumerate(asked.column("uri"))}
    own_of = np.full(len(live), -1)
    for place, uri in enumerate(uris):
        own_of[place] = own.get(uri, -1)
    spaces = {"raw": _unit, "reduced": quantizer.reduce}
    nearest = {name: _Nearest(space(vectors)) for name, space in spaces.items()}
    looked_at = 0
    for places, chunk in _together(live.chunks()):
        for name, space in spaces.items():
            nearest[name].add(space(chunk), places, own_of[places])
        looked_at += len(places)
        if seen is not None:
            seen(looked_at)
    found = {name: best.neighbours(uris) for name, best in nearest.items()}
    return Probe(asked, vectors, found["raw"], found["reduced"], spared)


def recall(found: Iterable[Sequence[str]], truth: Sequence[frozenset[str]], k: int = K) -> float:
    """Return the mean share of the `k` exact neighbours that were found; equally near ones count alike."""
    shares = shares_found(found, truth, k)
    return float(shares.mean()) if len(shares) else 1.0


def shares_found(found: Iterable[Sequence[str]], truth: Sequence[frozenset[str]], k: int = K) -> npt.NDArray[Any]:
    """Return of each query that can be judged which share of its `k` neighbours was found."""
    shares = [
        min(1.0, len(truth_of.intersection(uris[:k])) / min(k, len(truth_of)))
        for uris, truth_of in zip(found, truth, strict=True)
        if truth_of
    ]
    return np.array(shares)


def _together(chunks: Iterable[tuple[Rows, Floats]]) -> Iterator[tuple[Rows, Floats]]:
    """Put small chunks together: what is done once a chunk takes longer than its few products."""
    held: list[tuple[Rows, Floats]] = []
    for chunk in chunks:
        held.append(chunk)
        if sum(len(places) for places, _ in held) >= _AT_ONCE:
            yield _concatenated(held)
            held = []
    if held:
        yield _concatenated(held)


def _concatenated(chunks: list[tuple[Rows, Floats]]) -> tuple[Rows, Floats]:
    return np.concatenate([places for places, _ in chunks]), np.concatenate([vectors for _, vectors in chunks])


class _Nearest:
    """The nearest rows so far of each query."""

    def __init__(self, queries: Floats) -> None:
        self._queries = np.ascontiguousarray(queries, np.float32)
        self._scores = np.full((len(queries), _SPARE), -np.inf, np.float32)
        self._places = np.full((len(queries), _SPARE), -1, np.int64)

    def add(self, vectors: Floats, places: npt.NDArray[np.int64], own: npt.NDArray[np.int64]) -> None:
        """Look among `vectors` at these places; `own` says which query a vector is, or -1."""
        if not len(self._queries):
            return
        k = min(_SPARE + 1, len(vectors))  # one more, for the query itself
        scores, found = faiss.knn(self._queries, np.ascontiguousarray(vectors), k, faiss.METRIC_INNER_PRODUCT)
        scores = np.where(own[found] == np.arange(len(found))[:, np.newaxis], -np.inf, scores)
        scores = np.concatenate([self._scores, scores], axis=1)
        all_places = np.concatenate([self._places, places[found]], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :_SPARE]
        self._scores = np.take_along_axis(scores, best, axis=1)
        self._places = np.take_along_axis(all_places, best, axis=1)

    def neighbours(self, uris: Sequence[str | None]) -> Neighbours:
        """Name what was found."""
        return Neighbours(self._scores, [[uris[place] or "" for place in places] for places in self._places.tolist()])


def _unit(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
