# ruff: noqa: ARG002, D102 (the protocol says what the methods are, and asks more than some need)
"""The peers by name: how each is built, saved, opened, asked, and made to try harder."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.graphs import Hnswlib, Svs, Usearch, Voyager
from benchmarks.peers.protocol import Array, Library


class Faiss:
    """Exact search."""

    def __init__(self) -> None:
        self.knobs: dict[str, Sequence[int]] = {}
        self.faiss = importlib.import_module("faiss")
        self.index: Any = None

    def build(self, vectors: Array, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        self.faiss.omp_set_num_threads(threads)
        self.index = self.faiss.IndexFlatIP(vectors.shape[1])
        self.index.add(vectors)
        return {}

    def save(self, folder: Path) -> None:
        self.faiss.write_index(self.index, str(folder / "index"))

    def load(self, folder: Path, count: int, width: int, options: Mapping[str, Any]) -> None:
        self.faiss.omp_set_num_threads(1)
        self.index = self.faiss.read_index(str(folder / "index"))

    def set_effort(self, **knobs: int) -> None:
        pass

    def search(self, query: Array, k: int) -> Any:
        return self.index.search(query[None], k)[1][0]

    def search_batch(self, queries: Array, k: int) -> Array:
        return self.index.search(queries, k)[1]


class Autofaiss(Faiss):
    """What autofaiss chooses for `memory` and `milliseconds` a query; FAISS alone opens and searches it."""

    coarse = False

    def build(self, vectors: Array, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        self.index, chosen = importlib.import_module("autofaiss").build_index(
            np.asarray(vectors),
            save_on_disk=False,
            metric_type="ip",
            nb_cores=threads,
            max_index_memory_usage=options.get("memory", "4G"),
            current_memory_available=options.get("available", "8G"),
            max_index_query_time_ms=options.get("milliseconds", 10.0),
            index_key=options.get("key"),
            verbose=40,
        )
        return {"chosen": chosen["index_key"], "its_setting": chosen["index_param"]}

    def load(self, folder: Path, count: int, width: int, options: Mapping[str, Any]) -> None:
        super().load(folder, count, width, options)
        space = self.faiss.ParameterSpace()
        space.initialize(self.index)
        ranges = space.parameter_ranges
        found = {ranges.at(number).name: ranges.at(number) for number in range(ranges.size())}
        for name in ("nprobe", "efSearch"):
            if name in found:
                # The lists of an IVF index are as many as its largest nprobe; the search in a graph has no such end.
                lists = self.faiss.extract_index_ivf(self.index).nlist if name == "nprobe" else min(count, 8192)
                self.knobs = {name: (1, lists)}
                self.coarse = name == "nprobe" and "quantizer_efSearch" in found
                return

    def set_effort(self, **knobs: int) -> None:
        space = self.faiss.ParameterSpace()
        for name, value in knobs.items():
            space.set_index_parameter(self.index, name, value)
            if self.coarse:  # as autofaiss itself sets it
                space.set_index_parameter(self.index, "quantizer_efSearch", 2 * value)


class Annoy:
    """A forest, mapped from its file; it has no search in batches."""

    def __init__(self) -> None:
        self.knobs: dict[str, Sequence[int]] = {}
        self.annoy = importlib.import_module("annoy")
        self.index: Any = None
        self.search_k = -1

    def build(self, vectors: Array, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        self.index = self.annoy.AnnoyIndex(vectors.shape[1], "angular")
        self.index.set_seed(1)
        for number, vector in enumerate(vectors):
            self.index.add_item(number, vector)
        self.index.build(options.get("trees", 100), n_jobs=threads)
        return {}

    def save(self, folder: Path) -> None:
        self.index.save(str(folder / "index"))

    def load(self, folder: Path, count: int, width: int, options: Mapping[str, Any]) -> None:
        self.index = self.annoy.AnnoyIndex(width, "angular")
        self.index.load(str(folder / "index"))
        self.knobs = {"search_k": (100, count * 2)}

    def set_effort(self, **knobs: int) -> None:
        self.search_k = knobs["search_k"]

    def search(self, query: Array, k: int) -> Any:
        return self.index.get_nns_by_vector(query, k, self.search_k)

    def search_batch(self, queries: Array, k: int) -> Array:
        return np.array([(self.search(query, k) + [-1] * k)[:k] for query in queries])


class Scann:
    """Lists of 4-bit codes, ranked again by the vectors themselves."""

    def __init__(self) -> None:
        self.knobs: dict[str, Sequence[int]] = {}
        self.scann = importlib.import_module("scann.scann_ops.py.scann_ops_pybind")
        self.index: Any = None
        self.leaves = self.reorder = -1

    def build(self, vectors: Array, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        leaves = options.get("leaves") or max(1, round(len(vectors) ** 0.5))
        builder = self.scann.builder(np.asarray(vectors), 10, "dot_product").set_n_training_threads(threads)
        builder.tree(num_leaves=leaves, num_leaves_to_search=1, training_sample_size=min(len(vectors), 250_000))
        builder.score_ah(options.get("block", 2), anisotropic_quantization_threshold=0.2)
        self.index = builder.reorder(100).build()
        return {"leaves": leaves}

    def save(self, folder: Path) -> None:
        self.index.serialize(str(folder), relative_path=False)

    def load(self, folder: Path, count: int, width: int, options: Mapping[str, Any]) -> None:
        self.index = self.scann.load_searcher(str(folder))
        self.knobs = {
            "leaves_to_search": (1, options.get("leaves") or max(1, round(count**0.5))),
            "reorder": (30, 60, 100, 200, 400),
        }

    def set_effort(self, **knobs: int) -> None:
        self.leaves, self.reorder = knobs["leaves_to_search"], knobs["reorder"]

    def search(self, query: Array, k: int) -> Any:
        return self.index.search(query, k, self.reorder, self.leaves)[0]

    def search_batch(self, queries: Array, k: int) -> Array:
        return self.index.search_batched(queries, k, self.reorder, self.leaves)[0]


LIBRARIES: dict[str, type[Library]] = {
    "faiss": Faiss,
    "hnswlib": Hnswlib,
    "usearch": Usearch,
    "voyager": Voyager,
    "annoy": Annoy,
    "autofaiss": Autofaiss,
    "scann": Scann,
    "svs": Svs,
}
