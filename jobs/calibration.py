"""Int8: ranges of the network's numbers from a sample of the user's images, and what that costs and gains on others.

A store keeps its int8 embedder: calibrated anew, the network would be another one, and every image embedded again.
"""

import heapq
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs import backbones, console
from serving import storage
from serving.embedder import DESCRIPTION, Embedder, EmbedderDocument, EmbedderSpec, read_description, write_artifact
from serving.errors import ImageRejected, NotFound, StorageError, UsageError
from serving.images import Limits, load
from serving.litert import Pixels, Vectors
from serving.manifest import built_with, load_run_manifest, read_current
from transforms.schema import ImageRef, uri_hash

FLOAT32, INT8 = "float32", "int8"
PRECISIONS = (FLOAT32, INT8)

_SAMPLE = 400
"""Images: every other one is calibrated on, the rest measure what came of it."""
_LEAST = 40
_SPARE = 2
"""Images looked at for each that is wanted: some are bad."""
_READS = 16
_ROUND = 8
"""Images that an embedder gets before it is the next one's turn."""
_K = 10


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Decoded pictures, uint8 `[N, H, W, 3]`, and what they are."""

    pixels: Pixels
    uris: tuple[str, ...]
    labels: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.uris)

    def __getitem__(self, rows: slice) -> "Sample":
        return Sample(self.pixels[rows], self.uris[rows], self.labels[rows])

    @property
    def digest(self) -> str:
        """Return 16 hex digits of the pixels' SHA-256."""
        return storage.sha256(self.pixels.tobytes())[:16]


def find(store: str, spec: EmbedderSpec) -> str | None:
    """Return the URI of the int8 artifact that a store holds of the float32 network `spec`.

    What it was calibrated on is not asked. Of several, it is the one that the store's current run is embedded with.
    """
    found = [document.fingerprint for document in _artifacts(store) if _is_int8_of(document.spec, spec)]
    if not found:
        return None
    current = read_current(store, "run")
    used = load_run_manifest(store, current[0]).embedder.fingerprint if current else None
    return storage.join(store, "embedders", used if used in found else min(found))


def _artifacts(store: str) -> Iterator[EmbedderDocument]:
    with suppress(NotFound):  # a store yet to be made
        for entry in storage.list_entries(storage.join(store, "embedders")):
            if storage.name_of(entry.uri) == DESCRIPTION:
                yield read_description(entry.uri.removesuffix(f"/{DESCRIPTION}"))


def _is_int8_of(spec: EmbedderSpec, float32: EmbedderSpec) -> bool:
    return spec == replace(float32, precision=INT8, calibration=spec.calibration)


def export(store: str, network: backbones.Network, images: Iterable[ImageRef], limits: Limits) -> str:
    """Calibrate a network on some of the images, measure it on others, and put it into the store; return its URI."""
    calibrated, held_out = split(draw(images, network.spec.input_size, limits))
    spec = replace(network.spec, precision=INT8, calibration=calibrated.digest)
    models = [backbones.convert(network.model), backbones.convert(network.model, calibrated.pixels)]
    float32, int8 = map(Embedder.of_model, (network.spec, spec), models)
    measured = {
        "calibrated_on": len(calibrated),
        "float32_bytes": len(models[0]),
        **measure(float32, int8, held_out),
    }
    return write_artifact(storage.join(store, "embedders"), spec, models[1], built_with(), measured)


def draw(images: Iterable[ImageRef], size: tuple[int, int], limits: Limits) -> Sample:
    """Decode the images whose uris have the smallest hashes, passing over bad ones: few, but always the same."""
    looked_at = heapq.nsmallest(_SPARE * _SAMPLE, images, key=lambda ref: uri_hash(ref.uri))
    sample = decode(looked_at, size, limits, _SAMPLE)
    if len(sample) < _LEAST:
        raise UsageError(
            f"--precision int8 takes {_LEAST} images or more, to be calibrated and measured on; {len(sample)} of "
            f"{len(looked_at)} can be read and decoded: take --precision float32"
        )
    return sample


def decode(images: Sequence[ImageRef], size: tuple[int, int], limits: Limits, wanted: int | None = None) -> Sample:
    """Decode images in their order, passing over bad ones, until there are as many as wanted."""
    good: list[tuple[ImageRef, Pixels]] = []
    with ThreadPoolExecutor(_READS) as pool:
        for start in range(0, len(images), _READS):  # map() alone would hold them all
            some = images[start : start + _READS]
            decoded = pool.map(_decode, some, itertools.repeat(size), itertools.repeat(limits))
            good += [(ref, pixels) for ref, pixels in zip(some, decoded, strict=True) if pixels is not None]
            if wanted is not None and len(good) >= wanted:
                break
    del good[len(good) if wanted is None else wanted :]
    return Sample(
        np.stack([pixels for _, pixels in good]) if good else np.empty((0, *size, 3), np.uint8),
        tuple(ref.uri for ref, _ in good),
        tuple(ref.label for ref, _ in good),
    )


