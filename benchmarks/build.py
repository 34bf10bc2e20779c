"""Building an index, ours against autofaiss at equal bytes a vector and equal recall; and merging ever more partials.

    python -m benchmarks.build --vectors 200000 --work bench/

*Build*: ours is `pipelines.index` over an embedding store, as `lookalike index --target-recall` runs it; autofaiss gets
the same vectors, float32, as a .npy file in a folder, the same bytes a vector, and FAISS's key for codes that long,
made by autofaiss's own rules; `--key auto` leaves the key to it, under the same limit. Each is a process of its own on
the same cores, watched from outside. Then both are asked in turn, on one thread: ours with the least effort that
reaches `--target` in its own space, autofaiss with the least that comes as near to the raw order as ours does.

*Merge*: 4, 16 and 64 partials become shards of 4 partials each.

Options of Beam may follow, for ours: `--direct_num_workers=2 --direct_running_mode=multi_processing`.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np

from benchmarks import merges, stores, vectors
from benchmarks.builders import ITS, OURS, Built, build_its, build_ours, folder_of, key_of
from benchmarks.collection import Collection, Space, save
from benchmarks.lookup import setting_of
from benchmarks.peers.environments import PeerFailed
from benchmarks.rounds import Asked, System, build, say
from jobs.console import table
from pipelines.runner import refuse_unknown
from serving.errors import UsageError

STAGES = ("system", "stage", "seconds", "vectors/s/core")
INDEXES = (
    *("system", "shape", "peak MiB", "bytes/vector", "resident", "setting"),
    *("recall@10 raw", "recall@10 reduced", "p50 µs"),
)
_PATIENCE = 12 * 3600
_ASKED = 500
"""Queries a round."""
_LEAST = 0.05
"""Seconds that say something of a rate."""


def search(collection: Collection, ours: Built, its: Built | None, target: float, rounds: int) -> None:
    """Bring ours to the target in its own space and the peer to our recall against raw; ask in turn, note what is."""
    raw, made = collection.raw, folder_of(collection, OURS) / "made"
    reduced = collection.reduced(made).truth
    own = System(OURS, "ours", made.parent, raw.vectors, raw.queries, reduced, {"index": str(made)})
    peer = replace(own, title=ITS, kind=ITS, folder=folder_of(collection, ITS), truth=raw.truth, params={})
    ours.absent = build(own, 1).absent  # it is built; this only tells the worker
    if ours.absent:
        raise SystemExit(ours.absent)
    with contextlib.ExitStack() as stack:
        asked = []
        for built, system in ((ours, own), (its, peer)):
            if built and not built.absent:
                say(f"tuning {built.title}")
                try:
                    worker = stack.enter_context(Asked(system))
                    reach(worker, built, system, raw.truth, target if built is ours else ours.found.recall)
                    asked.append((built, worker))
                except PeerFailed as error:
                    built.absent = str(error)
        for _ in range(rounds):
            for built, worker in asked:
                us = worker.ask({"do": "round", "queries": raw.queries, "count": _ASKED}, _PATIENCE)["us"]
                built.found.p50.append(statistics.median(us))
        for built, worker in asked:
            built.found.opened |= worker.ask({"do": "memory"})


def reach(worker: Asked, built: Built, system: System, raw_truth: Path, target: float) -> None:
    """Open an index and find the least effort that reaches the target, by the truth of its system."""
    found = built.found
    found.opened = worker.ask({"do": "open"}, _PATIENCE)
    command = {"do": "tune", "queries": system.queries, "truth": system.truth, "target": target}
    found.tuned = worker.ask(command, _PATIENCE)
    command = {"do": "recall", "queries": system.queries, "truths": [raw_truth, system.truth]}
    found.recall, own_space = worker.ask(command, _PATIENCE)["recalls"]
    built.reduced = own_space if system.truth != raw_truth else None


def stage_rows(built: Built, count: int, cores: int) -> list[tuple[object, ...]]:
    """Return rows of the first table; what is in no stage is starting, planning, publishing."""
    if built.absent:
        return [(built.title, "absent", None, None)]
    whole, measured = built.peak.seconds, built.stages.get("measure", 0.0)
    rows = {name: seconds for name, seconds in built.stages.items() if name != "measure"}
    rows["all else"] = whole - sum(built.stages.values())
    rows |= {"all but measuring": whole - measured, "measure": measured, "in all": whole}
    return [
        (built.title, name, round(seconds, 2), round(count / seconds / cores) if seconds >= _LEAST else None)
        for name, seconds in rows.items()
    ]


def index_row(built: Built, count: int) -> tuple[object, ...]:
    """Return a row of the second table."""
    if built.absent:
        return (built.title, "absent", *[None] * (len(INDEXES) - 2))
    found = built.found
    return (
        *(built.title, built.shape, round(built.peak.mib), built.bytes_a_vector),
        round(found.opened["resident_anonymous_bytes"] / count),
        setting_of(found.tuned),
        round(found.recall, 3),
        built.reduced if built.reduced is None else round(built.reduced, 3),
        round(statistics.median(found.p50)),
    )


def take(folder: Path, source: Path, count: int, queries: int) -> Collection:
    """Lay out the first rows of a .npy file, and as queries those that follow; what is there is not made again."""
    rows = np.load(source, mmap_mode="r")
    if len(rows) < count + queries:
        raise SystemExit(f"{source} has {len(rows):,} rows; {count:,} and {queries:,} queries are asked of it")
    here = folder / f"{source.stem}-{count}"
    space = Space.below(here / "raw")
    space.vectors.parent.mkdir(parents=True, exist_ok=True)
    if not space.vectors.exists():
        with vectors.write_rows(space.vectors, count, rows.shape[1]) as write:
            for start in range(0, count, 8192):
                write(vectors.unit(rows[start : min(start + 8192, count)]))
    if not space.queries.exists():
        save(space.queries, vectors.unit(rows[count : count + queries]))
    space.solve()
    if not (here / "store" / "CURRENT").exists():
        stores.write_store(here / "store", space.vectors)
    return Collection(here, source.name, [])


def build_lines(collection: Collection, options: argparse.Namespace, beam: Sequence[str]) -> list[str]:
    """Build with both, ask both, and lay out what was found."""
    count, width = options.vectors, collection.raw.width
    ours, its = build_ours(collection, options.target, beam), None
    if options.peer:
        equal = ours.bytes_a_vector or 0
        key = {None: key_of(equal, count, width), "auto": None}.get(options.key, options.key)
        its = build_its(collection, key, equal, options.cores, options.available)
    search(collection, ours, its, options.target, options.rounds)
    systems = [system for system in (ours, its) if system]
    stages = [row for system in systems for row in stage_rows(system, count, options.cores)]
    indexes = [index_row(system, count) for system in systems]
    why = [f"{system.title} is absent: {system.absent}" for system in systems if system.absent]
    return ["", "build:", table(stages, STAGES), "", table(indexes, INDEXES), *why]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--vectors", type=int, default=200_000, help="how many to index")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE.npy", help="take its rows, generate none")
    parser.add_argument("--target", type=float, default=0.95, help="recall@10 of ours in its own space")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="build with autofaiss too")
    parser.add_argument("--key", help="for autofaiss: FAISS's key of its index, or auto")
    parser.add_argument("--available", default="8G", help="memory that autofaiss is told it may build in")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="to build on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", nargs="+", choices=["build", "merge"], default=["build", "merge"])
    parser.add_argument("--work", type=Path, help="a folder where what was generated is kept")
    options, beam = parser.parse_known_args()
    try:
        refuse_unknown(beam, parser._option_string_actions)
    except UsageError as error:
        parser.error(str(error))
    if not 1 <= options.cores <= len(os.sched_getaffinity(0)):
        parser.error(f"--cores is {options.cores}; take 1 to {len(os.sched_getaffinity(0))}")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # children keep to them too
    faiss.omp_set_num_threads(options.cores)
    with tempfile.TemporaryDirectory(prefix="lookalike-") as temporary:
        folder, count = options.work or Path(temporary), options.vectors
        if options.source:
            collection = take(folder, options.source, count, options.queries)
        else:
            collection = Collection.make(folder, count, options.queries)
        print(
            f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {options.cores} of them used; {count:,} vectors of "
            f"{collection.raw.width} dimensions ({collection.source}), {options.queries:,} queries, "
            f"target {options.target}",
            flush=True,
        )
        if "build" in options.table:
            try:
                print("\n".join(build_lines(collection, options, beam)), flush=True)
            except PeerFailed as error:
                raise SystemExit(str(error)) from None
        if "merge" in options.table:
            rows = merges.merge_rows(collection.folder, collection.raw.vectors, rounds=options.rounds)
            print(f"\nmerge:\n{table(rows, merges.HEADERS)}\n{merges.growth(rows)}")


if __name__ == "__main__":
    main()
