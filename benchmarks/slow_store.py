"""Embedding images that come slowly: from an object store that takes 50 ms for each answer, beside the local disk.

    python -m benchmarks.slow_store --images 2000 --latency-ms 50

The store is a server on loopback, which takes its time from the cores that embed; no other network is between. Each
run is a process of its own; what is timed is the embed stage. The two take turns, and the order changes each round.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.object_store import BUCKET, ObjectStore, Tally, serving
from benchmarks.pictures import lay_out, source
from benchmarks.watching import ask
from benchmarks.weights import weights_of
from jobs import backbones
from jobs.console import table

HEADERS = (
    "round",
    "images from",
    "images/s",
    "of the disk's",
    "CPU ms an image",
    "ms a read",
    "requests an image",
    "at once",
    "CPU ms of the server",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One embed stage."""

    images_per_second: float
    cpu_ms: float
    """Of the process, for each image."""
    read_ms: float
    """From asking for an image to having it; reads overlap."""


@dataclass(frozen=True, slots=True)
class Round:
    """A run on each, and what the server counted."""

    disk: Run
    store: Run
    tally: Tally

    @property
    def ratio(self) -> float:
        """Return the store's throughput as a share of the disk's."""
        return self.store.images_per_second / self.disk.images_per_second


def embed(images: str, store: Path, artifact: str, count: int) -> Run:
    """Embed `count` images into a new store, in this process."""
    from benchmarks.stage import embed_once

    done = embed_once(images, count, store, artifact)
    return Run(count / done.seconds, 1000 * done.cpu_seconds / count, done.counters.get("embed/read_ms", 0) / count)


def compare(work: Path, count: int, latency_ms: float, rounds: int, artifact: str) -> list[Round]:
    """Embed the same images from both, in turns."""
    images = lay_out(work / "images", count)
    with serving(images, latency_ms) as server:
        return [_round(number, work, images, count, server, artifact) for number in range(rounds)]


def _round(number: int, work: Path, images: Path, count: int, server: ObjectStore, artifact: str) -> Round:
    runs: dict[str, Run] = {}
    for kind in ("disk", "store") if number % 2 == 0 else ("store", "disk"):
        uri = str(images) if kind == "disk" else f"gs://{BUCKET}"
        name = f"{kind}-{number}"
        runs[kind] = Run(
            **ask("benchmarks.slow_store", work / f"{name}.log", server.url, uri, work / name, artifact, count)[1]
        )
    return Round(runs["disk"], runs["store"], server.tally())


def rows(found: list[Round], count: int) -> list[tuple[object, ...]]:
    """Return two rows a round, under `HEADERS`."""
    lines: list[tuple[object, ...]] = []
    for number, one in enumerate(found, 1):
        told = one.tally
        asked = (round(told.downloads / count, 3), told.peak, round(1000 * told.cpu_seconds / count, 2))
        lines.append((number, "disk", *_figures(one.disk, 1), "", "", ""))
        lines.append((number, "store", *_figures(one.store, one.ratio), *asked))
    return lines


def _figures(run: Run, ratio: float) -> tuple[float, ...]:
    return round(run.images_per_second, 1), round(ratio, 3), round(run.cpu_ms, 2), round(run.read_ms, 1)


def _export(work: Path) -> tuple[str, str]:
    """Return the URI of the network's artifact and what its weights are."""
    weights = weights_of(backbones.DEFAULT)
    artifact = backbones.ensure_exported(str(work / "embedders"), backbones.DEFAULT, weights)
    return artifact, "random" if weights == "untrained" else "trained"


def main() -> None:
    """Print the table; or, as a child, embed once and write the figures."""
    if "--child" in sys.argv:
        _embed_once()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="how many to embed in each run")
    parser.add_argument("--latency-ms", type=float, default=50, help="how long each answer of the store waits")
    parser.add_argument("--rounds", type=int, default=3, help="how often each has its turn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lookalike-") as name:
        artifact, weights = _export(Path(name))
        found = compare(Path(name), options.images, options.latency_ms, options.rounds, artifact)
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores; {options.images:,} {source()}, {weights} weights, "
        f"{options.latency_ms:g} ms an answer"
    )
    print(table(rows(found, options.images), HEADERS))
    print(f"median ratio {statistics.median(one.ratio for one in found):.3f}")


def _embed_once() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", type=Path, required=True)
    parser.add_argument("url")
    parser.add_argument("images")
    parser.add_argument("store", type=Path)
    parser.add_argument("artifact")
    parser.add_argument("count", type=int)
    options = parser.parse_args()
    os.environ["STORAGE_EMULATOR_HOST"] = options.url
    done = embed(options.images, options.store, options.artifact, options.count)
    options.child.write_text(json.dumps(asdict(done)))


if __name__ == "__main__":
    main()
