"""What an index version and a store run say about themselves.

A manifest is JSON, written last: where it stands, everything it names is complete. Names in it are relative to its
own folder (parts: to the store), so a folder can be moved or copied as a whole.
"""

import dataclasses
import hashlib
import json
import platform
import types
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from serving import storage
from serving.errors import ChecksumMismatch, FormatError, NotFound, UnsupportedVersion
from serving.pointer import move_current as move_current
from serving.pointer import read_current as read_current

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: its name relative to the manifest's folder, its size and its SHA-256."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, name: str, data: bytes) -> Self:
        """Describe the file `name` holding `data`."""
        return cls(name, len(data), storage.sha256(data))

    def read(self, folder: str) -> bytes:
        """Read the file below `folder` and check it; `ChecksumMismatch` or `NotFound` otherwise."""
        uri = storage.join(folder, self.name)
        data = storage.read(uri)
        self._compare(uri, len(data), hashlib.sha256(data))
        return data

    def check(self, folder: str) -> None:
        """Check the file below `folder` as `read` does, without holding it."""
        uri = storage.join(folder, self.name)
        digest, size = hashlib.sha256(), 0
        with storage.open_binary(uri) as source:
            while block := source.read(_BLOCK):
                digest.update(block)
                size += len(block)
        self._compare(uri, size, digest)

    def _compare(self, uri: str, size: int, digest: Any) -> None:
        if size != self.size:
            raise ChecksumMismatch(f"{uri} has {size:,} bytes, its manifest names {self.size:,}; restore it")
        if digest.hexdigest() != self.sha256:
            raise ChecksumMismatch(f"{uri} is damaged: its checksum is not the manifest's; restore it")


@dataclass(frozen=True, slots=True)
class EmbedderRef:
    """Which embedder made the vectors: `fingerprint` decides, the rest is for people."""

    fingerprint: str
    backbone: str
    weights: str

    @property
    def untrained(self) -> bool:
        """Tell whether the weights are random: such scores rank by look alone."""
        return self.weights.startswith("untrained")


@dataclass(frozen=True, slots=True)
class Shard:
    """One index shard: the rows whose uri hashes to the buckets [first, last)."""

    number: int
    buckets: tuple[int, int]
    rows: int
    lists: FileEntry
    refine: FileEntry | None
    records: FileEntry
    raw: FileEntry | None = None
    """8-bit codes of the whole vectors, where answers are ranked by them at last."""

    @property
    def files(self) -> list[FileEntry]:
        """Return the shard's files."""
        return [entry for entry in (self.lists, self.refine, self.raw, self.records) if entry is not None]


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How an index is searched unless the caller says otherwise."""

    nprobe: int
    """Inverted lists visited a query."""
    rerank: int
    """Candidates ranked again by their 8-bit codes; 0 where the lists hold the vectors themselves."""
    ef_search: int = 0
    """Centroids that the coarse quantizer's graph keeps in view; 0 where it is no graph."""
    rerank_raw: int = 0
    """Of those, how many are ranked a last time by the codes of their whole vectors; 0 where there are none."""


@dataclass(frozen=True, slots=True)
class Document:
    """A JSON document with a format version, and the SHA-256 of everything else in it."""

    FORMAT: ClassVar[int] = 1

    def to_json(self) -> bytes:
        """Serialize with sorted keys."""
        body = {"format_version": self.FORMAT, **dataclasses.asdict(self)}
        body["checksum"] = _checksum(body)
        return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, uri: str) -> Self:
        """Parse; `uri` is named in errors."""
        try:
            body = json.loads(data)
            found = body["format_version"]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise FormatError(f"{uri} is not a manifest of this project, or it is damaged") from None
        if found != cls.FORMAT:
            raise UnsupportedVersion(
                f"{uri} has format version {found}, this release reads {cls.FORMAT}; "
                f"{'upgrade lookalike' if isinstance(found, int) and found > cls.FORMAT else 'build it again'}"
            )
        if "checksum" not in body:
            raise FormatError(f"{uri} is damaged: it has no checksum")
        if body.pop("checksum") != _checksum(body):
            raise ChecksumMismatch(f"{uri} is damaged: its checksum is not that of its content; restore it")
        try:
            document: Self = _build(cls, body)
            return document
        except (TypeError, KeyError, ValueError) as error:
            raise FormatError(f"{uri} is damaged: {error}") from None

    @classmethod
    def load(cls, uri: str) -> Self:
        """Read and parse the document at `uri`."""
        return cls.from_json(storage.read(uri), uri)


