"""One index over several processes: each holds some of the shards, and their answers are merged.

For an index larger than one process should hold, or for more cores than one query can use. Every process searches its
own lists with the whole index's settings, so together they look at no fewer candidates than one process would.
"""

import multiprocessing
import os
from collections.abc import Collection, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from types import TracebackType
from typing import Any, Self

import faiss
import numpy as np
import numpy.typing as npt

from serving import storage
from serving.errors import LookalikeError, UsageError
from serving.index import Hit, Index
from serving.manifest import IndexManifest, SearchSettings, load_index_manifest


def merge_answers(answers: Sequence[Sequence[Sequence[Hit]]], k: int) -> list[list[Hit]]:
    """Merge the answers of several groups of shards to the same queries: of each query the best `k`, best first."""
    return [
        sorted((hit for hits in found for hit in hits), key=lambda hit: (-hit.score, hit.row))[:k]
        for found in zip(*answers, strict=True)
    ]


def share_out(rows: Sequence[int], groups: int) -> list[list[int]]:
    """Cut shards of so many `rows` into at most `groups` runs of neighbours with about as many rows each."""
    groups = max(1, min(groups, len(rows)))
    middles = np.cumsum(rows) - np.asarray(rows) / 2
    group_of = np.minimum(groups - 1, (middles * groups / max(1, sum(rows))).astype(int))
    runs = [np.flatnonzero(group_of == group).tolist() for group in range(groups)]
    return [run for run in runs if run]


class GatheredIndex:
    """An index whose shards are spread over processes of this machine. Use `GatheredIndex.open`, and close it."""

    def __init__(self, root: str, info: IndexManifest, processes: int, mode: str) -> None:
        if processes < 1:
            raise UsageError(f"processes is {processes}; take at least 1")
        self.info = info
        groups = share_out([shard.rows for shard in info.shards], processes)
        threads = max(1, (os.cpu_count() or 1) // len(groups))
        start = multiprocessing.get_context("spawn")  # a fork would share locks that some thread may hold
        self._workers = [ProcessPoolExecutor(1, start) for _ in groups]
        try:
            self._each([(_open, (root, info.version, group, mode, threads)) for group in groups])
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls, uri: str, processes: int, *, version: str | None = None, embedder: str | None = None, mode: str = "memory"
    ) -> Self:
        """Open the current (or named) version in so many processes; the options are those of `Index.open`.

        All processes open the version that is current now, whatever is published meanwhile.
        """
        root = storage.normalize(uri)
        info = load_index_manifest(root, version)
        Index.check_embedder(root, info, embedder)
        return cls(root, info, processes, mode)

    def search(
        self,
        vectors: npt.ArrayLike,
        k: int = 10,
        *,
        labels: Collection[str] | None = None,
        settings: SearchSettings | None = None,
    ) -> list[list[Hit]]:
        """Search as `Index.search` does."""
        wanted = None if labels is None else labels if isinstance(labels, str) else frozenset(labels)
        asked = (np.asarray(vectors), k, wanted, settings)
        return merge_answers(self._each([(_search, asked)] * len(self._workers)), k)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.shutdown(wait=True, cancel_futures=True)

    def __len__(self) -> int:
        return self.info.rows

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _each(self, tasks: Sequence[tuple[Any, tuple[Any, ...]]]) -> list[Any]:
        try:
            futures: list[Future[Any]] = [
                worker.submit(task, *arguments) for worker, (task, arguments) in zip(self._workers, tasks, strict=True)
            ]
            return [future.result() for future in futures]
        except BrokenExecutor:
            raise LookalikeError(
                f"a process that held shards of version {self.info.version} died, of too little memory perhaps; "
                "open the index again"
            ) from None


_held: Index
"""The shards of a worker process."""


def _open(root: str, version: str, shards: list[int], mode: str, threads: int) -> None:
    global _held
    faiss.omp_set_num_threads(threads)
    _held = Index.open(root, version=version, shards=shards, mode=mode)


def _search(
    vectors: npt.NDArray[Any], k: int, labels: Collection[str] | None, settings: SearchSettings | None
) -> list[list[Hit]]:
    return _held.search(vectors, k, labels=labels, settings=settings)
