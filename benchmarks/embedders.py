"""The systems that `benchmarks.embed` sets side by side, each in a process of its own.

All get the same pictures and decode them with the project's own decoder; what differs is how the network is run and
fed. Keras and RunInference are timed with the network loaded and warm; ours loads it as part of its work.
"""

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jobs import backbones
from serving.embedder import Embedder
from serving.images import load

BATCH = 32
Figures = dict[str, float]


def keras_single(images: list[Path], network: "Network") -> Figures:
    """Keras' `predict`, picture by picture, as notebooks do it."""
    model = network.build()

    def one(path: Path) -> None:
        model.predict(network.pixels(path)[np.newaxis], verbose=0)

    one(images[0])
    return _timed(lambda: [one(path) for path in images], len(images))


def keras_batches(images: list[Path], network: "Network") -> Figures:
    """Keras' `predict` on batches."""
    model = network.build()

    def some(paths: list[Path]) -> None:
        model.predict(np.stack([network.pixels(path) for path in paths]), verbose=0)

    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    some(batches[0])
    return _timed(lambda: [some(paths) for paths in batches], len(images))


def run_inference(images: list[Path], network: "Network") -> Figures:
    """Beam's RunInference with the plainest handler that works: batches of 32 through the Keras model."""
    import apache_beam as beam
    from apache_beam.ml.inference.base import ModelHandler, RunInference

    from pipelines.runner import Runner

    model = network.build()
    model.predict(np.stack([network.pixels(path) for path in images[:BATCH]]), verbose=0)

    class Handler(ModelHandler[np.ndarray, np.ndarray, Any]):
        def load_model(self) -> Any:
            return model

        def batch_elements_kwargs(self) -> dict[str, int]:
            return {"min_batch_size": BATCH, "max_batch_size": BATCH}

        def get_num_bytes(self, batch: Any) -> int:
            return sum(pixels.nbytes for pixels in batch)  # Beam would pickle the batch to know

        def run_inference(self, batch: Any, model: Any, inference_args: Any = None) -> Iterable[np.ndarray]:  # noqa: ARG002
            return list(model.predict(np.stack(batch), verbose=0))

    def build(pipeline: Any) -> None:
        pixels = pipeline | beam.Create(images) | beam.Map(network.pixels)
        # Without pickling a model that is here already: one process, one model.
        _ = (
            pixels
            | RunInference(Handler())
            | beam.Map(lambda vector: vector.astype(np.float16))
            | beam.combiners.Count.Globally()
        )

    return _timed(lambda: Runner().run("embed", len(images), "img", build, None), len(images))


def ours(images: list[Path], network: "Network", *beam_arguments: str) -> Figures:
    """`lookalike embed`: the time of its graph, and that of the whole job."""
    from benchmarks.stage import embed_once

    store, artifact = network.work / "store", str(network.artifact())
    shutil.rmtree(store, ignore_errors=True)
    done = embed_once(str(images[0].parent), len(images), store, artifact, network.engine, *beam_arguments)
    spent = {step: done.counters.get(f"embed/{step}_ms", 0) / 1000 for step in ("wait", "decode", "infer", "write")}
    return {"images_per_second": len(images) / done.seconds, "whole": len(images) / done.whole, **spent}


def parts(images: list[Path], network: "Network") -> Figures:
    """CPU seconds an image of decoding and of inference, each alone: on one thread, then on all cores at once."""
    embedder = network.open()
    size, batch = embedder.spec.input_size, embedder.batch
    data = [path.read_bytes() for path in images]
    threads = len(os.sched_getaffinity(0))

    def decode(some: list[bytes]) -> np.ndarray:
        return np.stack([load(one, size).pixels for one in some])

    with ThreadPoolExecutor(threads) as pool:

        def timed(work: Callable[[Any], Any], tasks: list[Any]) -> tuple[float, list[Any]]:
            started = time.process_time()
            done = list(pool.map(work, tasks))
            return (time.process_time() - started) / len(images), done

        barrier = threading.Barrier(threads)  # so that each thread has its interpreter

        def warm(_: int) -> None:
            barrier.wait()
            embedder.embed(np.zeros((batch, *size, 3), np.uint8))

        list(pool.map(warm, range(threads)))
        decode_seconds, [pixels] = timed(decode, [data])
        infer_seconds, _ = timed(embedder.embed, [pixels])
        decode_together, shares = timed(decode, [data[first::threads] for first in range(threads)])
        infer_together, _ = timed(embedder.embed, shares)
    return {
        "decode": decode_seconds,
        "infer": infer_seconds,
        "images_per_second": threads / (decode_seconds + infer_seconds),
        "together": threads / (decode_together + infer_together),
    }


SYSTEMS: dict[str, Callable[..., Figures]] = {
    system.__name__: system for system in (keras_single, keras_batches, run_inference, ours, parts)
}


class Network:
    """The network under test, as each system wants it."""

    def __init__(self, work: Path, name: str, weights: str, engine: str) -> None:
        self.work = work
        self.engine = engine
        self._name = name
        self._weights = weights
        side = backbones.find(name).side
        self._size = (side, side)

    def pixels(self, path: Path) -> Any:
        """Read and decode."""
        return load(path.read_bytes(), self._size).pixels

    def build(self) -> Any:
        """Build the Keras model, from uint8."""
        weights = None if self._weights == "untrained" else self._weights
        return backbones.build(backbones.find(self._name), weights)

    def artifact(self) -> Path:
        """Export it, once."""
        return Path(export(self.work, self._name, self._weights, self.engine))

    def open(self) -> Embedder:
        """Open the artifact in the engine asked for."""
        from transforms.engines import open_cached

        return open_cached(str(self.artifact()), self.engine)


def export(work: Path, name: str, weights: str, engine: str) -> str:
    """Return the URI of the artifact below `work`."""
    return backbones.ensure_exported(str(work / "artifacts"), name, weights, saved_model=engine == "tensorflow")


def _timed(action: Callable[[], object], count: int) -> Figures:
    started = time.perf_counter()
    action()
    return {"images_per_second": count / (time.perf_counter() - started)}


def main() -> None:
    """Run one system on the first pictures of a folder and write its figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", type=Path, required=True)
    for name in ("system", "backbone", "weights", "engine"):
        parser.add_argument(name)
    parser.add_argument("images", type=Path)
    parser.add_argument("work", type=Path)
    options, beam_arguments = parser.parse_known_args()
    network = Network(options.work, options.backbone, options.weights, options.engine)
    figures = SYSTEMS[options.system](sorted(options.images.iterdir()), network, *beam_arguments)
    options.child.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
