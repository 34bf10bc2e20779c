"""Vectors at scale that behave as embeddings of photos do: written to a file, and described beside the real ones.

    python -m benchmarks.vectors --count 1000000 --out vectors.npy

Seeds are the embeddings of the photos in `LOOKALIKE_PHOTOS` by the network in `LOOKALIKE_WEIGHTS`; without both, a
stand-in drawn from a fixed seed, which the output says. A generated vector lies among a seed's nearest neighbours:
a convex mixture of some of them, moved along their differences, rectified and scaled to length one. Tables of
independent draws would not do: neighbours in 1,280 independent dimensions are all about equally far, and what an
index is worth shows in how near the near ones are.
"""

import argparse
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from benchmarks.weights import weights_of
from jobs.console import table

Vectors = npt.NDArray[np.float32]

STAND_IN = "stand-in, not photos"
_PICTURES = (".jpg", ".jpeg", ".png")
_CHUNK = 8192
_K = 20
"""Neighbours that the intrinsic dimension is estimated from."""
_SMALL = 128
"""Dimensions of the space that an index searches by default."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """What vectors are like, for comparing generated with real ones of the same number: distances depend on it."""

    intrinsic: float
    intrinsic_small: float
    """In the space of the first 128 principal components, where rows are scaled to length one again."""
    first: float
    """Median distance to the nearest neighbour."""
    tenth: float
    zeros: float
    variance: float
    """Over all dimensions together."""


@dataclass(frozen=True, slots=True)
class Process:
    """How vectors are drawn. Chosen so that generated ones are like 1,485 photos' under MobileNetV2; see `Likeness`."""

    near: int = 12
    """Neighbours of a seed that take part, besides the seed itself."""
    mix: int = 4
    """How many of those are mixed."""
    noise: float = 1.6
    """How far a vector is moved along the differences of the neighbours."""


def generate(seeds: Vectors, count: int, out: Path, seed: int = 0, process: Process | None = None) -> None:
    """Write `count` rows of length one to the .npy file `out`, float32, a chunk in memory at a time.

    The same seeds, count and `seed` give the same rows.
    """
    process, seeds = process or Process(), unit(seeds)
    around = _neighbours(seeds, min(process.near, len(seeds) - 1))[1]
    with write_rows(out, count, seeds.shape[1]) as write:
        for start in range(0, count, _CHUNK):
            random = np.random.default_rng([seed, start])
            chosen = around[random.integers(len(seeds), size=min(_CHUNK, count - start))]
            weights = np.zeros((len(chosen), len(seeds)), np.float32)
            np.put_along_axis(weights, chosen, _weights(random, len(chosen), chosen.shape[1], process), axis=1)
            write(unit(np.maximum(weights @ seeds, 0)))


@contextlib.contextmanager
def write_rows(out: Path, count: int, dim: int) -> Iterator[Callable[[Vectors], None]]:
    """Give a function that appends rows to a .npy file, which appears when all are written.

    Not through a map, whose pages would count as this process's memory.
    """
    partial = out.with_suffix(".partial")
    with partial.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
        np.lib.format.write_array_header_1_0(file, header)
        yield lambda rows: rows.astype("<f4", order="C", copy=False).tofile(file)
    partial.replace(out)


def read_rows(source: Path, rows: int = _CHUNK) -> Iterator[tuple[int, Vectors]]:
    """Yield a .npy file in pieces of `rows`, each with the number of its first row, mapped anew so that it can go."""
    for start in range(0, len(np.load(source, mmap_mode="r")), rows):
        yield start, np.load(source, mmap_mode="r")[start : start + rows]


def _weights(random: np.random.Generator, rows: int, width: int, process: Process) -> Vectors:
    """Draw each row's weights of its neighbours: they add up to one, for differences add nothing."""
    parts = random.standard_exponential((rows, min(process.mix, width)), np.float32)
    parts /= parts.sum(axis=1, keepdims=True)  # uniform over the simplex, as Dirichlet(1) is
    places = random.random((rows, width)).argpartition(parts.shape[1] - 1, axis=1)[:, : parts.shape[1]]
    moved = random.standard_normal((rows, width), np.float32) * np.float32(process.noise / max(1, width - 1) ** 0.5)
    moved -= moved.mean(axis=1, keepdims=True)
    mixed = np.zeros((rows, width), np.float32)
    np.put_along_axis(mixed, places, parts, axis=1)
    return mixed + moved


def describe(vectors: npt.NDArray[Any]) -> Likeness:
    """Describe a few thousand vectors as they lie to each other."""
    rows = unit(np.asarray(vectors, np.float32))
    distances = _neighbours(rows, _K)[0]
    return Likeness(
        intrinsic=intrinsic_dimension(rows),
        intrinsic_small=intrinsic_dimension(_principal(rows)),
        first=float(np.median(distances[:, 0])),
        tenth=float(np.median(distances[:, 9])),
        zeros=float((rows == 0).mean()),
        variance=float(rows.var(axis=0, dtype=np.float64).sum()),
    )


