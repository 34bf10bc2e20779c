"""What the look-up benchmark works on: generated vectors, queries, a store, reduced spaces, and the exact answers."""

import os
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from benchmarks import stores, vectors
from serving import storage
from serving.manifest import load_index_manifest
from serving.quantizer import Quantizer

K = 10
_ROWS = 65_536
"""Read at a time."""


@dataclass(frozen=True, slots=True)
class Space:
    """Vectors, queries that are not among them, and each query's exact neighbours; .npy files."""

    vectors: Path
    queries: Path
    truth: Path

    @classmethod
    def below(cls, folder: Path) -> "Space":
        """Name the files in a folder."""
        return cls(*(folder / f"{name}.npy" for name in ("vectors", "queries", "truth")))

    @property
    def width(self) -> int:
        """Return how long the vectors are."""
        return int(np.load(self.vectors, mmap_mode="r").shape[1])

    def solve(self) -> None:
        """Find the exact neighbours by inner product, in float32."""
        if not self.truth.exists():
            save(self.truth, exact(self.vectors, np.load(self.queries)))


@dataclass(frozen=True, slots=True)
class Collection:
    """Everything in a folder; what is there already is not made again."""

    folder: Path
    source: str
    """What the seeds are."""
    likeness: list[tuple[object, ...]]
    """Name, seeds' figure, generated vectors' figure."""

    @classmethod
    def make(cls, folder: Path, count: int, queries: int) -> "Collection":
        """Generate vectors and queries, find the queries' neighbours, and write the store."""
        seeds, source = vectors.find_seeds(folder / "seeds")
        here = folder / f"{source.partition(',')[0]}-{count}"
        space = Space.below(here / "raw")
        space.vectors.parent.mkdir(parents=True, exist_ok=True)
        for path, rows, seed in ((space.vectors, count, 0), (space.queries, queries, 1)):
            if not path.exists():
                vectors.generate(seeds, rows, path, seed)
        space.solve()
        if not (here / "store" / "CURRENT").exists():
            stores.write_store(here / "store", space.vectors)
        generated = np.load(space.vectors, mmap_mode="r")[: len(seeds)]
        return cls(here, source, vectors.compare(seeds, generated))

    @property
    def raw(self) -> Space:
        """Return the vectors as they are."""
        return Space.below(self.folder / "raw")

    @property
    def store(self) -> Path:
        """Return the embedding store of the vectors."""
        return self.folder / "store"

    def reduced(self, index: Path) -> Space:
        """Return the vectors as the index at `index` sees them."""
        info = load_index_manifest(str(index))
        quantizer = Quantizer(info.trained.read(storage.join(str(index), "versions", info.version)))
        space = Space.below(self.folder / f"reduced-{info.reduced_dim}-{quantizer.id}")
        space.vectors.parent.mkdir(exist_ok=True)
        for source, target in ((self.raw.vectors, space.vectors), (self.raw.queries, space.queries)):
            if not target.exists():
                count = len(np.load(source, mmap_mode="r"))
                with vectors.write_rows(target, count, quantizer.reduced_dim) as write:
                    for _, rows in vectors.read_rows(source):
                        write(quantizer.reduce(rows))
        space.solve()
        return space


def exact(source: Path, queries: vectors.Vectors, k: int = K) -> np.ndarray:
    """Return the `k` nearest rows of a .npy file by inner product, best first, int64 `[Q, k]`."""
    scores = np.full((len(queries), k), -np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    for start, rows in vectors.read_rows(source, _ROWS):
        near, places = faiss.knn(queries, rows, min(k, len(rows)), faiss.METRIC_INNER_PRODUCT)
        scores, found = np.hstack([scores, near]), np.hstack([found, places + start])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, found = np.take_along_axis(scores, best, 1), np.take_along_axis(found, best, 1)
    return found


def save(path: Path, array: np.ndarray) -> None:
    """Write a .npy file that appears when it is whole."""
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    os.replace(partial, path)
