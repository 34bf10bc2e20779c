"""Read a unit's images ahead of those who decode them, bounded in number and bytes."""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from threading import Condition

from serving import storage
from serving.errors import ImageRejected, StorageError
from serving.images import Limits
from transforms.schema import ImageRef

_TRIES = 4


@dataclass(frozen=True, slots=True)
class Ahead:
    """How far reading may be ahead of decoding."""

    images: int = 32
    """Images being read or waiting: as many requests are under way at once."""
    bytes: int = 64 * 2**20
    """Bytes of them, as listed; an image larger than this is read alone."""


@dataclass(frozen=True, slots=True)
class Read:
    """One image as it came from the store: its bytes, or why there are none."""

    place: int
    """Its place in the unit."""
    ref: ImageRef
    data: bytes | None
    error: BaseException | None
    seconds: float


def read_image(ref: ImageRef, limits: Limits) -> bytes:
    """Read the very version that was listed, whole, or raise `ImageRejected` or `StorageError`."""
    if ref.size > limits.max_bytes:
        raise ImageRejected("too_large", f"{ref.size:,} bytes; the limit is {limits.max_bytes:,}")
    if not ref.etag:  # listed by hand: nobody knows its size
        return storage.read(ref.uri)
    for _ in range(_TRIES):
        data = storage.read(ref.uri, etag=ref.etag)
        if len(data) == ref.size:
            return data
    raise StorageError(f"{ref.uri}: {len(data):,} bytes came of {ref.size:,}; check the store, then run again")


class Reading:
    """A unit being read by the threads of `pool`; any number of others `take` what has come, in whatever order."""

    def __init__(self, refs: Sequence[ImageRef], limits: Limits, pool: Executor, ahead: Ahead) -> None:
        self._limits = limits
        self._pool = pool
        self._ahead = ahead
        self._waiting = deque(enumerate(refs))
        self._ready: deque[Read] = deque()
        self._left = len(refs)
        self._open = self._bytes = 0
        self.seconds = 0.0
        """What all reads took together; they overlap."""
        self._changed = Condition()
        with self._changed:
            self._submit()

    def take(self) -> Read | None:
        """Wait for an image and hand it over; None when all were taken or the reading was stopped."""
        with self._changed:
            while not self._ready and self._left:
                self._changed.wait()
            if not self._left:
                return None
            self._left -= 1
            read = self._ready.popleft()
            self._open -= 1
            self._bytes -= read.ref.size
            self._submit()
            if not self._left:
                self._changed.notify_all()
            return read

    def stop(self) -> None:
        """Read no more, and let nobody wait."""
        with self._changed:
            self._waiting.clear()
            self._ready.clear()
            self._left = 0
            self._changed.notify_all()

    def _submit(self) -> None:
        while self._waiting and self._open < self._ahead.images:
            place, ref = self._waiting[0]
            if self._open and self._bytes + ref.size > self._ahead.bytes:
                return
            self._waiting.popleft()
            self._open += 1
            self._bytes += ref.size
            self._pool.submit(self._read, place, ref)

    def _read(self, place: int, ref: ImageRef) -> None:
        started = time.perf_counter()
        data: bytes | None = None
        failed: BaseException | None = None
        try:
            data = read_image(ref, self._limits)
        except BaseException as error:  # whoever takes it decides
            failed = error
        read = Read(place, ref, data, failed, time.perf_counter() - started)
        with self._changed:
            self.seconds += read.seconds
            if self._left:
                self._ready.append(read)
                self._changed.notify()
