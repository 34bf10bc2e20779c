"""One look-up, ours against other libraries, each at the setting that just reaches the target recall.

    python -m benchmarks.lookup --vectors 200000 --work bench/ --plot lookup.png

Two tables, like against like. *Reduced*: our index is asked with raw vectors and answers with uris; the others hold and
are asked with the same reduced vectors, our index's own, and the time of reducing a query (NumPy, float32) is added to
theirs. *Raw*: all hold what they keep of the raw vectors, and recall is against these. Searches run on one thread, each
system in a process of its own; single queries are asked in rounds that go round all systems that are open, and figures
are medians over the rounds. Bytes are resident: anonymous memory, and beside it the pages touched of mapped files.

With `--work`, what was generated, embedded and built is kept and used again; after a change to how indexes are built,
remove the folders `ours-*` in it.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss

from benchmarks import plots
from benchmarks.collection import Collection, Space
from benchmarks.peers.environments import REQUIREMENTS
from benchmarks.rounds import Measured, System, build, compare
from jobs.console import table

HEADERS = (
    *("system", "setting", "recall@10", "recall@10 raw", "p50 µs", "p99 µs", "batch/s"),
    *("build s", "bytes/vector", "mapped", "open s"),
)
_FEW, _MANY = ("hnswlib", "usearch"), 200_000
"""The peers that are asked about more vectors than that, unless others are named."""
_REDUCTION = "reducing a query"


def reduced(collection: Collection, peers: Sequence[str], target: float, rounds: int, threads: int) -> "Compared":
    """Compare in our index's space."""
    wide, narrow = (_ours(collection, f"{dim} dims", {"dim": dim}) for dim in (128, 64))
    for system in (wide, narrow):
        found = build(system, threads)
        if found.absent is not None:
            raise SystemExit(found.absent)
    space = collection.reduced(wide.folder / "index")
    wide = replace(wide, truth=space.truth)
    narrow = replace(narrow, truth=collection.reduced(narrow.folder / "index").truth)
    index = {"index": str(wide.folder.absolute() / "index")}

    def beside(title: str, kind: str, **params: str) -> System:
        folder = collection.folder / title.replace(" ", "-")
        return replace(wide, title=title, kind=kind, folder=folder, params=index | params, like=wide.title)

    bare, mapped = beside("bare FAISS", "bare"), beside("lookalike, mapped", "ours", mode="mmap")
    own = [wide, bare, narrow, mapped, beside(_REDUCTION, "reduction")]
    others = _peers(peers, space)
    results = compare(own, others, collection.raw.truth, target, rounds, threads)
    reduction = results.pop(_REDUCTION)
    if reduction.absent is not None:
        raise SystemExit(reduction.absent)
    for system in others:
        add_reduction(results[system.title], reduction)
    remarks = [f"{_REDUCTION}: {statistics.median(reduction.p50):.1f} µs, in the figures of the peers"]
    if results[bare.title].absent is None:
        times = ratio(results[wide.title], results[bare.title])
        remarks.append(f"{wide.title} / {bare.title}: {times:.2f} (goal: at most 1.15)")
    return Compared("reduced", results, remarks)


def raw(collection: Collection, peers: Sequence[str], target: float, rounds: int, threads: int) -> "Compared":
    """Compare by the raw vectors."""
    space = collection.raw
    own = _ours(collection, "for raw", {"recall_against": "raw", "target_recall": target})
    others = _peers(peers, space)
    return Compared("raw", compare([own], others, space.truth, target, rounds, threads), [])


@dataclass(frozen=True, slots=True)
class Compared:
    """One table: results by title, and what is said below it."""

    name: str
    results: dict[str, Measured]
    remarks: list[str]

    def lines(self, count: int) -> list[str]:
        """Lay it out."""
        rows = [row_of(title, found, count) for title, found in self.results.items()]
        why = [f"{title} is absent: {found.absent}" for title, found in self.results.items() if found.absent]
        return ["", f"{self.name}:", table(rows, HEADERS), *self.remarks, *why]

    def curves(self) -> dict[str, plots.Curve]:
        """Return microseconds and recall of what was tried, the best at each recall."""
        drawn = {title: front(found.tuned.get("curve", ())) for title, found in self.results.items()}
        return {title: curve for title, curve in drawn.items() if curve}


