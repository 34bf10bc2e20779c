"""List images: folders, globs and manifests on disk or in a bucket, as one stream sorted by uri."""

import csv
import fnmatch
import heapq
import io
import itertools
import json
import operator
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq

from serving import storage
from serving.errors import NotFound, StorageError, UsageError
from serving.storage import Entry
from transforms.schema import ImageRef

# What people keep pictures in. Those we cannot decode are here too: better a counted reject than silence.
EXTENSIONS = {
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif"),
    *("ppm", "pgm", "pbm", "pnm", "heic", "heif", "jxl", "jp2", "j2k", "svg"),
}
MANIFESTS = (".csv", ".parquet", ".jsonl", ".ndjson")

_STATS_AT_ONCE = 16
_STATS_AHEAD = 1024


class Listing:
    """Everything a run was pointed at, sorted by uri, each uri once. Iterate as often as needed.

    `labels` is `parent` (the name of the image's folder below the one listed; none for images directly in that one),
    `none`, or a manifest to look uris up in. A manifest among the `inputs` brings its own labels. Of an image that
    several inputs name, some label is kept: a manifest's before a folder's, whatever the order of the inputs.
    `skipped` counts the files that a folder listing passed over because their names are no image's; `all_files` lists
    those too.
    """

    def __init__(self, inputs: Sequence[str], labels: str = "parent", all_files: bool = False) -> None:
        if not inputs:
            raise UsageError("no images were named; give a folder, a glob, gs://bucket/prefix or a manifest")
        self.inputs = tuple(storage.normalize(uri) for uri in inputs)
        self.skipped = 0
        self._all_files = all_files
        self._parent = labels == "parent"
        self._labels = None if labels in ("parent", "none") else _labels_of(labels)

    def __iter__(self) -> Iterator[ImageRef]:
        self.skipped = 0
        manifests_first = sorted(self.inputs, key=lambda uri: (not _is_manifest_name(uri), uri))
        merged = heapq.merge(*map(self._refs, manifests_first), key=_uri)
        for _, same in itertools.groupby(merged, key=_uri):
            refs = list(same)
            yield next((ref for ref in refs if ref.label is not None), refs[0])

    def _refs(self, uri: str) -> Iterator[ImageRef]:
        if _is_manifest_name(uri) and not _is_folder(uri):
            yield from _manifest_refs(uri)
            return
        root, pattern = split_glob(uri)
        for entry in _entries(root):
            if pattern is not None:
                if not matches(_path_below(root, entry.uri), pattern):
                    continue
            elif not self._all_files and entry.uri != root and not is_image_name(entry.uri):
                self.skipped += 1
                continue
            yield ImageRef(entry.uri, entry.etag, entry.size, entry.updated, self._label(entry.uri, root))

    def _label(self, uri: str, root: str) -> str | None:
        if self._labels is not None:
            return self._labels.get(uri)
        folders = _path_below(root, uri)[:-1]
        return folders[-1] if self._parent and folders else None


_uri = operator.attrgetter("uri")


def _is_manifest_name(uri: str) -> bool:
    return uri.lower().endswith(MANIFESTS)


def _is_folder(uri: str) -> bool:
    if storage.scheme_of(uri) == "file":
        return os.path.isdir(uri)
    return not storage.exists(uri) and next(storage.list_entries(uri), None) is not None


def _labels_of(labels: str) -> dict[str, str | None]:
    if not _is_manifest_name(labels):
        kinds = ", ".join(MANIFESTS)
        raise UsageError(f"--labels is {labels}; it takes parent, none, or a manifest whose name ends in {kinds}")
    return dict(read_manifest(storage.normalize(labels)))


def is_image_name(uri: str) -> bool:
    """Tell whether the name ends like a picture's."""
    return uri.rpartition(".")[2].lower() in EXTENSIONS


