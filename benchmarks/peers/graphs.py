# ruff: noqa: ARG002, D102 (the protocol says what the methods are, and asks more than some need)
"""The libraries whose index is a graph of neighbours."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Array


class Hnswlib:
    """A graph."""

    def __init__(self) -> None:
        self.knobs: dict[str, Sequence[int]] = {"ef": (10, 8192)}
        self.hnswlib = importlib.import_module("hnswlib")
        self.index: Any = None

    def build(self, vectors: Array, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        self.index = self.hnswlib.Index(space="ip", dim=vectors.shape[1])
        self.index.init_index(
            max_elements=len(vectors),
            M=options.get("degree", 16),
            ef_construction=options.get("effort", 200),
        )
        self.index.add_items(vectors, num_threads=threads)
        return {}

    def save(self, folder: Path) -> None:
        self.index.save_index(str(folder / "index"))

    def load(self, folder: Path, count: int, width: int, options: Mapping[str, Any]) -> None:
        self.index = self.hnswlib.Index(space="ip", dim=width)
        self.index.load_index(str(folder / "index"))
        self.index.set_num_threads(1)

    def set_effort(self, **knobs: int) -> None:
        self.index.set_ef(knobs["ef"])

    def search(self, query: Array, k: int) -> Any:
        return self.index.knn_query(query, k=k)[0][0]

    def search_batch(self, queries: Array, k: int) -> Array:
        return self.index.knn_query(queries, k=k)[0]


class Usearch:
    """A graph; `view` maps the file instead of reading it."""

    def __init__(self) -> None:
        self.knobs: dict[str, Sequence[int]] = {"expansion_search": (10, 8192)}
        self.index_class = importlib.import_module("usearch.index").Index
        self.index: Any = None

    def build(self, vectors: Array, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        self.index = self.index_class(
            ndim=vectors.shape[1],
            metric="ip",
            dtype=options.get("dtype", "f32"),
            connectivity=options.get("degree", 16),
            expansion_add=options.get("effort", 200),
        )
        self.index.add(np.arange(len(vectors)), vectors, threads=threads)
        return {}

    def save(self, folder: Path) -> None:
        self.index.save(str(folder / "index"))

    def load(self, folder: Path, count: int, width: int, options: Mapping[str, Any]) -> None:
        self.index = self.index_class.restore(str(folder / "index"), view=bool(options.get("view")))

    def set_effort(self, **knobs: int) -> None:
        self.index.expansion_search = knobs["expansion_search"]

    def search(self, query: Array, k: int) -> Any:
        return self.index.search(query, k, threads=1).keys

    def search_batch(self, queries: Array, k: int) -> Array:
        return self.index.search(queries, k, threads=1).keys


class Voyager:
    """A graph."""

    def __init__(self) -> None:
        self.knobs: dict[str, Sequence[int]] = {"query_ef": (10, 8192)}
        self.voyager = importlib.import_module("voyager")
        self.index: Any = None
        self.ef = 10

    def build(self, vectors: Array, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        self.index = self.voyager.Index(
            self.voyager.Space.Cosine,
            num_dimensions=vectors.shape[1],
            M=options.get("degree", 16),
            ef_construction=options.get("effort", 200),
            max_elements=len(vectors),
        )
        # A copy, for it takes no array that is read-only.
        self.index.add_items(np.array(vectors), num_threads=threads)
        return {}

    def save(self, folder: Path) -> None:
        self.index.save(str(folder / "index"))

    def load(self, folder: Path, count: int, width: int, options: Mapping[str, Any]) -> None:
        self.index = self.voyager.Index.load(str(folder / "index"))

    def set_effort(self, **knobs: int) -> None:
        self.ef = knobs["query_ef"]

    def search(self, query: Array, k: int) -> Any:
        return self.index.query(query, k, 1, self.ef)[0]

    def search_batch(self, queries: Array, k: int) -> Array:
        return self.index.query(queries, k, 1, self.ef)[0]


class Svs:
    """A Vamana graph over float32 or float16; its LVQ codes end the process on other processors than Intel's."""

    def __init__(self) -> None:
        self.knobs: dict[str, Sequence[int]] = {"search_window_size": (10, 8192)}
        self.svs = importlib.import_module("svs")
        self.index: Any = None

    def build(self, vectors: Array, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        parameters = self.svs.VamanaBuildParameters(
            graph_max_degree=options.get("degree", 32), window_size=options.get("effort", 200)
        )
        rows = np.asarray(vectors, options.get("dtype", "float32"))
        self.index = self.svs.Vamana.build(parameters, rows, self.svs.MIP, num_threads=threads)
        return {}

    def save(self, folder: Path) -> None:
        self.index.save(*(str(folder / part) for part in ("settings", "graph", "vectors")))

    def load(self, folder: Path, count: int, width: int, options: Mapping[str, Any]) -> None:
        kind = getattr(self.svs.DataType, options.get("dtype", "float32"))
        self.index = self.svs.Vamana(
            str(folder / "settings"),
            self.svs.GraphLoader(str(folder / "graph")),
            self.svs.VectorDataLoader(str(folder / "vectors"), kind),
            self.svs.MIP,
            num_threads=1,
        )

    def set_effort(self, **knobs: int) -> None:
        self.index.search_window_size = knobs["search_window_size"]

    def search(self, query: Array, k: int) -> Any:
        return self.index.search(query, k)[0][0]

    def search_batch(self, queries: Array, k: int) -> Array:
        return self.index.search(queries, k)[0]
