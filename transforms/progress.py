"""Heartbeats: how many items the workers on this machine have done, while Beam itself is silent.

Each DoFn instance keeps one small file in a shared local folder up to date; the launcher adds them up. The other way,
a file there tells them to stop.
"""

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_EVERY = 0.25  # seconds between writes, and between looks
_STOP = "stop"


class Heartbeat:
    """One worker's tally, safe to add to from many threads; without a folder it is silent."""

    def __init__(self, folder: str | None) -> None:
        self._path = Path(folder, f"{os.getpid()}-{secrets.token_hex(4)}") if folder else None
        self._lock = threading.Lock()
        self._done = self._rejected = 0
        self._next = 0.0

    def add(self, done: int = 1, rejected: int = 0) -> None:
        """Count items as done, some of them rejected; raise `KeyboardInterrupt` when the run was told to stop."""
        with self._lock:
            self._done += done
            self._rejected += rejected
            if time.monotonic() >= self._next:
                self._write()
        if self._path is not None and self._path.with_name(_STOP).exists():
            raise KeyboardInterrupt

    def flush(self) -> None:
        """Write the tally now."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        self._next = time.monotonic() + _EVERY
        if self._path is not None and self._path.parent.is_dir():
            self._path.write_text(f"{self._done} {self._rejected}")


def stop(folder: str | None) -> None:
    """Have every worker with a heartbeat in `folder` stop at its next item, as if Ctrl-C had reached it."""
    if folder:
        with suppress(OSError):  # a folder that was removed has nobody to tell
            Path(folder, _STOP).touch()


def tally(folder: Path) -> tuple[int, int]:
    """Add up the heartbeats in `folder`: items done, and how many of them were rejected."""
    totals = [0, 0]
    for file in folder.iterdir():
        numbers = file.read_text().split()
        if len(numbers) == 2:  # else it is being rewritten just now
            totals[0] += int(numbers[0])
            totals[1] += int(numbers[1])
    return totals[0], totals[1]


@contextmanager
def watch(folder: Path, report: Callable[[int, int], None]) -> Iterator[None]:
    """Call `report(done, rejected)` now and then while the body runs, and once when it ends."""
    stop = threading.Event()

    def look() -> None:
        best = (0, 0)
        while True:
            last_round = stop.wait(_EVERY)
            best = max(best, tally(folder))  # a file caught half-written counts less, never more
            report(*best)
            if last_round:
                return

    thread = threading.Thread(target=look, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
