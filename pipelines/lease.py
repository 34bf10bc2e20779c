"""One run at a time: a lease on a store or an index, kept in an object that moves by compare-and-swap.

`ROOT/LEASE` says who holds it and until when. A thread renews it every third of its length; a run that ends marks it
released, and one that died leaves it to run out, upon which the next run takes it over. `fence` counts the takings.

What is assumed of clocks: those of two machines differ by less than a quarter of a lease (30 s of 120), for it is taken
over that long after it ran out. Its holder goes by a clock that nobody sets and that a stopped process does not stop.
A lease that ran out is never revived, even if nobody took it. Between a check and the move of a pointer that follows, a
process may still be stopped for hours: the pointer's own compare-and-swap refuses it then, if another run moved it.
"""

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from serving import storage
from serving.errors import Conflict, LeaseHeld, LeaseLost, LookalikeError, UsageError
from serving.manifest import Document

LEASE = "LEASE"
SECONDS = 120.0
"""Length of a lease unless the caller says otherwise."""

_MARGIN = 0.25
"""Share of its length that clocks may differ by."""
_RELEASE_WITHIN = 3.0
"""Seconds that the end of a run waits for its lease to be released; a lease that is not runs out by itself."""

Guard = Callable[[], None]
"""Called right before a pointer is moved; raises when it must not be."""

_logger = logging.getLogger(__name__)


def unguarded() -> None:
    """Let a pointer be moved."""


@dataclass(frozen=True, slots=True)
class LeaseDocument(Document):
    """The content of `LEASE`; times are UTC, ISO 8601."""

    holder: str
    """Random; no two takings have the same."""
    host: str
    pid: int
    job: str
    since: str
    expires: str
    seconds: float
    fence: int
    released: bool = False

    def has_run_out(self, now: datetime) -> bool:
        """Tell whether it may be taken over."""
        margin = timedelta(seconds=self.seconds * _MARGIN)
        return self.released or datetime.fromisoformat(self.expires) + margin <= now

    @property
    def who(self) -> str:
        """Name the holder."""
        return f"`lookalike {self.job}` on {self.host} (process {self.pid})"


class Clock:
    """The time, and the seconds since some moment by a clock that nobody sets and that suspending does not stop."""

    _ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def now(self) -> datetime:
        """Return the time in UTC."""
        return datetime.now(UTC)

    def elapsed(self) -> float:
        """Return seconds."""
        return time.clock_gettime(self._ELAPSED)

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