def intrinsic_dimension(vectors: Vectors, k: int = _K) -> float:
    """Estimate by maximum likelihood on how many dimensions the vectors spread.

    Levina and Bickel (2004), with the rows' inverse estimates averaged as MacKay and Ghahramani propose.
    """
    distances = _neighbours(vectors, k)[0]
    inverse = np.log(distances[:, -1:] / distances[:, :-1]).mean(axis=1)
    return float(1 / inverse.mean())


def _neighbours(rows: Vectors, k: int) -> tuple[Vectors, npt.NDArray[np.int64]]:
    """Return each row's distances to its `k` nearest others, nearest first, and the numbers of itself and them."""
    squares, found = faiss.knn(rows, rows, k + 1)
    return np.sqrt(np.maximum(squares[:, 1:], 1e-12)), found  # copies lie at no distance, which has no logarithm


def _principal(rows: Vectors) -> Vectors:
    centred = rows - rows.mean(axis=0)
    directions = np.linalg.eigh(centred.T @ centred)[1][:, -min(_SMALL, *rows.shape) :]
    return unit(np.ascontiguousarray(centred @ directions))


def unit(rows: npt.NDArray[Any]) -> Vectors:
    """Scale rows to length one; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def find_seeds(cache: Path) -> tuple[Vectors, str]:
    """Return vectors to start from and what they are; the photos' are kept in the folder `cache`."""
    photos, weights = os.environ.get("LOOKALIKE_PHOTOS"), weights_of("mobilenet_v2")
    if not photos or weights == "untrained":
        return stand_in(), STAND_IN
    kept = cache / "photos.npy"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.save(kept, embed(Path(photos), Path(weights), cache))
    return np.load(kept), "photos"


def embed(photos: Path, weights: Path, cache: Path) -> Vectors:
    """Embed all pictures below a folder that can be decoded, in the order of their paths."""
    from jobs import backbones  # brings Keras, which whoever has the vectors already does without
    from serving.embedder import Embedder
    from serving.errors import ImageRejected

    embedder = Embedder.open(backbones.ensure_exported(str(cache / "embedders"), backbones.DEFAULT, str(weights)))
    found = []
    for path in sorted(photos.rglob("*")):
        if path.suffix.lower() in _PICTURES:
            try:
                found.append(embedder.embed_images([path.read_bytes()])[0])
            except ImageRejected:
                continue
    if not found:
        raise SystemExit(f"{photos} holds no picture that can be decoded; name another folder in LOOKALIKE_PHOTOS")
    return np.stack(found)


def stand_in(count: int = 1500, dim: int = 1280, seed: int = 2004) -> Vectors:
    """Draw vectors from clusters with a decaying spectrum, rectified: seeds where there are no photos.

    They have the shape of embeddings, not the statistics: results on them are about the code, not about photos.
    """
    random = np.random.default_rng(seed)
    spectrum = np.arange(1, dim + 1) ** -0.6
    axes = np.linalg.qr(random.standard_normal((dim, dim)))[0]
    centres = random.standard_normal((30, dim)) * spectrum
    spread = 1.5 * random.standard_normal((count, dim)) * spectrum
    drawn = (centres[random.integers(len(centres), size=count)] + spread) @ axes.T
    return unit(np.maximum(drawn + 0.4 * drawn.std(), 0))


def compare(seeds: Vectors, generated: Vectors) -> list[tuple[object, ...]]:
    """Return rows of what is compared, the seeds' figure and that of generated vectors, as many as there are seeds."""
    names = {
        "intrinsic": "intrinsic dimension",
        "intrinsic_small": f"intrinsic dimension, PCA to {_SMALL}",
        "first": "distance to the nearest",
        "tenth": "distance to the 10th",
        "zeros": "share of zeros",
        "variance": "total variance",
    }
    pair = [dataclasses.asdict(describe(rows)) for rows in (seeds, generated)]
    return [(name, *(round(figures[key], 3) for figures in pair)) for key, name in names.items()]


def main() -> None:
    """Write the vectors and print what they are like."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, required=True, help="vectors to generate")
    parser.add_argument("--out", type=Path, required=True, help="the .npy file to write; the photos' lie beside it")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other vectors, such as queries")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    seeds, source = find_seeds(options.out.parent)
    started = time.monotonic()
    generate(seeds, options.count, options.out, options.seed)
    seconds = time.monotonic() - started
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores; {options.count:,} vectors in {seconds:.1f} s")
    likeness = compare(seeds, np.load(options.out, mmap_mode="r")[: len(seeds)])
    print(table(likeness, [f"{len(seeds):,} vectors of each", source, "generated"]))


if __name__ == "__main__":
    main()
