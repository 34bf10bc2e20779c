"""Objects on a local disk, Google Cloud Storage or S3, behind one small interface.

A URI is a plain path, `file:///path`, `gs://bucket/key` or `s3://bucket/key`. Local URIs are always returned as
absolute plain paths, so that one file has one name. Keys are taken literally: `#`, `%`, `?`, `*`, `[` and spaces
are ordinary characters. There is one client per scheme and process, made on first use and safe to share by threads.
"""

import functools
import hashlib
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol, cast
from urllib.parse import unquote, urlsplit

from serving.errors import NotFound, UsageError


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed object: `etag` changes whenever its bytes do; `updated` is in microseconds since 1970, UTC."""

    uri: str
    size: int
    etag: str
    updated: int


class Storage(Protocol):
    """What every kind of storage does; all methods take whole URIs and raise `StorageError`."""

    def list(self, uri: str) -> Iterator[Entry]:
        """Yield all objects below the folder `uri`, sorted by URI (by code point), at any depth.

        A missing bucket or local folder raises `NotFound`; an empty one yields nothing.
        """
        ...

    def stat(self, uri: str) -> Entry:
        """Describe one object, or raise `NotFound`."""
        ...

    def read(self, uri: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        """Read an object, or `length` bytes of it from `start`; `Changed` when `etag` is given and differs."""
        ...

    def create(self, uri: str, data: bytes) -> bool:
        """Write a new object in one step; False, and nothing written, when it exists."""
        ...

    def read_pointer(self, uri: str) -> tuple[bytes, str] | None:
        """Read a small movable object and the token of its present state; None when there is none."""
        ...

    def swap_pointer(self, uri: str, data: bytes, token: str | None) -> None:
        """Move a pointer from the state `token` (None: absent) to `data`, or raise `Conflict`."""
        ...

    def delete(self, uri: str) -> None:
        """Remove an object; a missing one is no error."""
        ...


def scheme_of(uri: str) -> str:
    """Return `file`, `gs` or `s3`."""
    head, mark, _ = uri.partition("://")
    scheme = head.lower() if mark else "file"
    if scheme not in ("file", "gs", "s3"):
        raise UsageError(f"{uri}: the scheme {scheme}:// is not known; use a path, gs:// or s3://")
    return scheme


def normalize(uri: str) -> str:
    """Give the one spelling of `uri`: an absolute path, or scheme, bucket and key without a trailing slash."""
    if not uri:
        raise UsageError("an empty path names nothing; give a folder, gs://bucket/prefix or s3://bucket/prefix")
    if scheme_of(uri) != "file":
        scheme, _, rest = uri.partition("://")
        bucket, _, key = rest.partition("/")
        if not bucket:
            raise UsageError(f"{uri}: the bucket's name is missing; write {scheme}://bucket/prefix")
        return f"{scheme.lower()}://{bucket}/{key.rstrip('/')}".rstrip("/")
    if "://" in uri:
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise UsageError(f"{uri}: file URIs name this machine only; write file:///path")
        uri = unquote(uri.split("://", 1)[1].removeprefix("localhost"))
    return os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *names: str) -> str:
    """Append names to a URI."""
    return "/".join([uri.rstrip("/"), *names])


def name_of(uri: str) -> str:
    """Return the last part of a URI."""
    return uri.rstrip("/").rpartition("/")[2]


def split_bucket(uri: str) -> tuple[str, str]:
    """Split `scheme://bucket/key` into bucket and key."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


@functools.cache
def _client(scheme: str) -> Storage:
    if scheme == "gs":
        from serving.gcs import GoogleStorage

        return GoogleStorage()
    if scheme == "s3":
        from serving.s3 import S3Storage

        return S3Storage()
    from serving.disk import DiskStorage

    return DiskStorage()


# functools.cache alone would let threads that start together each make a client.
_making = threading.Lock()


def of(uri: str) -> Storage:
    """Return the process's client for `uri`."""
    with _making:
        return _client(scheme_of(uri))


def list_entries(uri: str) -> Iterator[Entry]:
    """Yield all objects below `uri`, sorted by URI; see `Storage.list`."""
    return of(uri).list(uri)


def read(uri: str, etag: str | None = None) -> bytes:
    """Read a whole object; `Changed` when `etag` is given and the object has another."""
    return of(uri).read(uri, etag=etag)


def create(uri: str, data: bytes) -> bool:
    """Write a new object in one step; False, and nothing written, when it exists."""
    return of(uri).create(uri, data)


def exists(uri: str) -> bool:
    """Tell whether there is an object at `uri`."""
    try:
        of(uri).stat(uri)
    except NotFound:
        return False
    return True


def open_binary(uri: str) -> BinaryIO:
    """Open an object for reading with seeks: the file itself on disk, ranged reads elsewhere."""
    if scheme_of(uri) == "file":
        from serving.disk import open_file

        return open_file(uri)
    # Reading ahead by 1 MiB keeps Parquet's footer and a small column chunk at one request each.
    return cast(BinaryIO, io.BufferedReader(_RangeReader(uri), buffer_size=1 << 20))


def temporaries(uri: str) -> list[Entry]:
    """Describe the files that writers of the object `uri`, killed or at work, have beside it; only disks have such."""
    if scheme_of(uri) != "file":
        return []
    from serving.disk import temporaries_beside

    return list(temporaries_beside(uri))


def is_temporary(uri: str) -> bool:
    """Tell whether what is listed under `uri` is such a file."""
    if scheme_of(uri) != "file":
        return False
    from serving.disk import is_temporary

    return is_temporary(uri)


def prune(uri: str) -> None:
    """Remove the folder `uri` and those below it that are empty; only disks have such."""
    if scheme_of(uri) == "file":
        from serving.disk import prune

        prune(uri)


def sha256(data: bytes | memoryview) -> str:
    """Return the hex SHA-256 that manifests record."""
    return hashlib.sha256(data).hexdigest()


class _RangeReader(io.RawIOBase):
    """A seekable view of a remote object; `Changed` when it is replaced meanwhile."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        entry = of(uri).stat(uri)
        self._size, self._etag = entry.size, entry.etag
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), self._size - self._at)
        if length <= 0:
            return 0
        data = of(self._uri).read(self._uri, self._at, length, self._etag)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
