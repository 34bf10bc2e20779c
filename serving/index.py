"""Open a published index and ask it."""

import bisect
import functools
import itertools
import math
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from serving import records, shards, storage
from serving.errors import EmbedderMismatch, FormatError, UsageError
from serving.lists import Lists
from serving.manifest import IndexManifest, SearchSettings, Shard, load_index_manifest
from serving.quantizer import Quantizer
from serving.reduction import Reduction
from serving.selection import Selection

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

_SAFE = (1e-12, 1e12)
"""Lengths whose squares float32 holds."""


class Hit(NamedTuple):
    """One neighbour: `score` is the cosine in the index's space, `row` its number over all shards."""

    uri: str
    label: str | None
    score: float
    row: int


class Index:
    """An index version, or some of its shards. Searching is safe from many threads at once.

    Use `Index.open`; `info` is the version's manifest: what it holds, where it came from, what was measured on it.
    """

    def __init__(
        self, root: str, info: IndexManifest, chosen: Sequence[int] | None = None, mode: str = "memory"
    ) -> None:
        if mode not in shards.MODES:
            raise UsageError(f"mode is {mode!r}; take one of {', '.join(shards.MODES)}")
        self.info = info
        self._root = root
        folder = storage.join(root, "versions", info.version)
        picked = shards.choose(info, chosen)
        quantizer = Quantizer(info.trained.read(folder))
        if quantizer.id != info.quantizer or quantizer.dim != info.dim:
            raise FormatError(f"{folder}: {info.trained.name} is not the quantizer that the manifest names")
        opened = (shards.open_memory if mode == "memory" else shards.open_mapped)(folder, picked, quantizer)
        self._reduction = Reduction(quantizer.chain, info.dim)
        self._lists = Lists(quantizer, opened)
        self._raw = opened.raw
        self._records = records.Records(opened.records)
        self._numbering = _Numbering(info, picked)
        self._select = _selections(self._lists, self._records)
        self._embedder: Any = None

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        version: str | None = None,
        shards: Sequence[int] | None = None,
        embedder: str | None = None,
        mode: str = "memory",
    ) -> "Index":
        """Open the current (or named) version of the index at `uri`, whole or some of its shards by number.

        `mode="memory"` loads the lists and checks every file against the manifest's checksums; `"mmap"` maps local
        files in milliseconds, for an index larger than memory or shared by processes, and checks their sizes alone
        (`lookalike verify` checks the rest). `embedder` is the fingerprint of the embedder your vectors come from: an
        index of another one is refused with `EmbedderMismatch`.
        """
        root = storage.normalize(uri)
        info = load_index_manifest(root, version)
        cls.check_embedder(root, info, embedder)
        return cls(root, info, shards, mode)

    @staticmethod
    def check_embedder(root: str, info: IndexManifest, embedder: str | None) -> None:
        """Raise `EmbedderMismatch` when `embedder` is given and is not the index's."""
        if embedder is not None and embedder != info.embedder.fingerprint:
            raise EmbedderMismatch(
                f"{root} was built with the embedder {info.embedder.fingerprint} ({info.embedder.backbone}), "
                f"your vectors come from {embedder}: their distances mean nothing to each other"
            )

    def __len__(self) -> int:
        return len(self._records)

    def search(
        self,
        vectors: npt.ArrayLike,
        k: int = 10,
        *,
        nprobe: int | None = None,
        rerank: int | None = None,
        labels: Collection[str] | None = None,
        settings: SearchSettings | None = None,
    ) -> list[list[Hit]]:
        """Return the nearest `k` rows of each raw vector, best first; float32 `[N, dim]` or `[dim]`.

        `nprobe` (inverted lists visited), `rerank` (candidates ranked again), or all `settings`, default to what was
        measured when the index was built. `labels` searches among the images of these labels alone. Fewer than `k`
        hits come back only where there are no more.
        """
        queries = self._check_queries(vectors)
        k, settings = self._check_settings(k, nprobe, rerank, settings)
        selection = None if labels is None else self._select(_label_set(labels))
        if len(queries) == 1 and selection is None and k and self._lists.is_whole:
            scores, rows = self._one(queries[0], k, settings)
            return [self._hits(scores.tolist(), rows.tolist())]
        scores, rows = self._many(queries, k, settings, selection)
        return [self._hits(*answer) for answer in zip(scores.tolist(), rows.tolist(), strict=True)]

    def search_rows(
        self,
        vectors: npt.ArrayLike,
        k: int = 10,
        *,
        labels: Collection[str] | None = None,
        settings: SearchSettings | None = None,
    ) -> tuple[Floats, Rows]:
        """Search as `search` does, and return arrays `[N, k]`: scores, and row numbers to give to `record`.

        Where there are fewer than `k`, rows are filled up with -1 and scores with -inf.
        """
        queries = self._check_queries(vectors)
        asked, settings = self._check_settings(k, None, None, settings)
        selection = None if labels is None else self._select(_label_set(labels))
        scores, rows = self._many(queries, asked, settings, selection)
        missing = ((0, 0), (0, operator.index(k) - scores.shape[1]))
        scores, rows = np.pad(scores, missing, constant_values=-np.inf), np.pad(rows, missing, constant_values=-1)
        return np.where(rows < 0, scores, np.clip(scores, -1, 1)), self._numbering.globals(rows)

    def search_images(
        self, images: Sequence[bytes], k: int = 10, *, labels: Collection[str] | None = None
    ) -> list[list[Hit]]:
        """Return the nearest `k` rows of each encoded picture (JPEG, PNG, …), as `search` does.

        Needs the extra `images`. A picture that cannot be decoded raises `ImageRejected`.
        """
        return self.search(self.embedder.embed_images(images), k, labels=labels)

    def record(self, row: int) -> records.Record:
        """Return uri, label and etag of a row; `IndexError` when the opened shards do not hold it."""
        return self._records[self._numbering.local(row)]

    @property
    def embedder(self) -> Any:
        """Return the embedder that made the indexed vectors (`serving.embedder.Embedder`), loaded on first use."""
        if self._embedder is None:
            from serving.embedder import open_cached

            self._embedder = open_cached(storage.join(self._root, "embedders", self.info.embedder.fingerprint))
        return self._embedder

    def _check_settings(
        self, k: int, nprobe: int | None, rerank: int | None, settings: SearchSettings | None
    ) -> tuple[int, SearchSettings]:
        k = operator.index(k)
        if k < 1:
            raise UsageError(f"k is {k}; ask for at least one neighbour")
        chosen = settings or self.info.search
        if nprobe is not None or rerank is not None:
            chosen = SearchSettings(
                chosen.nprobe if nprobe is None else operator.index(nprobe),
                chosen.rerank if rerank is None else operator.index(rerank),
                chosen.ef_search,
                chosen.rerank_raw,
            )
        if chosen.nprobe < 1:
            raise UsageError(f"nprobe is {chosen.nprobe}; visit at least one inverted list")
        if chosen.rerank < 0:
            raise UsageError(f"rerank is {chosen.rerank}; it counts candidates, 0 takes as few as can be")
        return min(k, len(self)), chosen

    def _check_queries(self, vectors: npt.ArrayLike) -> Floats:
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, refused later
                queries = np.ascontiguousarray(vectors, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise UsageError(f"query vectors are not an array of numbers: {error}") from None
        if queries.ndim < 2:
            queries = queries.reshape(1, -1)
        if queries.ndim != 2 or queries.shape[1] != self.info.dim:
            raise UsageError(
                f"query vectors have the shape {np.shape(vectors)}; this index takes (N, {self.info.dim}), "
                f"raw vectors of its embedder {self.info.embedder.fingerprint} ({self.info.embedder.backbone})"
            )
        return queries

    def _one(self, query: Floats, k: int, settings: SearchSettings) -> tuple[Floats, Rows]:
        """Search for one query without making arrays that are not needed."""
        length = math.sqrt(query.dot(query))
        if not _SAFE[0] < length < _SAFE[1]:  # NaN compares false too
            (query,) = _scaled(query[np.newaxis])
            length = math.sqrt(query.dot(query))
        depth = k if self._raw is None else self._depth(k, settings)
        scores, rows = self._lists.one(self._reduction.one(query, length), depth, settings)
        if rows[k - 1] < 0:  # too few in the lists visited
            return self._first(self._many(query[np.newaxis], k, settings, None))
        if self._raw is not None:
            scores, rows = self._raw.best(query / np.float32(length or 1), rows[rows >= 0], k)
        return scores, rows

    @staticmethod
    def _first(answers: tuple[Floats, Rows]) -> tuple[Floats, Rows]:
        return answers[0][0], answers[1][0]

    def _many(
        self, queries: Floats, k: int, settings: SearchSettings, selection: Selection | None
    ) -> tuple[Floats, Rows]:
        """Return scores and local rows `[N, k]`."""
        if selection is not None:
            k = min(k, len(selection.rows))
        if k == 0 or not len(queries):
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        queries = _scaled(queries)
        reduced = self._reduction.many(queries)
        depth = k if self._raw is None else self._depth(k, settings)
        scores, rows = self._lists.many(reduced, depth, settings, selection)
        short = (rows[:, :k] < 0).any(axis=1)
        if short.any():  # the lists visited held fewer than k rows: visit them all
            nlist = self._lists.nlist
            widest = SearchSettings(nlist, max(settings.rerank, depth), nlist, settings.rerank_raw)
            scores[short], rows[short] = self._lists.many(reduced[short], depth, widest, selection)
            short = (rows[:, :k] < 0).any(axis=1)
        if not self._lists.can_scan:
            short = rows[:, 0] < 0
        if short.any():  # FastScan finds nothing for a query that is as far from every code
            chosen = None if selection is None else selection.rows
            scores[short], rows[short] = self._lists.scan(reduced[short], depth, chosen)
        return (scores, rows) if self._raw is None else self._rank_raw(queries, rows, k)

    def _rank_raw(self, queries: Floats, rows: Rows, k: int) -> tuple[Floats, Rows]:
        assert self._raw is not None
        scores = np.full((len(queries), k), -np.inf, np.float32)
        ranked = np.full((len(queries), k), -1, np.int64)
        for number, (query, found) in enumerate(zip(queries, rows, strict=True)):
            found = found[found >= 0]
            length = np.float32(math.sqrt(query.dot(query)) or 1)
            best, best_rows = self._raw.best(query / length, found, k)
            scores[number, : len(best)], ranked[number, : len(best)] = best, best_rows
        return scores, ranked

    def _depth(self, k: int, settings: SearchSettings) -> int:
        """Return how many candidates are ranked a last time by their whole vectors."""
        return min(max(2 * k, settings.rerank_raw), len(self))

    def _hits(self, scores: list[float], found: list[int]) -> list[Hit]:
        if found and found[-1] < 0:
            scores, found = scores[: found.index(-1)], found[: found.index(-1)]
        if scores and (scores[0] > 1 or scores[-1] < -1):  # by a rounding
            scores = [max(-1.0, min(1.0, score)) for score in scores]
        renumber, make = self._numbering.one, tuple.__new__  # a NamedTuple's own constructor takes twice as long
        return [
            make(Hit, (uri, label, score, row if renumber is None else renumber(row)))
            for (uri, label), score, row in zip(self._records.uris_and_labels(found), scores, found, strict=True)
        ]


def _selections(lists: Lists, held: records.Records) -> Callable[[frozenset[str]], Selection]:
    """Return a function that prepares searches among some labels, and keeps the last few it prepared."""

    @functools.lru_cache(maxsize=16)  # without a reference to the index, which would keep it from going
    def select(labels: frozenset[str]) -> Selection:
        return lists.select(held.labelled(labels))

    return select


class _Numbering:
    """Rows of the opened shards ↔ rows over all shards."""

    def __init__(self, info: IndexManifest, chosen: list[Shard]) -> None:
        starts = list(itertools.accumulate((shard.rows for shard in info.shards), initial=0))
        self._locals = list(itertools.accumulate((shard.rows for shard in chosen), initial=0))
        self._globals = [starts[shard.number] for shard in chosen]
        self._all = len(chosen) == len(info.shards)
        self.one = None if self._all else self._one

    def _one(self, row: int) -> int:
        at = bisect.bisect_right(self._locals, row) - 1
        return row - self._locals[at] + self._globals[at]

    def globals(self, rows: Rows) -> Rows:
        """Renumber an array; -1 stays."""
        if self._all or not self._globals:
            return rows
        at = np.searchsorted(self._locals[:-1], rows, side="right") - 1
        shift = np.array(self._globals) - np.array(self._locals[:-1])
        return np.where(rows < 0, rows, rows + shift[at])

    def local(self, row: int) -> int:
        """Return the place among the opened shards of a row over all."""
        for first, start, end in zip(self._globals, self._locals, self._locals[1:], strict=False):
            if first <= row < first + end - start:
                return row - first + start
        raise IndexError(f"row {row} is not in the opened shards")


def _label_set(labels: Collection[str]) -> frozenset[str]:
    if isinstance(labels, str):
        raise UsageError(f"labels is the text {labels!r}; give a set of labels, as in labels={{{labels!r}}}")
    return frozenset(labels)


def _scaled(queries: Floats) -> Floats:
    """Bring very large and very small vectors where float32 can square them; refuse NaN and infinity."""
    largest = np.abs(queries).max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise UsageError("query vectors hold NaN or infinity; embed those images again")
    odd = (largest < _SAFE[0]) | (largest > _SAFE[1])
    if not odd.any():
        return queries
    largest[largest == 0] = 1
    scaled: Floats = np.where(odd, queries / largest, queries)
    return scaled