@dataclass(frozen=True, slots=True)
class IndexManifest(Document):
    """One version of an index, `INDEX/versions/<version>/manifest.json`."""

    version: str
    kind: str
    """`ivf-pq`, or `exact` for a collection too small to train on."""
    metric: str
    rows: int
    dim: int
    """Length of the vectors that are asked with."""
    reduced_dim: int
    """Length inside the index."""
    embedder: EmbedderRef
    quantizer: str
    trained: FileEntry
    shards: tuple[Shard, ...]
    parameters: dict[str, Any]
    search: SearchSettings
    measured: dict[str, Any]
    lineage: dict[str, Any]
    created: str
    built_with: dict[str, str]


@dataclass(frozen=True, slots=True)
class Accounting:
    """Where every listed image went: `listed = embedded + reused + rejected`."""

    listed: int
    embedded: int
    reused: int
    rejected: dict[str, int]
    """Counts of this run's rejects by reason."""
    relabelled: int = 0
    """Of the reused, those whose label changed."""
    gone: int = 0
    """In the parent run's catalog and no longer listed."""

    @property
    def rejects(self) -> int:
        """Return the rejects of all reasons."""
        return sum(self.rejected.values())

    @property
    def closes(self) -> bool:
        """Tell whether nothing vanished."""
        return self.listed == self.embedded + self.reused + self.rejects


@dataclass(frozen=True, slots=True)
class RunManifest(Document):
    """One committed run of a store, `STORE/runs/<run_id>/manifest.json`."""

    run_id: str
    embedder: EmbedderRef
    dim: int
    rows: int
    """Rows of the catalog: live images, rejected ones included."""
    live: int
    """Rows with an embedding."""
    parts: tuple[FileEntry, ...]
    """Parts the catalog refers to, by name relative to the store."""
    catalog: tuple[FileEntry, ...]
    plan: tuple[FileEntry, ...]
    """What the run set out from: units of new images, then kept rows."""
    listing_digest: str
    """SHA-256 over uri and etag of everything listed, in order."""
    accounting: Accounting
    images: tuple[str, ...]
    parent: str | None
    created: str
    built_with: dict[str, str] = field(default_factory=dict)


def built_with() -> dict[str, str]:
    """Return the versions of what can change bytes, for the record."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("lookalike", "numpy", "pyarrow", "faiss-cpu", "pillow", "ai-edge-litert", "keras", "tensorflow"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def load_index_manifest(index: str, version: str | None = None) -> IndexManifest:
    """Load the manifest of an index's current (or named) version."""
    if version is None:
        current = read_current(index, "version")
        if current is None:
            raise NotFound(f"{index} is not a published index: it has no CURRENT; build one with `lookalike index`")
        version = current.name
    return IndexManifest.load(storage.join(index, "versions", version, "manifest.json"))


def load_run_manifest(store: str, run_id: str | None = None) -> RunManifest:
    """Load the manifest of a store's current (or named) run."""
    if run_id is None:
        current = read_current(store, "run")
        if current is None:
            raise NotFound(f"{store} is not an embedding store: it has no CURRENT; fill one with `lookalike embed`")
        run_id = current.name
    return RunManifest.load(storage.join(store, "runs", run_id, "manifest.json"))


def _checksum(body: dict[str, Any]) -> str:
    return storage.sha256(json.dumps(body, sort_keys=True).encode())


def _build(kind: Any, value: Any) -> Any:
    """Rebuild annotated dataclasses, tuples and optionals from JSON values."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        items = _checked(dict, value).items()
        return kind(**{name: _build(hints[name], item) for name, item in items if name in names})
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _build(next(arg for arg in args if arg is not type(None)), value)
    if origin is tuple:
        inner = [args[0]] * len(_checked(list, value)) if args[-1] is Ellipsis else args
        return tuple(_build(arg, item) for arg, item in zip(inner, _checked(list, value), strict=True))
    return _checked(origin or kind, value)


def _checked(kind: Any, value: Any) -> Any:
    if kind in (dict, int, list, str) and not isinstance(value, kind):
        raise TypeError(f"{value!r} where a {kind.__name__} belongs")
    return value
