"""What runs a frozen model: LiteRT here; the batch side knows another for GPUs."""

import threading
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from serving.errors import FormatError, MissingExtra

LITERT = "litert"

Pixels = npt.NDArray[np.uint8]
Vectors = npt.NDArray[np.float32]


class Engine(Protocol):
    """Runs a model on batches of pictures; threads may share it."""

    name: str
    batch: int
    """Pictures it takes at once: how many are fastest."""

    def run(self, pixels: Pixels) -> Vectors:
        """Turn uint8 `[N, H, W, 3]`, N up to `batch`, into float32 `[N, dim]`."""
        ...


class LiteRT:
    """LiteRT, with an interpreter of one thread for each thread that asks.

    Pictures go one by one: batches are slower on CPUs, and a vector then never depends on its neighbours.
    """

    name = LITERT
    batch = 1

    def __init__(self, model: bytes, size: tuple[int, int], dim: int) -> None:
        self._model = model
        self._size = size
        self._dim = dim
        self._local = threading.local()

    def run(self, pixels: Pixels) -> Vectors:
        """Run one picture."""
        interpreter, source, target = self._session()
        interpreter.set_tensor(source, pixels)
        interpreter.invoke()
        vectors: Vectors = interpreter.get_tensor(target)
        return vectors

    def _session(self) -> tuple[Any, int, int]:
        if not hasattr(self._local, "session"):
            try:
                from ai_edge_litert.interpreter import Interpreter
            except ImportError:
                raise MissingExtra("embedding images", "images") from None
            try:
                # More threads inside one interpreter are slower than more interpreters of one thread.
                interpreter = Interpreter(model_content=self._model, num_threads=1)
                interpreter.allocate_tensors()
            except (ValueError, RuntimeError) as error:
                raise FormatError(f"cannot be run: {error}") from None
            [source], [target] = interpreter.get_input_details(), interpreter.get_output_details()
            self._check(source, target)
            self._local.session = (interpreter, source["index"], target["index"])
        session: tuple[Any, int, int] = self._local.session
        return session

    def _check(self, source: Any, target: Any) -> None:
        expected = ((1, *self._size, 3), np.uint8, (1, self._dim), np.float32)
        found = (tuple(source["shape"]), source["dtype"], tuple(target["shape"]), target["dtype"])
        if found != expected:
            takes, gives = (f"{kind.__name__} {tuple(map(int, shape))}" for shape, kind in (found[:2], found[2:]))
            raise FormatError(
                f"takes {takes} and gives {gives}, "
                f"not what its description says: {self._size} pixels, {self._dim} numbers"
            )
