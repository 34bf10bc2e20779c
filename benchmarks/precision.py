"""The network in float32 and in int8, and on TensorFlow: how fast it is, and what labelled photos are found with it.

    python -m benchmarks.precision --photos photos/ --weights mobilenet_v2.h5

Photos are in folders named after what they show. Int8 is calibrated as `lookalike embed` does it, on a sample of them;
quality is told of all photos, and of those alone that it was not calibrated on, asked and found. All embed the same
decoded pictures on one thread, eight at a time in turn; milliseconds are medians of these rounds. A photo is asked
with among the others, by cosine, exactly.
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.weights import weights_of
from jobs import backbones, calibration
from jobs.console import table
from serving import storage
from serving.embedder import SAVED_FILES, Embedder, SavedModelDocument, read_description
from serving.images import Limits
from transforms.engines import TENSORFLOW, open_cached
from transforms.listing import Listing

_QUALITY = ("P@1", "P@10", "mAP")
HEADERS = ["", "ms an image", "times as fast", "bytes", *_QUALITY, *(f"{name}, others" for name in _QUALITY)]
_K = 10


@dataclass(frozen=True, slots=True)
class Quality:
    """What is found among labelled vectors: the share of right ones, and mean average precision."""

    at_1: float
    at_10: float
    mean_average: float

    @classmethod
    def of(cls, vectors: npt.NDArray[np.float32], labels: npt.NDArray[np.str_]) -> "Quality":
        """Ask with each row among the others."""
        right = labels[calibration.others_by_nearness(vectors)] == labels[:, np.newaxis]
        ranks = np.arange(1, right.shape[1] + 1)
        precisions = np.where(right, right.cumsum(axis=1) / ranks, 0).sum(axis=1) / np.maximum(right.sum(axis=1), 1)
        asked = right.any(axis=1)  # the only one of its kind has nothing to find
        return cls(float(right[:, 0].mean()), float(right[:, :_K].mean()), float(precisions[asked].mean()))

    @property
    def cells(self) -> list[float]:
        """Return the figures, rounded."""
        return [round(figure, 3) for figure in (self.at_1, self.at_10, self.mean_average)]


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """One way to run the network."""

    name: str
    embedder: Embedder
    bytes: int


def arithmetics(store: str, backbone: str, weights: str, images: Listing) -> list[Arithmetic]:
    """Export a network in all ways to the folder `store`."""
    exact = backbones.ensure_exported(storage.join(store, "embedders"), backbone, weights, saved_model=True)
    with backbones.opened(backbone, weights) as network:
        rough = calibration.export(store, network, images, Limits())
    files = SavedModelDocument.load(storage.join(exact, SAVED_FILES)).files
    return [
        Arithmetic("float32, LiteRT", Embedder.open(exact), read_description(exact).model.size),
        Arithmetic("int8, LiteRT", Embedder.open(rough), read_description(rough).model.size),
        Arithmetic("float32, TensorFlow", open_cached(exact, TENSORFLOW), sum(file.size for file in files)),
    ]


def compare(photos: str, backbone: str, weights: str) -> tuple[str, list[tuple[object, ...]]]:
    """Measure all ways to run a network on a folder of labelled photos; how many they are, and rows for `HEADERS`."""
    images = Listing([photos])
    with tempfile.TemporaryDirectory(prefix="lookalike-") as store:
        ways = arithmetics(store, backbone, weights, images)
    size = ways[0].embedder.spec.input_size
    calibrated, _ = calibration.split(calibration.draw(images, size, Limits()))
    sample = calibration.decode([ref for ref in images if ref.label is not None], size, Limits())
    labels, others = np.array(sample.labels), ~np.isin(sample.uris, calibrated.uris)
    vectors, milliseconds = calibration.embed_in_turn([way.embedder for way in ways], sample.pixels)
    medians = np.median(milliseconds, axis=0)
    rows = [
        (
            way.name,
            round(float(median), 2),
            round(float(medians[0] / median), 2),
            way.bytes,
            *Quality.of(found, labels).cells,
            *Quality.of(found[others], labels[others]).cells,
        )
        for way, median, found in zip(ways, medians, vectors, strict=True)
    ]
    return f"{len(sample):,} photos, {others.sum():,} of them others than int8 was calibrated on", rows


def main() -> None:
    """Print the table."""
    photos, found = os.environ.get("LOOKALIKE_PHOTOS"), weights_of(backbones.DEFAULT)
    weights = None if found == "untrained" else found
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", default=photos, help="a folder (default: $LOOKALIKE_PHOTOS)")
    parser.add_argument(
        "--weights",
        default=None if weights == "untrained" else weights,
        help="a Keras file (default: one in $LOOKALIKE_WEIGHTS)",
    )
    parser.add_argument("--backbone", default=backbones.DEFAULT, choices=backbones.BACKBONES, help="whose weights")
    options = parser.parse_args()
    for name, given in (("photos", options.photos), ("weights", options.weights)):
        if not given:
            parser.error(f"name --{name}, or set LOOKALIKE_{name.upper()}")
    # Before Keras brings TensorFlow, which reads them then: one thread for everybody.
    os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1")
    counts, rows = compare(options.photos, options.backbone, options.weights)
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {options.backbone}; {counts}")
    print(table(rows, HEADERS))


if __name__ == "__main__":
    main()
