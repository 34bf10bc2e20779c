"""The engines of the batch side: LiteRT on CPUs, TensorFlow where there is a GPU.

The one module below the jobs that knows TensorFlow, and it is imported when it is asked to run.
"""

import functools
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from serving.embedder import Embedder, fetch_saved_model, has_saved_model, read_description
from serving.errors import FormatError, MissingExtra
from serving.litert import LITERT, Pixels, Vectors

AUTO, TENSORFLOW = "auto", "tensorflow"
ENGINES = (AUTO, LITERT, TENSORFLOW)


class TensorFlow:
    """A SavedModel on TensorFlow: on the GPU where there is one, else with one thread for each thread that asks."""

    name = TENSORFLOW

    def __init__(self, folder: Path) -> None:
        tensorflow = _tensorflow()
        on_gpu = bool(tensorflow.config.list_physical_devices("GPU"))
        self.batch = 32 if on_gpu else 4
        try:
            self._serve = tensorflow.saved_model.load(str(folder)).signatures["serving_default"]
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise FormatError(f"cannot be run by TensorFlow: {error}") from None
        [self._input] = self._serve.structured_input_signature[1]

    def run(self, pixels: Pixels) -> Vectors:
        """Run a batch."""
        [vectors] = self._serve(**{self._input: _tensorflow().constant(pixels)}).values()
        found: Vectors = vectors.numpy()
        return found


@functools.lru_cache(maxsize=2)
def open_cached(uri: str, engine: str = AUTO) -> Embedder:
    """Open the embedder in the folder `uri` once a process.

    `auto` takes TensorFlow where there is a GPU and a SavedModel for it, LiteRT elsewhere.
    """
    if engine == TENSORFLOW or (engine == AUTO and has_gpu() and has_saved_model(uri)):
        with tempfile.TemporaryDirectory(prefix="lookalike-") as name:  # TensorFlow reads local files alone
            return Embedder(read_description(uri).spec, TensorFlow(fetch_saved_model(uri, Path(name))))
    return Embedder.open(uri)


def has_gpu() -> bool:
    """Tell whether TensorFlow sees a GPU; without a driver it is not even imported."""
    if not os.path.exists("/dev/nvidiactl"):
        return False
    try:
        return bool(_tensorflow().config.list_physical_devices("GPU"))
    except MissingExtra:
        return False


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Each embedding thread runs its own batches; threads inside them would only compete. Read at first use.
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        import tensorflow
    except ImportError:
        raise MissingExtra("the engine tensorflow", "pipeline") from None
    return tensorflow