def _decode(ref: ImageRef, size: tuple[int, int], limits: Limits) -> Pixels | None:
    if ref.size > limits.max_bytes:
        return None
    try:
        return load(storage.read(ref.uri), size, limits).pixels
    except (ImageRejected, StorageError, MemoryError):  # the run will count and name it
        return None


def split(sample: Sample) -> tuple[Sample, Sample]:
    """Return what is calibrated on and what is held out."""
    return sample[::2], sample[1::2]


def measure(float32: Embedder, int8: Embedder, held_out: Sample) -> dict[str, Any]:
    """Return what int8 costs and gains; milliseconds are an image's, decoded, on one thread."""
    (exact, rough), milliseconds = embed_in_turn((float32, int8), held_out.pixels)
    slow, fast = np.median(milliseconds, axis=0)
    cosines = (unit(exact) * unit(rough)).sum(axis=1)
    orders = [others_by_nearness(vectors) for vectors in (exact, rough)]
    return {
        "held_out": len(held_out),
        "float32_ms": round(float(slow), 3),
        "int8_ms": round(float(fast), 3),
        "speed": round(float(slow / fast), 3),
        "cosine_mean": round(float(cosines.mean()), 5),
        "cosine_min": round(float(cosines.min()), 5),
        "neighbours_shared": round(_shared(*orders), 4),
        "precision_at_1_float32": _precision_at_1(orders[0], held_out.labels),
        "precision_at_1": _precision_at_1(orders[1], held_out.labels),
    }


def embed_in_turn(embedders: Sequence[Embedder], pixels: Pixels) -> tuple[list[Vectors], npt.NDArray[np.float64]]:
    """Return each embedder's vectors, and `[rounds, embedders]` milliseconds an image.

    A round is a few pictures, embedded by one after the other: what else the machine does slows all of them.
    """
    vectors = [np.empty((len(pixels), embedder.spec.dim), np.float32) for embedder in embedders]
    rounds = []
    for start in range(-_ROUND, len(pixels), _ROUND):  # the first round warms up, and is done again
        some = slice(max(0, start), max(0, start) + _ROUND)
        rounds.append(
            [_timed(embedder, pixels[some], into[some]) for embedder, into in zip(embedders, vectors, strict=True)]
        )
    return vectors, np.array(rounds[1:])


def _timed(embedder: Embedder, pixels: Pixels, into: Vectors) -> float:
    started = time.perf_counter()
    into[:] = embedder.embed(pixels)
    return 1000 * (time.perf_counter() - started) / len(pixels)


def unit(vectors: Vectors) -> Vectors:
    """Scale rows to length one; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def others_by_nearness(vectors: Vectors) -> npt.NDArray[np.int64]:
    """Return the numbers of each row's others, nearest by cosine first, `[N, N - 1]`."""
    rows = unit(vectors)
    closeness = rows @ rows.T
    np.fill_diagonal(closeness, -np.inf)
    return np.argsort(-closeness, axis=1, kind="stable")[:, :-1]


def _shared(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> float:
    """Return which share of the ten nearest two orders have in common, on average."""
    pairs = zip(one[:, :_K].tolist(), other[:, :_K].tolist(), strict=True)
    return float(np.mean([len({*nearest}.intersection(found)) / len(nearest) for nearest, found in pairs]))


def _precision_at_1(order: npt.NDArray[np.int64], labels: Sequence[str | None]) -> float | None:
    if len({*labels} - {None}) < 2:  # where all are alike, every neighbour is right
        return None
    judged = [labels[nearest] == label for nearest, label in zip(order[:, 0], labels, strict=True) if label is not None]
    return round(float(np.mean(judged)), 4)


def describe(document: EmbedderDocument) -> str:
    """Lay out what was measured of an int8 embedder beside float32."""
    found = document.measured
    rows: list[tuple[object, ...]] = [
        ("ms an image, one thread", found["float32_ms"], found["int8_ms"]),
        ("times as fast", 1.0, found["speed"]),
        ("bytes of the model", found["float32_bytes"], document.model.size),
        ("P@1 by label", found["precision_at_1_float32"], found["precision_at_1"]),
        ("of the 10 nearest, kept", 1.0, found["neighbours_shared"]),
        ("cosine to float32, mean", 1.0, found["cosine_mean"]),
        ("cosine to float32, least", 1.0, found["cosine_min"]),
    ]
    about = f"int8, calibrated on {found['calibrated_on']} of the images and measured on {found['held_out']} others"
    return f"{about}:\n{console.table(rows, ['', FLOAT32, INT8])}\n"
