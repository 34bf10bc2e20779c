"""Embedding images: ours beside Keras, Beam's RunInference, and the limit of its own parts.

    python -m benchmarks.embed --rounds 3

The limit is cores ÷ (CPU seconds of decoding + of inference an image), each timed alone on one thread: what a pipeline
that spent nothing on anything else would reach; `on all cores at once` is the same while all cores do it, and share
caches and memory. Rounds go round all systems, each a process of its own whose start is not counted; figures are
medians over the rounds, ratios medians of the rounds' ratios. Ours is timed from the graph's start to its end, loading
the network included; `the whole job` adds listing, planning and committing. Pictures are the labelled photos where
LOOKALIKE_PHOTOS names them, else drawings; the weights of MobileNetV2 come from LOOKALIKE_WEIGHTS where that is set,
those of VGG16 are random, which costs the same.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.embedders import export
from benchmarks.pictures import lay_out, source
from benchmarks.watching import ask
from benchmarks.weights import weights_of
from jobs.console import table

PROCESSES = ("--direct_num_workers=0", "--direct_running_mode=multi_processing")
STEPS = ("wait", "decode", "infer", "write")
HEADERS = ("system", "images/s", "per core", "× Keras, single", "of the limit", "peak MiB", *(f"{s} %" for s in STEPS))
_MORE = {"ours": ("whole", "  the whole job"), "parts": ("together", "  its parts on all cores at once")}
"""A second line of a row: the figure's name and its title."""


@dataclass(slots=True)
class System:
    """One row: how it is started, on how many pictures, and what every round gave."""

    title: str
    kind: str
    images: int
    engine: str = "litert"
    beam: tuple[str, ...] = ()
    rounds: list[dict[str, float]] = field(default_factory=list)
    peak: float = 0.0


def systems(backbone: str, images: int) -> list[System]:
    """Return what is set side by side for a backbone, on `images` pictures; the slow ones get fewer."""
    few, some = max(16, images // 80), max(32, images // 16)
    rows = [
        System("Keras predict, picture by picture", "keras_single", few),
        System("Keras predict, batches of 32", "keras_batches", some),
        System("Beam RunInference", "run_inference", some),
    ]
    engines = ("litert", "tensorflow") if backbone.startswith("vgg") else ("litert",)
    for engine in engines:
        what = "" if len(engines) == 1 else f", {engine}"
        rows += [
            System(f"lookalike{what}", "ours", images, engine),
            System(f"lookalike, worker processes{what}", "ours", images, engine, PROCESSES),
            System(f"the limit{what}", "parts", some, engine),
        ]
    return rows


def measure(backbone: str, weights: str, images: int, rounds: int, work: Path) -> list[System]:
    """Run all systems in turn."""
    rows = systems(backbone, images)
    folders = {count: lay_out(work / f"images-{backbone}-{count}", count) for count in {row.images for row in rows}}
    for engine in {row.engine for row in rows}:
        export(work, backbone, weights, engine)
    for number in range(rounds):
        for row in rows:
            log = work / f"{backbone}-{row.kind}-{number}.log"
            where = (folders[row.images], work)
            peak, figures = ask("benchmarks.embedders", log, row.kind, backbone, weights, row.engine, *where, *row.beam)
            row.rounds.append(figures)
            row.peak = max(row.peak, peak.mib)
    return rows


def lines(rows: list[System]) -> list[tuple[object, ...]]:
    """Lay the rounds out in rows of the table."""
    slowest = rows[0]
    laid = []
    for row in rows:
        limit = next(other for other in rows if other.kind == "parts" and other.engine == row.engine)
        rate = median(row, "images_per_second")
        laid.append(
            (
                row.title,
                round(rate, 1),
                round(rate / cores(), 1),
                round(against(row, slowest), 1),
                round(against(row, limit), 2),
                None if row.kind == "parts" else round(row.peak),
                *shares(row),
            )
        )
        if row.kind in _MORE:
            key, title = _MORE[row.kind]
            rate = median(row, key)
            share = round(against(row, limit, key), 2)
            laid.append((title, round(rate, 1), round(rate / cores(), 1), None, share, *[None] * 5))
    return laid


def shares(row: System) -> list[int | None]:
    """Return the percentage of its threads' time that went to each step; the limit knows two of them."""
    spent = {step: sum(figures.get(step, 0.0) for figures in row.rounds) for step in STEPS}
    whole = sum(spent.values())
    return [round(100 * spent[step] / whole) if spent[step] else None for step in STEPS]


def against(row: System, other: System, key: str = "images_per_second") -> float:
    """Return the median over the rounds of how many times as fast a system was."""
    return statistics.median(
        mine[key] / its["images_per_second"] for mine, its in zip(row.rounds, other.rounds, strict=True)
    )


def median(row: System, key: str) -> float:
    """Return the median of a figure over the rounds."""
    return statistics.median(figures[key] for figures in row.rounds)


def cores() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Print a table for each backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8000, help="pictures for ours; 1 in 20 of them for VGG16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbones", nargs="+", default=["mobilenet_v2", "vgg16"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lookalike-") as name:
        print(f"{time.strftime('%Y-%m-%d')}, {cores()} cores; {source()}, {options.rounds} rounds")
        for backbone in options.backbones:
            images = max(32, options.images // 20) if backbone.startswith("vgg") else options.images
            rows = measure(backbone, weights_of(backbone), images, options.rounds, Path(name))
            print(f"\n{backbone}, {images:,} pictures:\n{table(lines(rows), HEADERS)}", flush=True)


if __name__ == "__main__":
    main()