def _ours(collection: Collection, what: str, request: Mapping[str, Any]) -> System:
    folder, space = collection.folder / f"ours-{what.replace(' ', '-')}", collection.raw
    params = {
        "store": str(collection.store.absolute()),
        "building": str(folder.absolute() / "building"),
        "request": dict(request),
    }
    return System(f"lookalike, {what}", "ours", folder, space.vectors, space.queries, space.truth, params)


def _peers(names: Sequence[str], space: Space) -> list[System]:
    """Keep each peer beside the vectors it holds: an index trained anew has another space."""
    titles = {"faiss": "faiss, exact"}
    folder = space.vectors.parent
    return [
        System(titles.get(name, name), name, folder / name, space.vectors, space.queries, space.truth) for name in names
    ]


def add_reduction(found: Measured, reduction: Measured) -> None:
    """Add the time of reducing queries to what a system took that was given reduced ones."""
    more, rate = statistics.median(reduction.p50), statistics.median(reduction.batch)
    found.p50 = [us + more for us in found.p50]
    found.p99 = [us + more for us in found.p99]
    found.batch = [1 / (1 / own + 1 / rate) for own in found.batch]
    found.tuned["curve"] = [(setting, share, us + more) for setting, share, us in found.tuned.get("curve", ())]


def front(points: Sequence[tuple[Mapping[str, int], float, float]]) -> plots.Curve:
    """Return microseconds and recall of the settings that no other beats in both, the fastest first."""
    curve: plots.Curve = []
    for us, share in sorted((us, share) for _, share, us in points):
        if not curve or share > curve[-1][1]:
            curve.append((us, share))
    return curve


def setting_of(tuned: Mapping[str, Any]) -> str | None:
    """Write a setting for the table."""
    words = ", ".join(f"{name} {value}" for name, value in tuned["setting"].items())
    return words + ("" if tuned["reached"] else " (the best)") or None


def row_of(title: str, found: Measured, count: int) -> tuple[object, ...]:
    """Return a row of the table over `count` vectors."""
    if found.absent is not None:
        return (title, "absent", *[None] * (len(HEADERS) - 2))
    anonymous = found.opened["resident_anonymous_bytes"]
    mapped = found.opened["resident_bytes"] - anonymous
    seconds = found.built.get("build_seconds", 0.0)
    return (
        title,
        setting_of(found.tuned),
        *(round(share, 3) for share in (found.recall, found.recall_raw)),
        *(round(statistics.median(us)) for us in (found.p50, found.p99)),
        round(statistics.median(found.batch)),
        round(seconds, 1) if seconds > 0.1 else None,
        *(round(size / count) for size in (anonymous, mapped)),
        round(found.opened["open_seconds"], 3),
    )


def ratio(ours: Measured, other: Measured) -> float:
    """Return the median over rounds of how many times as long ours took."""
    return statistics.median(mine / its for mine, its in zip(ours.p50, other.p50, strict=False))


TABLES = {"reduced": reduced, "raw": raw}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=10_000, help="how many to search")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--target", type=float, default=0.95, help="recall@10 that each system is to reach")
    parser.add_argument("--peers", nargs="*", choices=[*REQUIREMENTS], help="all; above 200,000 vectors some")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", nargs="+", choices=[*TABLES], default=[*TABLES])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for building")
    parser.add_argument("--work", type=Path, help="a folder that is kept")
    parser.add_argument("--plot", type=Path, help="a .png file; each table's name is put before it where there are two")
    options = parser.parse_args()
    peers = options.peers if options.peers is not None else [*REQUIREMENTS] if options.vectors <= _MANY else _FEW
    faiss.omp_set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="lookalike-") as temporary:
        collection = Collection.make(options.work or Path(temporary), options.vectors, options.queries)
        print(
            f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores; {options.vectors:,} vectors of "
            f"{collection.raw.width} dimensions, {options.queries:,} queries, target {options.target}"
        )
        print(table(collection.likeness, ["the vectors", collection.source, "generated"]))
        for name in options.table:
            compared = TABLES[name](collection, peers, options.target, options.rounds, options.threads)
            print("\n".join(compared.lines(options.vectors)), flush=True)
            if options.plot:
                file = (
                    options.plot if len(options.table) == 1 else options.plot.with_name(f"{name}-{options.plot.name}")
                )
                plots.draw(compared.curves(), f"{options.vectors:,} vectors, {name}", options.target, file)


if __name__ == "__main__":
    main()
