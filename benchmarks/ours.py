# ruff: noqa: ARG002, D102 (the peers' protocol says what the methods are, and asks more than some need)
"""Our own side of the comparison, in the peers' protocol: the index as users open it, and FAISS alone on its files.

    python -m benchmarks.ours NAME WORKDIR

is `benchmarks.peers.worker` with these libraries besides, and with one more command, `recall`. The peers are run by it
too, where only NumPy and the one library are installed: whatever else is needed is imported by the class that needs it.
"""

import dataclasses
import importlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import worker
from benchmarks.peers.libraries import LIBRARIES
from benchmarks.peers.protocol import Array

_RERANKS = (20, 30, 40, 60, 80, 120, 160, 320, 640)
_RERANKS_RAW, _RERANKS_BEFORE = (20, 30, 40, 60, 80, 120, 160, 240, 320), (20, 320)
"""Where whole vectors have the last word; at least twice as many candidates are ranked before."""
_K = 10
_BEST_FIRST = 11
"""FAISS's number for the FastScan that suits single queries, which our index takes for them too."""


class Answer:
    """What a search returned; it becomes vectors' numbers when it is looked at, after the clock has stopped."""

    def __init__(self, found: Any, numbers: Callable[[Any], Any]) -> None:
        self._found, self._numbers = found, numbers

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self._numbers(self._found), dtype)


