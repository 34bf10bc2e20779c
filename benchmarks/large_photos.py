"""Embedding large photos: JPEG decoded at a reduced scale, as ours does, against decoding all of it.

    python -m benchmarks.large_photos --rounds 3

Photos of each size are mosaics of the labelled ones (of drawings without LOOKALIKE_PHOTOS) at their own scale, so
that every part is as detailed as a photo is. Each is decoded and embedded on one thread, both ways in turn; times are
medians over the rounds, cosines are between the two vectors of a photo.
"""

import argparse
import io
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks.embedders import export
from benchmarks.pictures import find_pictures, source
from benchmarks.weights import weights_of
from jobs import backbones
from jobs.console import table
from serving import images
from serving.embedder import Embedder

SIZES = ((700, 500), (1024, 768), (1920, 1080), (2560, 1920), (4000, 3000), (6000, 4000))
HEADERS = ("pixels", "MB a photo", "full decoding ms", "ours ms", "times as fast", "least cosine", "mean cosine")
_TILE = 400


def mosaics(tiles: list[Path], size: tuple[int, int], count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield JPEGs of `size` (width, height), put together from pictures cut to squares of 400 pixels."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        whole = Image.new("RGB", size)
        for top in range(0, size[1], _TILE):
            for left in range(0, size[0], _TILE):
                with Image.open(tiles[random.integers(len(tiles))]) as tile:
                    whole.paste(tile.convert("RGB").crop((0, 0, _TILE, _TILE)), (left, top))
        file = io.BytesIO()
        whole.save(file, "JPEG", quality=92)
        yield file.getvalue()


def embed(data: list[bytes], embedder: Embedder) -> tuple[float, np.ndarray]:
    """Return seconds a photo and unit vectors."""
    started = time.perf_counter()
    vectors = embedder.embed_images(data)
    seconds = (time.perf_counter() - started) / len(data)
    return seconds, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def compare(data: list[bytes], embedder: Embedder, rounds: int) -> tuple[object, ...]:
    """Embed photos both ways in turn; a row of the table without the size."""
    ours, full = [], []
    for _ in range(rounds):
        ours.append(embed(data, embedder))
        with mock.patch.object(images, "_COVER", 1e4):  # no JPEG has so many pixels
            full.append(embed(data, embedder))
    cosines = (ours[0][1] * full[0][1]).sum(axis=1)
    fast, slow = (statistics.median(seconds for seconds, _ in found) for found in (ours, full))
    ratio = statistics.median(its / mine for (mine, _), (its, _) in zip(ours, full, strict=True))
    least = math.floor(10_000 * float(cosines.min())) / 10_000  # never better than it is
    size = sum(map(len, data)) / len(data) / 1e6
    times = (round(1000 * slow, 1), round(1000 * fast, 1), round(ratio, 2))
    return (round(size, 2), *times, f"{least:.4f}", f"{cosines.mean():.4f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=16, help="of each size")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lookalike-") as name:
        work = Path(name)
        backbone = backbones.DEFAULT
        embedder = Embedder.open(export(work, backbone, weights_of(backbone), "litert"))
        tiles = find_pictures(work / "drawn", 240)
        rows = []
        for size in SIZES:
            data = list(mosaics(tiles, size, options.photos))
            rows.append(("{} x {}".format(*size), *compare(data, embedder, options.rounds)))
        print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, one thread; {source()}, {options.photos} of each")
        print(table(rows, HEADERS))


if __name__ == "__main__":
    main()
