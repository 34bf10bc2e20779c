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
_LOCAL = 8
"""Local files that one thread reads in turn: a change of threads takes longer than a read from the page cache."""


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
        self._at_once = _LOCAL if all(storage.scheme_of(ref.uri) == "file" for ref in refs) else 1
        self._waiting = deque(enumerate(refs))
        self._ready: deque[Read] = deque()
        self._left = len(refs)
        self._open = self._bytes = 0
        self.seconds = 0.0
        """What all reads took together; they overlap."""
        self._changed = Condition()
        with self._changed:
            self._submit()

    @property
    def left(self) -> int:
        """Return how many images nobody has taken yet."""
        return self._left

    def take(self, most: int = 1) -> list[Read]:
        """Wait for an image and hand over what has come, up to `most`; none when all were taken, or it was stopped."""
        with self._changed:
            while not self._ready and self._left:
                self._changed.wait()
            taken = [self._ready.popleft() for _ in range(min(most, len(self._ready), self._left))]
            self._left -= len(taken)
            self._open -= len(taken)
            self._bytes -= sum(read.ref.size for read in taken)
            self._submit()
            if not self._left:
                self._changed.notify_all()
            return taken

    def stop(self) -> None:
        """Read no more, and let nobody wait."""
        with self._changed:
            self._waiting.clear()
            self._ready.clear()
            self._left = 0
            self._changed.notify_all()

    def _submit(self) -> None:
        while some := self._next():
            self._pool.submit(self._read, some)

    def _next(self) -> list[tuple[int, ImageRef]]:
        """Take from what waits as much as one thread is to read."""
        some: list[tuple[int, ImageRef]] = []
        while self._waiting and self._open < self._ahead.images and len(some) < self._at_once:
            place, ref = self._waiting[0]
            if self._open and self._bytes + ref.size > self._ahead.bytes:
                break
            self._waiting.popleft()
            self._open += 1
            self._bytes += ref.size
            some.append((place, ref))
        return some

    def _read(self, some: Sequence[tuple[int, ImageRef]]) -> None:
        for place, ref in some:
            self._read_one(place, ref)

    def _read_one(self, place: int, ref: ImageRef) -> None:
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
