"""What the object stores share: limits, the logic above single requests, and the sentences of their failures."""

import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from serving.errors import AccessDenied, Changed, Conflict, NotFound, StorageError, TimedOut
from serving.storage import Entry, normalize, scheme_of, split_bucket

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0  # without a single byte
GIVE_UP_SECONDS = 120.0
ATTEMPTS = 5
CONNECTIONS = 64  # kept open: more threads than this reconnect for every object

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class RemoteStorage(ABC):
    """The half of `Storage` that is alike on all object stores; the other half is their requests."""

    def list(self, uri: str) -> Iterator[Entry]:
        """Yield the objects below a folder; a URI that names one object yields that one, as a file on disk does."""
        uri = normalize(uri)
        empty = True
        for entry in self._below(uri):
            empty = False
            yield entry
        if empty and split_bucket(uri)[1]:
            with suppress(NotFound):
                yield self.stat(uri)

    def read(self, uri: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        """Read an object or a range of it in one request; past its end there is nothing."""
        # No range header can ask for nothing, and a missing object must still be noticed.
        with suppress(PastTheEnd):
            return self._get(uri, start, 1 if length == 0 else length, etag)[0][:length]
        return b""

    def create(self, uri: str, data: bytes) -> bool:
        """Write in one conditional request."""
        return self._put_once(uri, data, None)

    def read_pointer(self, uri: str) -> tuple[bytes, str] | None:
        """Read the object; its token is its etag."""
        try:
            return self._get(uri, 0, None, None)
        except NotFound:
            return None

    def swap_pointer(self, uri: str, data: bytes, token: str | None) -> None:
        """Write on the condition that the object is still the one of `token`."""
        if not self._put_once(uri, data, token):
            raise Conflict(f"{uri} was moved by another run; look at it, then run again")

    def _put_once(self, uri: str, data: bytes, token: str | None) -> bool:
        # When an answer is lost, the client writes again and is refused because of its own first write.
        # The writer's mark on the object tells that refusal from a real one.
        writer = secrets.token_hex(8)
        return self._put(uri, data, token, writer) or self._writer(uri) == writer

    @abstractmethod
    def stat(self, uri: str) -> Entry:
        """Describe one object."""

    @abstractmethod
    def _below(self, uri: str) -> Iterator[Entry]:
        """Yield the objects whose keys begin with the key of `uri` and a slash, in the order of their keys."""

    @abstractmethod
    def _get(self, uri: str, start: int, length: int | None, etag: str | None) -> tuple[bytes, str]:
        """Read bytes and the etag of the object they came from, or raise `PastTheEnd`."""

    @abstractmethod
    def _put(self, uri: str, data: bytes, token: str | None, writer: str) -> bool:
        """Write if the object's etag is `token` (None: if it is absent), marked with `writer`; False if refused."""

    @abstractmethod
    def _writer(self, uri: str) -> str | None:
        """Return the mark of whoever wrote the object that is there now."""


class PastTheEnd(StorageError):
    """A range begins behind the last byte."""


def anonymous() -> bool:
    """Tell whether requests are to go out unsigned, as public buckets allow."""
    return os.environ.get("LOOKALIKE_ANONYMOUS", "") not in ("", "0")


def microseconds(moment: datetime) -> int:
    """Convert to microseconds since 1970, exactly."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def prefix_of(uri: str) -> str:
    """Return what the keys of all objects below `uri` begin with."""
    key = split_bucket(uri)[1]
    return f"{key}/" if key else ""


def no_bucket(uri: str) -> NotFound:
    """Say that the whole bucket is missing."""
    return NotFound(f"the bucket {scheme_of(uri)}://{split_bucket(uri)[0]} does not exist; check its name or create it")


def refused(uri: str, status: int, detail: str, sign_in: str) -> StorageError:
    """Turn an HTTP status into the error to raise; `sign_in` says how to get credentials."""
    detail = f"{status} {' '.join(detail.split())[:200]}".strip()
    if status == 404:
        return NotFound(f"{uri} does not exist")
    if status in (401, 403):
        return AccessDenied(f"{uri}: access denied ({detail}); check the rights on the bucket, {sign_in}")
    if status == 412:
        return Changed(f"{uri} has changed since it was listed")
    if status == 416:
        return PastTheEnd(f"{uri} ends before the range asked for")
    if status == 429 or status >= 500:
        return StorageError(f"{uri}: the store is busy or failing ({detail}); run again later")
    return StorageError(f"{uri}: the store refused the request ({detail}); check the bucket and the name")


def unreachable(uri: str, error: BaseException) -> StorageError:
    """Say that no connection could be made or kept."""
    return StorageError(f"{uri}: the store cannot be reached ({type(error).__name__}); check the network and endpoint")


def late(uri: str, error: BaseException) -> TimedOut:
    """Say that an answer did not come in time."""
    return TimedOut(f"{uri}: no answer in time ({type(error).__name__}); check the network, then run again")
