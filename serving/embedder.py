"""The frozen embedder: one artifact that workers and servers load, and nothing else.

`<folder>/<fingerprint>/embedder.json` describes it, `model.tflite` beside it takes uint8 `[N, H, W, 3]`, with its
preprocessing inside, and gives float32 `[N, dim]`. The fingerprint is the hash of everything that changes a vector.
`saved_model/`, where there is one, holds the same network for TensorFlow; `files.json` in it, written last, lists it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serving import storage
from serving.errors import EmbedderMismatch, FormatError, ImageRejected, NotFound, UsageError
from serving.litert import Engine, LiteRT
from serving.manifest import Document, EmbedderRef, FileEntry

MODEL = "model.tflite"
DESCRIPTION = "embedder.json"
SAVED_MODEL = "saved_model"
SAVED_FILES = f"{SAVED_MODEL}/files.json"


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
    """The network's arithmetic: `float32` or `int8`."""
    calibration: str | None = None
    """A hash of the pictures that the ranges of an int8 network come from."""

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits that name this embedder."""
        fields = dataclasses.asdict(self)
        if self.calibration is None:  # a name older than the field stays
            del fields["calibration"]
        canonical = json.dumps(fields, sort_keys=True).encode()
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
    measured: dict[str, Any] = field(default_factory=dict)
    """What its precision costs and gains on images that it was not calibrated on; empty for float32."""


@dataclass(frozen=True, slots=True)
class SavedModelDocument(Document):
    """The content of `saved_model/files.json`."""

    folder: str
    """Where the SavedModel is, relative to the artifact."""
    files: tuple[FileEntry, ...]


class Embedder:
    """Turn pictures into vectors; safe to share by threads."""

    def __init__(self, spec: EmbedderSpec, engine: Engine) -> None:
        self.spec = spec
        self._engine = engine

    @classmethod
    def open(cls, uri: str) -> "Embedder":
        """Load the artifact in the folder `uri` into LiteRT, checking its fingerprint and its model's checksum."""
        document = read_description(uri)
        return cls.of_model(document.spec, document.model.read(uri))

    @classmethod
    def of_model(cls, spec: EmbedderSpec, model: bytes) -> "Embedder":
        """Run `model`, which is LiteRT's."""
        return cls(spec, LiteRT(model, spec.input_size, spec.dim))

    @property
    def fingerprint(self) -> str:
        """Return the embedder's name."""
        return self.spec.fingerprint

    @property
    def engine(self) -> str:
        """Return what runs it: `litert` or `tensorflow`."""
        return self._engine.name

    @property
    def batch(self) -> int:
        """Return how many pictures are best embedded at once."""
        return self._engine.batch

    def embed(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed uint8 `[N, H, W, 3]` into float32 `[N, dim]` (not normalised)."""
        expected = (*self.spec.input_size, 3)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != expected:
            shape = ", ".join(map(str, ("N", *expected)))
            raise UsageError(f"pixels are {pixels.dtype} {pixels.shape}; this embedder takes uint8 ({shape})")
        vectors = np.empty((len(pixels), self.spec.dim), np.float32)
        try:
            for start in range(0, len(pixels), self.batch):
                some = slice(start, start + self.batch)
                vectors[some] = self._engine.run(pixels[some])
        except FormatError as error:
            raise FormatError(f"the model of the embedder {self.fingerprint} {error}") from None
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


def write_artifact(
    folder: str,
    spec: EmbedderSpec,
    model: bytes,
    built_with: dict[str, str],
    measured: dict[str, Any] | None = None,
) -> str:
    """Write an artifact below `folder` unless it is there; return its URI."""
    uri = storage.join(folder, spec.fingerprint)
    if not storage.create(storage.join(uri, MODEL), model):
        model = storage.read(storage.join(uri, MODEL))  # an export that was cut short here left it
    document = EmbedderDocument(spec.fingerprint, spec, FileEntry.of(MODEL, model), built_with, measured or {})
    storage.create(storage.join(uri, DESCRIPTION), document.to_json())
    return uri


def has_saved_model(uri: str) -> bool:
    """Tell whether the artifact in the folder `uri` holds a whole SavedModel."""
    return storage.exists(storage.join(uri, SAVED_FILES))


def write_saved_model(uri: str, folder: Path) -> None:
    """Add the SavedModel in a local `folder` to the artifact in the folder `uri`, unless it has one."""
    if has_saved_model(uri):
        return
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # Two exports of one network differ, and a file of one beside a file of the other is no SavedModel: each has its own
    # folder, and what an export that was cut short left behind is never mixed in.
    digest = storage.sha256(json.dumps({name: storage.sha256(contents[name]) for name in sorted(contents)}).encode())
    place = f"{SAVED_MODEL}/{digest[:16]}"
    files = tuple(FileEntry.of(f"{place}/{name}", contents[name]) for name in sorted(contents))
    for name, data in contents.items():
        storage.create(storage.join(uri, place, name), data)
    storage.create(storage.join(uri, SAVED_FILES), SavedModelDocument(place, files).to_json())


def fetch_saved_model(uri: str, folder: Path) -> Path:
    """Copy the SavedModel of the artifact in the folder `uri` below a local `folder`; return where it is then."""
    try:
        document = SavedModelDocument.load(storage.join(uri, SAVED_FILES))
    except NotFound:
        raise NotFound(
            f"{uri} holds no SavedModel, which the engine tensorflow runs; export it with `lookalike embed --engine "
            "tensorflow` from the weights, or take --engine litert"
        ) from None
    for entry in document.files:
        path = folder / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.read(uri))
    return folder / document.folder


def copy_artifact(source: str, folder: str) -> str:
    """Copy the artifact `source` below `folder` unless it is there; return the copy's URI."""
    document = read_description(source)
    uri = storage.join(folder, document.fingerprint)
    if not storage.exists(storage.join(uri, DESCRIPTION)):
        write_artifact(folder, document.spec, document.model.read(source), document.built_with, document.measured)
    if has_saved_model(source) and not has_saved_model(uri):
        _copy_saved_model(source, uri)
    return uri


def _copy_saved_model(source: str, uri: str) -> None:
    document = SavedModelDocument.load(storage.join(source, SAVED_FILES))
    for entry in document.files:
        storage.create(storage.join(uri, entry.name), entry.read(source))
    storage.create(storage.join(uri, SAVED_FILES), document.to_json())
