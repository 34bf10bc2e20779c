"""Backbones: Keras applications, exported once to the artifact that everything else loads.

The only module that imports Keras. Sources of architectures, weights and preprocessing: keras.applications.
"""

import contextlib
import hashlib
import importlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving import storage
from serving.embedder import DESCRIPTION, EmbedderSpec, write_artifact
from serving.errors import UsageError
from serving.images import RECIPE
from serving.manifest import built_with

AVERAGE = "avg"


@dataclass(frozen=True, slots=True)
class Backbone:
    """A Keras application cut at a layer; `preprocessing` is the published mode of its input."""

    application: str
    module: str
    preprocessing: str
    side: int
    """Height and width of the input in pixels."""
    dim: int
    layer: str = AVERAGE

    @property
    def include_top(self) -> bool:
        """Tell whether the layer is part of the classifying head."""
        return self.layer != AVERAGE


BACKBONES = {
    "mobilenet_v2": Backbone("MobileNetV2", "mobilenet_v2", "tf", 224, 1280),
    "mobilenet": Backbone("MobileNet", "mobilenet", "tf", 224, 1024),
    "vgg16": Backbone("VGG16", "vgg16", "caffe", 224, 512),
    "vgg16_fc2": Backbone("VGG16", "vgg16", "caffe", 224, 4096, layer="fc2"),
    "vgg19": Backbone("VGG19", "vgg19", "caffe", 224, 512),
    "resnet50": Backbone("ResNet50", "resnet", "caffe", 224, 2048),
    "inception_v3": Backbone("InceptionV3", "inception_v3", "tf", 299, 2048),
}
DEFAULT = "mobilenet_v2"


def find(name: str) -> Backbone:
    """Return a backbone by name."""
    if name not in BACKBONES:
        raise UsageError(f"--backbone {name} is not known; there are {', '.join(BACKBONES)}")
    return BACKBONES[name]


def ensure_exported(folder: str, name: str, weights: str, seed: int = 0) -> str:
    """Return the URI of an embedder's artifact below `folder`, exporting it unless it is there.

    `weights` is `imagenet`, `untrained` (random, from `seed`) or the path or URI of a Keras weights file. None of
    them ever stands in for another.
    """
    backbone = find(name)
    with _weights_file(weights) as path:
        model = build(backbone, path, seed) if weights == "imagenet" else None
        spec = _spec(name, backbone, _identity(weights, path, seed, model))
        uri = storage.join(folder, spec.fingerprint)
        if storage.exists(storage.join(uri, DESCRIPTION)):
            return uri
        return write_artifact(folder, spec, convert(model or build(backbone, path, seed)), built_with())


def build(backbone: Backbone, weights: str | None, seed: int = 0) -> Any:
    """Build the Keras model from uint8 `[N, H, W, 3]` to float32 `[N, dim]`, preprocessing inside.

    `weights` is a local file, `imagenet`, or None for random ones from `seed`.
    """
    keras = _keras()
    application = importlib.import_module(f"keras.applications.{backbone.module}")
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    shape = (backbone.side, backbone.side, 3)
    options = {"include_top": True} if backbone.include_top else {"include_top": False, "pooling": AVERAGE}
    try:
        with _hushed():
            network = getattr(application, backbone.application)(input_shape=shape, weights=weights, **options)
    except Exception as error:  # Keras raises a bare Exception when a download fails
        reason = str(error).strip().splitlines()[0]
        if weights == "imagenet":
            reason += "; give a file with --weights FILE, or --weights untrained"
        raise UsageError(f"--weights {weights} cannot be used for {backbone.application}: {reason}") from error
    output = network.get_layer(backbone.layer).output if backbone.include_top else network.output
    pixels = keras.Input(shape, dtype="uint8")
    inputs = application.preprocess_input(keras.ops.cast(pixels, "float32"))
    vector = keras.Model(network.input, output)(inputs)
    if weights is None:
        vector = keras.layers.Rescaling(_scale(keras.Model(pixels, vector), shape))(vector)
    return keras.Model(pixels, vector)


def _scale(model: Any, shape: tuple[int, int, int]) -> float:
    """Return a power of two that brings a random network's outputs near 1.

    Without it those of MobileNet are about 1e-11, which 16-bit floats take for nothing.
    """
    noise = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    size = float(np.sqrt(np.square(model.predict(noise, verbose=0), dtype=np.float64).mean()))
    return float(2.0 ** -round(np.log2(size)))


def convert(model: Any) -> bytes:
    """Convert a Keras model to LiteRT, float32."""
    with _hushed():  # the exporter prints its signatures
        import tensorflow as tf

        converted: bytes = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    return converted


def _spec(name: str, backbone: Backbone, identity: str) -> EmbedderSpec:
    return EmbedderSpec(
        backbone=name.removesuffix(f"_{backbone.layer}"),
        layer=backbone.layer,
        weights=identity,
        preprocessing=backbone.preprocessing,
        input_size=(backbone.side, backbone.side),
        dim=backbone.dim,
        image_recipe=RECIPE,
    )


def _identity(weights: str, path: str | None, seed: int, model: Any) -> str:
    if path is None:
        return f"untrained:seed={seed}"
    if weights == "imagenet":
        digest = hashlib.sha256()
        for tensor in model.get_weights():
            digest.update(tensor.tobytes())
        return f"imagenet:{digest.hexdigest()[:16]}"
    return f"file:{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"


@contextlib.contextmanager
def _weights_file(weights: str) -> Iterator[str | None]:
    """Give what Keras takes for `weights`; a remote file is fetched to a temporary one."""
    if weights in ("imagenet", "untrained"):
        yield weights if weights == "imagenet" else None
        return
    uri = storage.normalize(weights)
    if storage.scheme_of(uri) == "file":
        if not os.path.isfile(uri):
            raise UsageError(f"--weights {weights} is not a file; give one, or `imagenet`, or `untrained`")
        yield uri
        return
    with tempfile.TemporaryDirectory(prefix="lookalike-") as folder:
        path = Path(folder, storage.name_of(uri))
        path.write_bytes(storage.read(uri))
        yield str(path)


def _keras() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    with _hushed():
        import keras

    return keras


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep TensorFlow's chatter off the terminal: its C++ parts write to the process's standard error past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
