"""Peak memory of `lookalike embed` at two sizes of the collection, in each local mode.

    python -m benchmarks.memory --sizes 2000 20000

The images are a few hundred drawings under many names: memory is asked here, not variety. What is measured is the
proportional set size of the job and all its worker processes, looked at ten times a second.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.watching import Peak, watch
from jobs import backbones, drawings
from jobs.console import table

MODES: dict[str, Sequence[str]] = {
    "in process": (),
    "2 threads of workers": ("--direct_num_workers=2", "--direct_running_mode=multi_threading"),
    "2 worker processes": ("--direct_num_workers=2", "--direct_running_mode=multi_processing"),
}
_DISTINCT = 240


def collection(folder: Path, count: int) -> Path:
    """Lay out `count` images: drawings, linked under as many names as it takes."""
    drawn = list(drawings.write_collection(folder / "drawn", min(count, _DISTINCT)))
    images = folder / f"images-{count}"
    images.mkdir()
    for number in range(count):
        source = drawn[number % len(drawn)]
        os.link(source, images / f"{number:06}{source.suffix}")
    return images


def peak(images: Path, store: Path, artifact: str, arguments: Sequence[str]) -> Peak:
    """Embed a folder in a process of its own and watch its memory."""
    command = [sys.executable, "-m", "jobs.embed", "--images", str(images), "--store", str(store)]
    try:
        return watch([*command, "--embedder", artifact, *arguments], stdout=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"the job ended with {error.returncode}") from None


def compare(sizes: Sequence[int], modes: Sequence[str] = tuple(MODES)) -> list[tuple[object, ...]]:
    """Measure all sizes in all modes; rows of mode, images, MiB, ratio to the smallest size, images/s."""
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(prefix="lookalike-") as name:
        folder = Path(name)
        artifact = backbones.ensure_exported(str(folder / "embedders"), backbones.DEFAULT, "untrained")
        images = {size: collection(folder / f"{size}", size) for size in sizes}
        for mode in modes:
            first = None
            for size in sizes:
                store = folder / f"store-{mode.replace(' ', '-')}-{size}"
                found = peak(images[size], store, artifact, MODES[mode])
                first = first or found.mib
                rows.append((mode, size, round(found.mib), round(found.mib / first, 2), round(size / found.seconds)))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 20_000], help="images, the smallest first")
    options = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores")
    print(table(compare(options.sizes), ["mode", "images", "peak MiB", "ratio", "images/s, start-up included"]))


if __name__ == "__main__":
    main()
