"""What it costs to search among some labels only, from one image in a thousand to all of them.

    python -m benchmarks.filter --vectors 200000

Two kinds of labels over the same vectors: *scattered* ones say nothing of what is in the picture, *gathered* ones are
regions of the embedding space, as a photo's subject is; queries come from anywhere, so most are far from a gathered
label. Recall@10 is against exact search among the label's own vectors in the index's space. Single queries, one thread,
medians; beside them what preparing the label takes the first time.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from benchmarks import stores, vectors
from benchmarks.collection import Collection, Space
from benchmarks.names import number_of
from jobs.console import table
from pipelines.index import IndexRequest, run
from pipelines.runner import Runner
from serving import Index

SHARES = (0.001, 0.01, 0.1, 0.5)
K = 10
HEADERS = ("labels", "share", "rows", "recall@10", "p50 µs", "p99 µs", "prepared in ms")


def scattered(count: int, seed: int = 0) -> list[str]:
    """Label rows by chance: `scattered 0.001` and so on, `rest` for the others."""
    names = np.array([f"scattered {share:g}" for share in SHARES] + ["rest"])
    shares = [*SHARES, 1 - sum(SHARES)]
    labels: list[str] = names[np.random.default_rng(seed).choice(len(names), count, p=shares)].tolist()
    return labels


def gathered(space: Space, seed: int = 0) -> list[str]:
    """Label rows by how near they are to some row that stands for each label; the nearest ones are the label's."""
    held = np.load(space.vectors, mmap_mode="r")
    labels = np.full(len(held), "rest", object)
    for share, centre in zip(SHARES, np.random.default_rng(seed).choice(len(held), len(SHARES)), strict=True):
        closeness = np.concatenate([rows @ held[centre] for _, rows in vectors.read_rows(space.vectors)])
        closeness[labels != "rest"] = -np.inf
        labels[np.argsort(-closeness)[: round(share * len(held))]] = f"gathered {share:g}"
    named: list[str] = labels.tolist()
    return named


def measure(index: Index, queries: vectors.Vectors, label: str, truth: npt.NDArray[np.int64]) -> tuple[float, ...]:
    """Return recall, p50, p99 in microseconds, and milliseconds of the first search beyond those."""
    started = time.perf_counter()
    index.search(queries[0], K, labels={label})
    first, times, found = time.perf_counter() - started, [], []
    for query in queries:
        started = time.perf_counter()
        (hits,) = index.search(query, K, labels={label})
        times.append((time.perf_counter() - started) * 1e6)
        found.append({number_of(hit.uri) for hit in hits})
    shares = [len(hits.intersection(near.tolist())) / len(near) for hits, near in zip(found, truth, strict=True)]
    p50, p99 = np.percentile(times, [50, 99])
    return statistics.fmean(shares), float(p50), float(p99), max(0.0, first * 1e3 - p50 / 1e3)


def rows_of(collection: Collection, kind: str, labels: list[str], folder: Path) -> list[tuple[object, ...]]:
    """Build an index of labelled vectors and measure each label; then all together."""
    store = folder / f"store-{kind}"
    stores.write_store(store, collection.raw.vectors, labels)
    run(IndexRequest(str(store), str(folder / kind), target_recall=0.95), Runner())
    index, space = Index.open(str(folder / kind)), collection.reduced(folder / kind)
    queries, reduced = np.load(collection.raw.queries), np.load(space.queries)
    held, of = np.load(space.vectors), np.array(labels)
    lines = []
    for share in SHARES:
        own = np.flatnonzero(of == f"{kind} {share:g}")
        _, near = faiss.knn(reduced, held[own], min(K, len(own)), faiss.METRIC_INNER_PRODUCT)
        found, p50, p99, prepared = measure(index, queries, f"{kind} {share:g}", own[near])
        lines.append((kind, f"{share:.1%}", len(own), round(found, 3), round(p50), round(p99), round(prepared, 1)))
    return lines


def unfiltered(index: Index, queries: vectors.Vectors) -> tuple[float, float]:
    """Return p50 and p99 in microseconds of searching among all."""
    times = []
    for query in queries:
        started = time.perf_counter()
        index.search(query, K)
        times.append((time.perf_counter() - started) * 1e6)
    p50, p99 = np.percentile(times, [50, 99])
    return float(p50), float(p99)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--work", type=Path, help="a folder whose generated vectors are kept and used again")
    options = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores; {options.vectors:,} vectors")
    with tempfile.TemporaryDirectory(prefix="lookalike-") as temporary:
        folder = Path(temporary)
        collection = Collection.make(options.work or folder, options.vectors, options.queries)
        rows = []
        for kind, labels in (("scattered", scattered(options.vectors)), ("gathered", gathered(collection.raw))):
            rows += rows_of(collection, kind, labels, folder)
        p50, p99 = unfiltered(Index.open(str(folder / "gathered")), np.load(collection.raw.queries))
        rows.append(("none", "100.0%", options.vectors, None, round(p50), round(p99), None))
    print(table(rows, HEADERS))


if __name__ == "__main__":
    main()
