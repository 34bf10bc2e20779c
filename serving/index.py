"""Open a published index and ask it."""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

from serving import records, storage
from serving.errors import EmbedderMismatch, FormatError, UsageError
from serving.manifest import FileEntry, IndexManifest, SearchSettings, Shard, load_index_manifest
from serving.quantizer import Quantizer


class Hit(NamedTuple):
    """One neighbour: `score` is the cosine in the index's space, `row` its number over all shards."""

    uri: str
    label: str | None
    score: float
    row: int


class Index:
    """An index version, or some of its shards, held in memory. Searching is safe from many threads at once.

    Use `Index.open`; `info` is the version's manifest: what it holds, where it came from, what was measured on it.
    """

    def __init__(self, root: str, info: IndexManifest, shards: Sequence[int] | None = None) -> None:
        self.info = info
        self._root = root
        folder = storage.join(root, "versions", info.version)
        chosen = _choose(info, shards)
        self._quantizer = Quantizer(info.trained.read(folder))
        if self._quantizer.id != info.quantizer or self._quantizer.dim != info.dim:
            raise FormatError(f"{folder}: {info.trained.name} is not the quantizer that the manifest names")
        lists, refine = self._quantizer.empty_lists(), self._quantizer.empty_refine()
        tables = []
        for shard in chosen:
            _append_lists(lists, shard, folder)
            if refine is not None:
                _append_refine(refine, shard, folder)
            tables.append(_read_records(folder, shard))
        self._nlist = int(self._quantizer.ivf.nlist)
        self._records = records.Records(tables)
        self._rows = _global_rows(info, chosen).data
        self._refine = refine
        self._faiss, self._parts = _assemble(self._quantizer, lists, refine)
        # FAISS only reads them, so threads share them; making them anew takes longer than some searches.
        self._params = _params_cache(
            nlist=self._nlist, rows=len(self._records), reranks=bool(self._quantizer.refine_size)
        )
        self._embedder: Any = None

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        version: str | None = None,
        shards: Sequence[int] | None = None,
        embedder: str | None = None,
    ) -> "Index":
        """Open the current (or named) version of the index at `uri`, whole or some of its shards by number.

        Every file is checked against the manifest's checksums. `embedder` is the fingerprint of the embedder your
        vectors come from: an index of another one is refused with `EmbedderMismatch`.
        """
        root = storage.normalize(uri)
        info = load_index_manifest(root, version)
        if embedder is not None and embedder != info.embedder.fingerprint:
            raise EmbedderMismatch(
                f"{root} was built with the embedder {info.embedder.fingerprint} ({info.embedder.backbone}), "
                f"your vectors come from {embedder}: their distances mean nothing to each other"
            )
        return cls(root, info, shards)

    def __len__(self) -> int:
        return len(self._records)

    def search(
        self,
        vectors: npt.ArrayLike,
        k: int = 10,
        *,
        nprobe: int | None = None,
        rerank: int | None = None,
    ) -> list[list[Hit]]:
        """Return the nearest `k` rows of each raw vector, best first; float32 `[N, dim]` or `[dim]`.

        `nprobe` (inverted lists visited) and `rerank` (candidates ranked again) default to what was measured when the
        index was built. Fewer than `k` hits come back only where the index holds fewer rows.
        """
        queries, k = self._check_queries(vectors), operator.index(k)
        if k < 1:
            raise UsageError(f"k is {k}; ask for at least one neighbour")
        settings = self._settings(nprobe, rerank)
        k = min(k, len(self))
        if k == 0 or not len(queries):
            return [[] for _ in queries]
        scores, found = self._search(queries, k, settings)
        short = (found < 0).any(axis=1)
        if short.any():  # the lists visited held fewer than k rows: visit them all
            widest = SearchSettings(self._nlist, max(settings.rerank, k))
            scores[short], found[short] = self._search(queries[short], k, widest)
            short = (found < 0).any(axis=1)
        if short.any():  # FastScan finds nothing for a query that is as far from every code
            scores[short], found[short] = self._refine.search(self._quantizer.reduce(queries[short]), k)
        return [self._hits(*row) for row in zip(scores.tolist(), found.tolist(), strict=True)]

    def search_images(self, images: Sequence[bytes], k: int = 10) -> list[list[Hit]]:
        """Return the nearest `k` rows of each encoded picture (JPEG, PNG, …), as `search` does.

        Needs the extra `images`. A picture that cannot be decoded raises `ImageRejected`.
        """
        return self.search(self.embedder.embed_images(images), k)

    @property
    def embedder(self) -> Any:
        """Return the embedder that made the indexed vectors (`serving.embedder.Embedder`), loaded on first use."""
        if self._embedder is None:
            from serving.embedder import open_cached

            self._embedder = open_cached(storage.join(self._root, "embedders", self.info.embedder.fingerprint))
        return self._embedder

    def _settings(self, nprobe: int | None, rerank: int | None) -> SearchSettings:
        default = self.info.search
        settings = SearchSettings(
            default.nprobe if nprobe is None else operator.index(nprobe),
            default.rerank if rerank is None else operator.index(rerank),
        )
        if settings.nprobe < 1:
            raise UsageError(f"nprobe is {settings.nprobe}; visit at least one inverted list")
        if settings.rerank < 0:
            raise UsageError(f"rerank is {settings.rerank}; it counts candidates, 0 takes as few as can be")
        return settings

    def _check_queries(self, vectors: npt.ArrayLike) -> npt.NDArray[np.float32]:
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, refused below
                queries = np.atleast_2d(np.ascontiguousarray(vectors, dtype=np.float32))
        except (TypeError, ValueError) as error:
            raise UsageError(f"query vectors are not an array of numbers: {error}") from None
        if queries.ndim != 2 or queries.shape[1] != self.info.dim:
            raise UsageError(
                f"query vectors have the shape {np.shape(vectors)}; this index takes (N, {self.info.dim}), "
                f"raw vectors of its embedder {self.info.embedder.fingerprint} ({self.info.embedder.backbone})"
            )
        largest = np.abs(queries).max(axis=1, keepdims=True)
        if not np.isfinite(largest).all():
            raise UsageError("query vectors hold NaN or infinity; embed those images again")
        # FAISS takes lengths in float32, where the squares of very small and very large numbers are lost.
        largest[largest == 0] = 1
        scaled: npt.NDArray[np.float32] = queries / largest
        return scaled

    def _search(
        self, queries: npt.NDArray[np.float32], k: int, settings: SearchSettings
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        scores, found = self._faiss.search(queries, k, params=self._params(k, settings))
        return scores, found

    def _hits(self, scores: list[float], found: list[int]) -> list[Hit]:
        look_up, rows = self._records.uri_and_label, self._rows
        return [
            Hit(*look_up(local), max(-1.0, min(1.0, score)), rows[local])
            for score, local in zip(scores, found, strict=True)
            if local >= 0
        ]


def _params_cache(nlist: int, rows: int, reranks: bool) -> Callable[[int, SearchSettings], Any]:
    """Return a function that makes FAISS's parameters of a search, and keeps the last few it made."""

    @functools.lru_cache(maxsize=64)  # per index, and without a reference to it, which would keep it from going
    def make(k: int, settings: SearchSettings) -> Any:
        params: Any = faiss.SearchParametersIVF(nprobe=min(settings.nprobe, nlist))
        if reranks:
            candidates = min(max(settings.rerank, 2 * k), max(rows, k))
            params = faiss.IndexRefineSearchParameters(k_factor=candidates / k, base_index_params=params)
        return faiss.SearchParametersPreTransform(index_params=params)

    return make


def _choose(info: IndexManifest, shards: Sequence[int] | None) -> list[Shard]:
    if shards is None:
        return list(info.shards)
    unknown = sorted(set(shards) - {shard.number for shard in info.shards})
    if unknown:
        raise UsageError(f"shards {unknown} are not in this index; it has 0 to {len(info.shards) - 1}")
    return [shard for shard in info.shards if shard.number in set(shards)]


def _global_rows(info: IndexManifest, chosen: list[Shard]) -> npt.NDArray[np.int64]:
    starts = list(itertools.accumulate((shard.rows for shard in info.shards), initial=0))
    ranges = [np.arange(starts[shard.number], starts[shard.number] + shard.rows) for shard in chosen]
    return np.concatenate([np.empty(0, np.int64), *ranges])


def _read_faiss(folder: str, entry: FileEntry) -> Any:
    data = np.frombuffer(entry.read(folder), np.uint8)
    try:
        return faiss.deserialize_index(data)
    except (RuntimeError, MemoryError) as error:
        raise FormatError(f"{storage.join(folder, entry.name)}: {str(error).splitlines()[-1]}") from None


def _read_records(folder: str, shard: Shard) -> Any:
    table = records.from_buffer(shard.records.read(folder), storage.join(folder, shard.records.name))
    if len(table) != shard.rows:
        raise FormatError(f"{folder}: {shard.records.name} has {len(table)} rows, the manifest says {shard.rows}")
    return table


def _append_lists(lists: Any, shard: Shard, folder: str) -> None:
    found = _read_faiss(folder, shard.lists)
    if not _alike(found, lists, shard.rows) or found.nlist != lists.nlist:
        raise FormatError(f"{folder}: {shard.lists.name} does not hold the {shard.rows} rows of its manifest")
    lists.invlists.merge_from(found.invlists, lists.ntotal)
    lists.ntotal += shard.rows


def _append_refine(refine: Any, shard: Shard, folder: str) -> None:
    if shard.refine is None:
        raise FormatError(f"{folder}: the manifest names no re-rank codes for shard {shard.number}")
    found = _read_faiss(folder, shard.refine)
    if not _alike(found, refine, shard.rows):  # FAISS would read past their end
        raise FormatError(f"{folder}: {shard.refine.name} does not hold the {shard.rows} rows of its manifest")
    refine.merge_from(found)


def _alike(found: Any, model: Any, rows: int) -> bool:
    return type(found) is type(model) and found.ntotal == rows and found.code_size == model.code_size


def _assemble(quantizer: Quantizer, lists: Any, refine: Any) -> tuple[Any, Any]:
    """Put the transforms before the lists; 4-bit codes are packed for FastScan, whose ids stay the same.

    FAISS holds bare pointers, so the parts must live as long as the whole.
    """
    searched = lists
    if isinstance(lists, faiss.IndexIVFPQ) and lists.pq.nbits == 4:
        searched = faiss.IndexIVFPQFastScan(lists)
        lists.reset()  # packed now; what stays is the coarse quantizer, which both share
    inner = searched if refine is None else faiss.IndexRefine(searched, refine)
    whole = faiss.IndexPreTransform(inner)
    for transform in reversed(quantizer.chain):
        whole.prepend_transform(transform)
    return whole, (quantizer, lists, searched, refine, inner)