class Lease:
    """A lease of this process on the store or index `root`; get one from `leased`."""

    def __init__(self, root: str, job: str, seconds: float, clock: Clock) -> None:
        self._root, self._uri = root, storage.join(root, LEASE)
        self._job, self._seconds, self._clock = job, seconds, clock
        self._holder = secrets.token_hex(8)
        self._deadline = clock.elapsed()
        self._over = threading.Event()
        self.fence = 0

    def check(self) -> None:
        """Raise `LeaseLost` unless this process holds the lease: by its own clock, and by the object, read anew."""
        self._refuse_if_run_out()
        self._read_own()

    def take(self, wait: float) -> None:
        """Take the lease, once it is free; raise `LeaseHeld` when it is not within `wait` seconds."""
        started = seen_at = self._clock.elapsed()
        seen = None
        while (held := self._try_to_take(None)) is not None:
            now = self._clock.elapsed()
            if seen is None and wait > 0:
                _logger.warning("waiting for %s, which holds %s", held.who, self._root)
            if held != seen:
                seen, seen_at = held, now
            # Not renewed in all the time that we looked: it has run out, whatever the clock of its holder says.
            elif now - seen_at > held.seconds * (1 + _MARGIN) and self._try_to_take(held) is None:
                return
            left = started + wait - now
            if not left > 0:
                raise LeaseHeld(
                    f"{self._root} is in use by {held.who} since {_short(held.since)}, which holds it until "
                    f"{_short(held.expires)} and renews that while it works; run again later, or let this wait with "
                    f"--wait SECONDS (if that run is surely dead, delete {self._uri})"
                )
            self._clock.sleep(min(left, 2.0, self._seconds / 10))

    def keep(self) -> None:
        """Renew the lease until it is over or was lost, then release it."""
        pause = self._seconds / 3
        while not self._over.wait(pause):
            try:
                self._renew()
                pause = self._seconds / 3
            except LeaseLost:
                break  # which `check` will say
            except LookalikeError:
                pause = self._seconds / 12  # the store may answer yet, before the lease runs out
        with suppress(LookalikeError):
            self._release()

    def end(self) -> None:
        """Let `keep` come to its end."""
        self._over.set()

    def _try_to_take(self, dead: LeaseDocument | None) -> LeaseDocument | None:
        """Take the lease if it is free or still that of `dead`; return the one that stands in the way."""
        store = storage.of(self._uri)
        while True:
            found = store.read_pointer(self._uri)
            held = None if found is None else LeaseDocument.from_json(found[0], self._uri)
            now, started = self._clock.now(), self._clock.elapsed()
            if held is not None and held != dead and not held.has_run_out(now):
                return held
            fence = 1 if held is None else held.fence + 1
            lease = LeaseDocument(
                holder=self._holder,
                host=socket.gethostname(),
                pid=os.getpid(),
                job=self._job,
                since=_iso(now),
                expires=_iso(now + timedelta(seconds=self._seconds)),
                seconds=self._seconds,
                fence=fence,
            )
            try:
                store.swap_pointer(self._uri, lease.to_json(), None if found is None else found[1])
            except Conflict:
                continue  # another run was quicker: look who
            self._deadline, self.fence = started + self._seconds, fence
            return None

    def _renew(self) -> None:
        self._refuse_if_run_out()
        own, token = self._read_own()
        started = self._clock.elapsed()
        expires = _iso(self._clock.now() + timedelta(seconds=self._seconds))
        storage.of(self._uri).swap_pointer(self._uri, replace(own, expires=expires).to_json(), token)
        self._refuse_if_run_out()  # amid that request
        self._deadline = started + self._seconds

    def _release(self) -> None:
        own, token = self._read_own()
        storage.of(self._uri).swap_pointer(self._uri, replace(own, released=True).to_json(), token)

    def _refuse_if_run_out(self) -> None:
        late = self._clock.elapsed() - self._deadline
        if late >= 0:
            raise LeaseLost(
                f"this run's lease on {self._root} ran out {late:.0f} s ago, as happens when a process is stopped or "
                "its store does not answer; nothing was published, run again"
            )

    def _read_own(self) -> tuple[LeaseDocument, str]:
        """Read the object; `LeaseLost` unless it is this lease's."""
        found = storage.of(self._uri).read_pointer(self._uri)
        if found is None:
            raise LeaseLost(f"{self._uri} was deleted under this run; nothing was published, run again")
        held = LeaseDocument.from_json(found[0], self._uri)
        if held.holder != self._holder:
            raise LeaseLost(
                f"{self._root} was taken over by {held.who} at {_short(held.since)}, after this run's lease ran out; "
                "nothing was published, run again when that one is done"
            )
        return held, found[1]


@contextmanager
def leased(
    root: str, job: str, seconds: float | None = None, wait: float = 0.0, clock: Clock | None = None
) -> Iterator[Lease]:
    """Hold the store or index `root` for `job`, `seconds` at a time, as long as the block runs.

    `LeaseHeld` when another run holds it and does not let go within `wait` seconds.
    """
    if not wait >= 0:  # NaN neither
        raise UsageError(f"--wait is {wait:g}; take 0 seconds or more")
    lease = Lease(root, job, SECONDS if seconds is None else seconds, clock or Clock())
    lease.take(wait)
    keeper = threading.Thread(target=lease.keep, name=f"lease on {root}", daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        lease.end()
        keeper.join(_RELEASE_WITHIN)


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")


def _short(moment: str) -> str:
    return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M:%S} UTC"
