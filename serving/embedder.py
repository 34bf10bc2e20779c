"""The frozen embedder: one artifact that workers and servers load, and nothing else.

`<folder>/<fingerprint>/embedder.json` describes it, `model.tflite` beside it takes uint8 `[N, H, W, 3]`, with its
preprocessing inside, and gives float32 `[N, dim]`. The fingerprint is the hash of everything that changes a vector.
"""

import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serving import storage
from serving.errors import EmbedderMismatch, FormatError, ImageRejected, MissingExtra, UsageError
from serving.manifest import Document, EmbedderRef, FileEntry

MODEL = "model.tflite"
DESCRIPTION = "embedder.json"


@dataclass(frozen=True, slots=True)
class EmbedderSpec:
    """What changes a vector, and so what the fingerprint is made of."""

    backbone: str
    layer: str
    """The layer whose output is the vector; `avg` is the global average of the last feature map."""
    weights: str
    """Where the weights come from and a hash of them, or `untrained:seed=N`."""
    preprocessing: str
    input_size: tuple[int, int]
    """Height and width in pixels."""
    dim: int
    image_recipe: str
    """How bytes become pixels; see `serving.images.RECIPE`."""
    precision: str = "float32"

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits that name this embedder."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        return hashlib.sha256(canonical).hexdigest()[:16]

    @property
    def ref(self) -> EmbedderRef:
        """Return what manifests record."""
        return EmbedderRef(self.fingerprint, f"{self.backbone}/{self.layer}", self.weights)


@dataclass(frozen=True, slots=True)
class EmbedderDocument(Document):
    """The content of `embedder.json`."""

    fingerprint: str
    spec: EmbedderSpec
    model: FileEntry
    built_with: dict[str, str]


class Embedder:
    """Turn pictures into vectors; safe to share by threads, each of which gets an interpreter of its own.

    Pictures are run one by one: on CPUs that is as fast as batches, and a vector then never depends on its neighbours.
    """

    def __init__(self, spec: EmbedderSpec, model: bytes) -> None:
        self.spec = spec
        self._model = model
        self._local = threading.local()

    @classmethod
    def open(cls, uri: str) -> "Embedder":
        """Load the artifact in the folder `uri`, checking its fingerprint and its model's checksum."""
        document = read_description(uri)
        return cls(document.spec, document.model.read(uri))

    @property
    def fingerprint(self) -> str:
        """Return the embedder's name."""
        return self.spec.fingerprint

    def embed(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed uint8 `[N, H, W, 3]` into float32 `[N, dim]` (not normalised)."""
        expected = (*self.spec.input_size, 3)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != expected:
            shape = ", ".join(map(str, ("N", *expected)))
            raise UsageError(f"pixels are {pixels.dtype} {pixels.shape}; this embedder takes uint8 ({shape})")
        vectors = np.empty((len(pixels), self.spec.dim), np.float32)
        interpreter, source, target = self._session()
        for row, picture in enumerate(pixels):
            interpreter.set_tensor(source, picture[np.newaxis])
            interpreter.invoke()
            vectors[row] = interpreter.get_tensor(target)[0]
        return vectors

    def embed_images(self, images: Sequence[bytes]) -> npt.NDArray[np.float32]:
        """Decode and embed encoded pictures; a bad one raises `ImageRejected` naming its place."""
        from serving.images import load

        pixels = np.empty((len(images), *self.spec.input_size, 3), np.uint8)
        for row, data in enumerate(images):
            try:
                pixels[row] = load(data, self.spec.input_size).pixels
            except ImageRejected as error:
                raise ImageRejected(error.reason, f"image {row + 1} of {len(images)}: {error.message}") from None
        return self.embed(pixels)

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
                raise FormatError(f"the model of the embedder {self.fingerprint} cannot be run: {error}") from None
            [source], [target] = interpreter.get_input_details(), interpreter.get_output_details()
            self._check_model(source, target)
            self._local.session = (interpreter, source["index"], target["index"])
        session: tuple[Any, int, int] = self._local.session
        return session

    def _check_model(self, source: Any, target: Any) -> None:
        expected = ((1, *self.spec.input_size, 3), np.uint8, (1, self.spec.dim), np.float32)
        found = (tuple(source["shape"]), source["dtype"], tuple(target["shape"]), target["dtype"])
        if found != expected:
            takes, gives = (f"{kind.__name__} {tuple(map(int, shape))}" for shape, kind in (found[:2], found[2:]))
            raise FormatError(
                f"the model of the embedder {self.fingerprint} takes {takes} and gives {gives}, "
                f"not what its description says: {self.spec.input_size} pixels, {self.spec.dim} numbers"
            )


def read_description(uri: str) -> EmbedderDocument:
    """Read `embedder.json` in the folder `uri`; its fingerprint must be its content's and the folder's name."""
    description = storage.join(uri, DESCRIPTION)
    document = EmbedderDocument.load(description)
    for named, what in ((document.fingerprint, "it names"), (storage.name_of(uri), "its folder is called")):
        if named != document.spec.fingerprint:
            raise EmbedderMismatch(
                f"{description} is another embedder: its content makes {document.spec.fingerprint}, {what} {named}"
            )
    return document


@functools.lru_cache(maxsize=2)
def open_cached(uri: str) -> Embedder:
    """Open an embedder once a process."""
    return Embedder.open(uri)


def write_artifact(folder: str, spec: EmbedderSpec, model: bytes, built_with: dict[str, str]) -> str:
    """Write an artifact below `folder` unless it is there; return its URI."""
    uri = storage.join(folder, spec.fingerprint)
    if not storage.create(storage.join(uri, MODEL), model):
        model = storage.read(storage.join(uri, MODEL))  # an export that was cut short here left it
    document = EmbedderDocument(spec.fingerprint, spec, FileEntry.of(MODEL, model), built_with)
    storage.create(storage.join(uri, DESCRIPTION), document.to_json())
    return uri


def copy_artifact(source: str, folder: str) -> str:
    """Copy the artifact `source` below `folder` unless it is there; return the copy's URI."""
    document = read_description(source)
    uri = storage.join(folder, document.fingerprint)
    if not storage.exists(storage.join(uri, DESCRIPTION)):
        write_artifact(folder, document.spec, document.model.read(source), document.built_with)
    return uri