def split_glob(uri: str) -> tuple[str, tuple[str, ...] | None]:
    """Split a glob into the folder before its first wildcard and the pattern's parts; no wildcard, no parts."""
    if not any(char in uri for char in "*?[") or (storage.scheme_of(uri) == "file" and storage.exists(uri)):
        return uri, None
    parts = uri.split("/")
    first = next(i for i, part in enumerate(parts) if any(char in part for char in "*?["))
    if "://" in uri and first < 3:
        raise UsageError(f"{uri}: the bucket's name cannot hold wildcards; name one bucket, or several inputs")
    if storage.scheme_of(uri) == "file":
        # A folder whose own name holds a wildcard character is meant literally.
        while first < len(parts) and os.path.isdir("/".join(parts[: first + 1])):
            first += 1
    return ("/".join(parts[:first]) or "/", tuple(parts[first:]) or None)


def _path_below(root: str, uri: str) -> tuple[str, ...]:
    return tuple(uri[len(root.rstrip("/")) + 1 :].split("/"))


def matches(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Match the parts of a path against a glob's: `*`, `?` and `[…]` stay within a part, `**` spans any number."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(matches(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and matches(path[1:], pattern[1:])


def read_manifest(uri: str) -> list[tuple[str, str | None]]:
    """Read (uri, label) pairs from CSV, Parquet or JSONL; relative uris are looked up beside the manifest."""
    reader = {".csv": _read_csv, ".parquet": _read_parquet}.get(uri[uri.rfind(".") :].lower(), _read_jsonl)
    data = storage.read(uri)
    try:
        rows = reader(data)
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{uri} cannot be read as a manifest: {error}") from None
    folder = uri.rpartition("/")[0]
    seen: dict[str, str | None] = {}
    for name, label in rows:
        if not isinstance(name, str) or not name or "\0" in name:
            raise UsageError(f"{uri}: every row needs a `uri`; one has {name!r}")
        plain = "://" not in name and not name.startswith(("/", "~"))
        image = storage.normalize(storage.join(folder, name) if plain else name)
        text = None if label in (None, "") else str(label)
        if seen.setdefault(image, text) != text:
            raise UsageError(f"{uri} names {image} twice, as {seen[image]!r} and as {text!r}; keep one")
    return list(seen.items())


def _read_csv(data: bytes) -> list[tuple[str | None, str | None]]:
    # Not splitlines(): a quoted field may hold ends of lines, and names what Python alone takes for one (U+2028).
    rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    if "uri" not in (rows.fieldnames or ()):
        raise ValueError(f"the first line must name a column `uri`; it names {rows.fieldnames}")
    return [(row["uri"], row.get("label")) for row in rows]


def _read_parquet(data: bytes) -> list[tuple[str | None, str | None]]:
    table = pq.read_table(pa.BufferReader(data))
    if "uri" not in table.column_names:
        raise ValueError(f"it needs a column `uri`; it has {table.column_names}")
    labels = table["label"].to_pylist() if "label" in table.column_names else itertools.repeat(None, len(table))
    return list(zip(table["uri"].to_pylist(), labels, strict=True))


def _read_jsonl(data: bytes) -> list[tuple[str | None, str | None]]:
    rows = [json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError('every line must be an object like {"uri": "…", "label": "…"}')
    pairs = [(row.get("uri"), row.get("label")) for row in rows]
    for name, label in pairs:
        f"{name}{label}".encode()  # an escaped half of a surrogate pair is no text: a ValueError
    return pairs


def _manifest_refs(uri: str) -> Iterator[ImageRef]:
    labels = sorted(read_manifest(uri))
    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        for start in range(0, len(labels), _STATS_AHEAD):  # map() alone would queue millions before the first
            window = labels[start : start + _STATS_AHEAD]
            for entry, (_, label) in zip(pool.map(_stat, (image for image, _ in window)), window, strict=True):
                yield ImageRef(entry.uri, entry.etag, entry.size, entry.updated, label)


def _stat(uri: str) -> Entry:
    try:
        return storage.of(uri).stat(uri)
    except StorageError:
        return Entry(uri, 0, "", 0)  # listed all the same, and rejected when it cannot be read


def _entries(root: str) -> Iterator[Entry]:
    entries = storage.list_entries(root)
    first = next(entries, None)
    if first is not None:
        yield first
        yield from entries
    elif storage.scheme_of(root) != "file" and storage.split_bucket(root)[1]:
        with suppress(NotFound):  # a bucket's prefix may be the name of one object
            yield storage.of(root).stat(root)