class Ours:
    """`serving.Index` through its public API: raw vectors in, hits with uris out; rows alone for a batch.

    Built by `pipelines.index` from the embedding store `store`, in the folder `building`; or, with `index`, one that
    is built already.
    """

    def __init__(self) -> None:
        self.knobs: dict[str, Sequence[int]] = {}
        self.open = importlib.import_module("serving.index").Index.open
        self.names = importlib.import_module("benchmarks.names")
        self.index: Any = None
        self.numbers: Array = None
        self.settings: Any = None
        self.building: Path | None = None

    def build(self, vectors: Array, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        if "index" in options:
            return {}
        index, runner = map(importlib.import_module, ("pipelines.index", "pipelines.runner"))
        self.building = Path(options["building"])
        shutil.rmtree(self.building, ignore_errors=True)
        request = index.IndexRequest(options["store"], str(self.building), **options.get("request", {}))
        manifest, _ = index.run(request, runner.Runner(()))
        return {"kind": manifest.kind, "reduced_dim": manifest.reduced_dim, **manifest.parameters}

    def save(self, folder: Path) -> None:
        if self.building is not None:
            for path in self.building.iterdir():
                shutil.move(path, folder)
            self.building.rmdir()

    def load(self, folder: Path, count: int, width: int, options: Mapping[str, Any]) -> None:
        mode = {"mode": options["mode"]} if "mode" in options else {}
        self.index = self.open(str(options.get("index", folder)), **mode)
        self.knobs = _knobs(self.index.info)

    def set_effort(self, **knobs: int) -> None:
        self.settings = _settings(self.index.info, knobs)

    def search(self, query: Array, k: int) -> Any:
        return Answer(self.index.search(query, k, settings=self.settings), self._named)

    def search_batch(self, queries: Array, k: int) -> Any:
        _, rows = self.index.search_rows(queries, k, settings=self.settings)
        return [Answer(each, self._numbered) for each in rows]

    def _named(self, answer: Any) -> list[int]:
        return [self.names.number_of(hit.uri) for hit in answer[0]]

    def _numbered(self, rows: Array) -> Array:
        if self.numbers is None:
            self.numbers = self.names.numbering(len(self.index))
        return np.where(rows < 0, rows, self.numbers[rows])


class Bare:
    """FAISS on the files of the index `index`: what it costs to ask the same parts with nothing around them."""

    def __init__(self) -> None:
        self.knobs: dict[str, Sequence[int]] = {}
        self.faiss = importlib.import_module("faiss")
        self.manifest = importlib.import_module("serving.manifest")
        self.names = importlib.import_module("benchmarks.names")
        self.index: Any = None
        self.info: Any = None
        self.numbers: Array = None
        self.settings: Any = None
        self.parts: tuple[Any, ...] = ()

    def build(self, vectors: Array, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def save(self, folder: Path) -> None:
        pass

    def load(self, folder: Path, count: int, width: int, options: Mapping[str, Any]) -> None:
        faiss, self.info = self.faiss, self.manifest.load_index_manifest(options["index"])
        files = Path(options["index"], "versions", self.info.version)
        trained = faiss.read_index(str(files / self.info.trained.name))
        inner = faiss.downcast_index(trained.index)
        lists, refine = faiss.downcast_index(inner.base_index), faiss.downcast_index(inner.refine_index)
        for shard in self.info.shards:
            found = faiss.read_index(str(files / shard.lists.name))
            lists.invlists.merge_from(found.invlists, lists.ntotal)
            lists.ntotal += shard.rows
            refine.merge_from(faiss.read_index(str(files / shard.refine.name)))
        packed = faiss.IndexIVFPQFastScan(lists)
        lists.reset()
        ranked = faiss.IndexRefine(packed, refine)
        self.index = faiss.IndexPreTransform(ranked)
        for number in reversed(range(trained.chain.size())):
            self.index.prepend_transform(faiss.downcast_VectorTransform(trained.chain.at(number)))
        self.parts = trained, inner, lists, refine, packed, ranked  # FAISS holds bare pointers to them
        self.knobs = _knobs(self.info)

    def set_effort(self, **knobs: int) -> None:
        self.settings = _settings(self.info, knobs)
        self.parameters = self._parameters(_K)
        self.parts[4].implem = _BEST_FIRST

    def search(self, query: Array, k: int) -> Any:
        return Answer(self.index.search(query[np.newaxis], k, params=self.parameters)[1][0], self._numbered)

    def search_batch(self, queries: Array, k: int) -> Any:
        self.parts[4].implem = 0
        rows = self.index.search(queries, k, params=self.parameters)[1]
        self.parts[4].implem = _BEST_FIRST
        return [Answer(each, self._numbered) for each in rows]

    def _parameters(self, k: int) -> Any:
        faiss, settings = self.faiss, self.settings
        graph = isinstance(faiss.downcast_index(self.parts[2].quantizer), faiss.IndexHNSW)
        effort = max(settings.ef_search, settings.nprobe)
        coarse = faiss.SearchParametersHNSW(efSearch=effort) if graph else None
        visits = faiss.SearchParametersIVF(nprobe=settings.nprobe, quantizer_params=coarse)
        ranks = faiss.IndexRefineSearchParameters(k_factor=settings.rerank / k, base_index_params=visits)
        return faiss.SearchParametersPreTransform(index_params=ranks)

    def _numbered(self, rows: Array) -> Array:
        if self.numbers is None:
            self.numbers = self.names.numbering(self.info.rows)
        return np.where(rows < 0, rows, self.numbers[rows])


class Reduction:
    """What a peer that is given reduced vectors leaves to its user: one query into the space of the index `index`."""

    def __init__(self) -> None:
        self.knobs: dict[str, Sequence[int]] = {}
        self.manifest = importlib.import_module("serving.manifest")
        self.quantizer = importlib.import_module("serving.quantizer").Quantizer
        self.faiss = importlib.import_module("faiss")

    def build(self, vectors: Array, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def save(self, folder: Path) -> None:
        pass

    def load(self, folder: Path, count: int, width: int, options: Mapping[str, Any]) -> None:
        info = self.manifest.load_index_manifest(options["index"])
        quantizer = self.quantizer(info.trained.read(str(Path(options["index"], "versions", info.version))))
        [linear] = [step for step in quantizer.chain if isinstance(step, self.faiss.LinearTransform)]
        self.matrix = self.faiss.vector_to_array(linear.A).reshape(linear.d_out, linear.d_in)
        self.bias = self.faiss.vector_to_array(linear.b) if linear.have_bias else np.zeros(linear.d_out, np.float32)

    def set_effort(self, **knobs: int) -> None:
        pass

    def search(self, query: Array, k: int) -> Any:
        reduced = self.matrix @ (query / np.sqrt(query @ query)) + self.bias
        return reduced / np.sqrt(reduced @ reduced)

    def search_batch(self, queries: Array, k: int) -> Any:
        reduced = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ self.matrix.T + self.bias
        return reduced / np.linalg.norm(reduced, axis=1, keepdims=True)


def _knobs(info: Any) -> dict[str, Sequence[int]]:
    lists = (1, info.parameters["nlist"])
    if info.search.rerank_raw:
        return {"nprobe": lists, "rerank": _RERANKS_BEFORE, "rerank_raw": _RERANKS_RAW}
    return {"nprobe": lists, "rerank": _RERANKS}


def _settings(info: Any, knobs: Mapping[str, int]) -> Any:
    """Return settings like the index's own; a graph of centroids is searched as far beyond the lists to visit."""
    beyond = info.search.ef_search / info.search.nprobe
    return dataclasses.replace(info.search, **knobs, ef_search=round(knobs["nprobe"] * beyond))


def recall(self: worker.Worker, queries: str, truths: Sequence[str], k: int = 10) -> worker.Answer:
    """Say what share of each truth, int64 [Q, k] or wider, is found as the effort is set."""
    found = [np.asarray(ids) for ids in self._library.search_batch(np.load(queries), k)]
    rights = [np.load(truth)[:, :k] for truth in truths]
    shared = [sum(len(np.intersect1d(*pair)) for pair in zip(found, right, strict=True)) for right in rights]
    return {"recalls": [share / right.size for share, right in zip(shared, rights, strict=True)]}


if __name__ == "__main__":
    LIBRARIES |= {"ours": Ours, "bare": Bare, "reduction": Reduction}
    worker._COMMANDS = (*worker._COMMANDS, "recall")  # type: ignore[assignment]
    setattr(worker.Worker, "recall", recall)  # noqa: B010 (a class has no such attribute, says mypy)
    worker.main()
