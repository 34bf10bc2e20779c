"""Backbones: Keras applications, exported once to the artifact that everything else loads.

The only module that imports Keras. Sources of architectures, weights and preprocessing: keras.applications.
"""

import contextlib
import functools
import hashlib
import importlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serving import storage
from serving.embedder import DESCRIPTION, EmbedderSpec, has_saved_model, write_artifact, write_saved_model
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


class Network:
    """A backbone with its weights; the Keras model is built when it is first asked for."""

    def __init__(self, name: str, weights: str, path: str | None, seed: int) -> None:
        self._name, self._weights, self._path, self._seed = name, weights, path, seed
        self._backbone = find(name)

    @functools.cached_property
    def spec(self) -> EmbedderSpec:
        """What the network is in float32."""
        backbone = self._backbone
        return EmbedderSpec(
            backbone=self._name.removesuffix(f"_{backbone.layer}"),
            layer=backbone.layer,
            weights=self._identity(),
            preprocessing=backbone.preprocessing,
            input_size=(backbone.side, backbone.side),
            dim=backbone.dim,
            image_recipe=RECIPE,
        )

    @functools.cached_property
    def model(self) -> Any:
        """The Keras model, as `build` makes it."""
        return build(self._backbone, self._path, self._seed)

    def _identity(self) -> str:
        if self._path is None:
            return f"untrained:seed={self._seed}"
        if self._weights == "imagenet":
            digest = hashlib.sha256()
            for tensor in self.model.get_weights():
                digest.update(tensor.tobytes())
            return f"imagenet:{digest.hexdigest()[:16]}"
        return f"file:{hashlib.sha256(Path(self._path).read_bytes()).hexdigest()[:16]}"


@contextlib.contextmanager
def opened(name: str, weights: str, seed: int = 0) -> Iterator[Network]:
    """Lend a network.

    `weights` is `imagenet`, `untrained` (random, from `seed`) or the path or URI of a Keras weights file. None of
    them ever stands in for another.
    """
    find(name)  # before a file is fetched
    with _weights_file(weights) as path:
        yield Network(name, weights, path, seed)


def ensure_exported(folder: str, name: str, weights: str, seed: int = 0, saved_model: bool = False) -> str:
    """Return the URI of a float32 embedder's artifact below `folder`, exporting what of it is not there.

    The network is named as in `opened`; with `saved_model`, the artifact holds one, for TensorFlow.
    """
    with opened(name, weights, seed) as network:
        uri = storage.join(folder, network.spec.fingerprint)
        if not storage.exists(storage.join(uri, DESCRIPTION)):
            write_artifact(folder, network.spec, convert(network.model), built_with())
        if saved_model and not has_saved_model(uri):
            _export_saved_model(network.model, uri)
        return uri


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


def convert(model: Any, calibration: npt.NDArray[np.uint8] | None = None) -> bytes:
    """Convert a Keras model to LiteRT: in float32, or in int8 with the ranges that uint8 `[N, H, W, 3]` brings about.

    Either takes uint8 and gives float32.
    """
    # The warning says that the input's range is not told; it is learned from the pictures, as all others are.
    with _hushed(), warnings.catch_warnings(action="ignore", category=UserWarning):  # the exporter prints too
        import tensorflow as tf

        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        if calibration is not None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            # The newer one takes ranges under 1e-6 for nothing, which those inside random networks are; on real weights
            # the two are as fast and as near to float32.
            converter.experimental_new_quantizer = False
            converter.representative_dataset = lambda: ([picture[np.newaxis]] for picture in calibration)
        converted: bytes = converter.convert()
    return converted


def _export_saved_model(model: Any, uri: str) -> None:
    with tempfile.TemporaryDirectory(prefix="lookalike-") as folder:
        with _hushed():
            model.export(folder, verbose=False)
        write_saved_model(uri, Path(folder))


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
