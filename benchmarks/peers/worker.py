"""A process that holds one peer's index: one JSON object per line in, one per line out.

    python -m benchmarks.peers.worker NAME WORKDIR

It needs NumPy and the one library. An index is built by one process and opened by another, so that what the second one
holds is the opened index and nothing of the building.
"""

import ctypes
import functools
import itertools
import json
import os
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.libraries import LIBRARIES
from benchmarks.peers.protocol import Array

Answer = dict[str, Any]
Setting = dict[str, int]
Point = tuple[Setting, float, float]  # a setting, its recall, microseconds at the median
_WARM = 20
_COMMANDS = ("build", "open", "memory", "set", "tune", "round", "batch")


class Worker:
    """Answers the commands; every public method is one, and its arguments are the command's."""

    def __init__(self, name: str, folder: Path) -> None:
        self._library = LIBRARIES[name]()
        self._folder, self._note = folder / "index", folder / "built.json"
        self._before = (0, 0)
        self.opened = False

    def build(self, vectors: str, params: Mapping[str, Any] | None = None) -> Answer:
        """Build and save; `threads` is a parameter like the others."""
        rows = np.load(vectors, mmap_mode="r")
        options = dict(params or {})
        started = time.perf_counter()
        details = self._library.build(rows, int(options.pop("threads", 2)), options)
        seconds = time.perf_counter() - started
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._library.save(self._folder)
        count, width = rows.shape
        self._note.write_text(json.dumps({"count": count, "width": width, "options": options}))
        size = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        return {"build_seconds": seconds, "disk_bytes": size, **details}

    def open(self) -> Answer:
        """Open what was built, search once, and say what memory that took."""
        note = json.loads(self._note.read_text())
        query = np.full(note["width"], note["width"] ** -0.5, np.float32)
        self._before = _resident()
        started = time.perf_counter()
        self._library.load(self._folder, **note)
        seconds = time.perf_counter() - started
        self.opened = True
        if self._library.knobs:
            self._library.set_effort(**{name: values[0] for name, values in self._library.knobs.items()})
        self._library.search(query, 10)
        return {"open_seconds": seconds, **self.memory(), "knobs": {k: list(v) for k, v in self._library.knobs.items()}}

    def memory(self) -> Answer:
        """Say by how much resident memory has grown since just before opening; a mapped index grows by being used."""
        total, anonymous = (now - then for now, then in zip(_resident(), self._before, strict=True))
        return {"resident_bytes": total, "resident_anonymous_bytes": anonymous}

    def set(self, setting: Mapping[str, int]) -> Answer:
        """Set the effort, as an earlier `tune` found it."""
        self._library.set_effort(**setting)
        return {}

    def tune(self, queries: str, truth: str, target: float = 0.95, k: int = 10, timed: int = 300) -> Answer:
        """Find and keep the cheapest setting that reaches the target; else the best there is.

        `truth` is int64 [Q, k] or wider. Recall is over all queries: `timed` are asked singly, the rest at once.
        """
        asked, right = np.load(queries), np.load(truth)[:, :k]
        curve: list[Point] = []
        reaching: list[Point] = []

        def measure(setting: Setting) -> float:
            self._library.set_effort(**setting)
            curve.append((setting, *self._measure(asked, right, k, timed)))
            return curve[-1][1]

        for fixed, name, ends in self._sweeps():
            found = _least(functools.partial(_reaches, measure, target, fixed, name), *ends)
            reaching.extend(point for point in curve if point[0] == {name: found, **fixed})
        if not self._library.knobs and measure({}) >= target:
            reaching = curve
        best = self._cheapest(reaching, asked[:timed], k) if reaching else max(curve, key=lambda point: point[1])
        self._library.set_effort(**best[0])
        return {"setting": best[0], "recall": best[1], "p50_us": best[2], "reached": bool(reaching), "curve": curve}

    def round(self, queries: str, count: int = 1000, k: int = 10) -> Answer:
        """Time single queries."""
        asked = np.load(queries)
        self._timed(asked[:_WARM], k)
        return {"us": [round(us, 2) for us in self._timed(_cycled(asked, count), k)[0]]}

    def batch(self, queries: str, k: int = 10) -> Answer:
        """Time all queries at once."""
        asked = np.load(queries)
        self._library.search_batch(asked[:_WARM], k)
        started = time.perf_counter()
        self._library.search_batch(asked, k)
        return {"queries_per_second": len(asked) / (time.perf_counter() - started)}

    def _sweeps(self) -> Iterator[tuple[Setting, str, Sequence[int]]]:
        """Yield what stays fixed, the knob to sweep and its ends, for each way to set the other knobs."""
        if not self._library.knobs:
            return
        (name, ends), *others = self._library.knobs.items()
        for values in itertools.product(*(choice for _, choice in others)):
            yield dict(zip((other for other, _ in others), values, strict=True)), name, ends

    def _cheapest(self, points: Sequence[Point], asked: Array, k: int) -> Point:
        """Return the fastest of some settings, timed again in turn where there are several: the machine has moods."""
        if len(points) == 1:
            return points[0]
        medians: list[list[float]] = [[] for _ in points]
        for _ in range(3):
            for (setting, _, _), its in zip(points, medians, strict=True):
                self._library.set_effort(**setting)
                its.append(statistics.median(self._timed(asked, k)[0]))
        least = min(range(len(points)), key=lambda number: min(medians[number]))
        return (*points[least][:2], min(medians[least]))

    def _measure(self, asked: Array, right: Array, k: int, timed: int) -> tuple[float, float]:
        """Return recall over all queries, and the median over the first of them, asked singly."""
        self._timed(asked[:_WARM], k)
        times, found = self._timed(asked[:timed], k)
        rest = asked[timed:]
        found.extend(self._library.search_batch(rest, k) if len(rest) else ())
        shared = sum(len(np.intersect1d(ids, truth)) for ids, truth in zip(found, right, strict=True))
        return shared / right.size, statistics.median(times)

    def _timed(self, rows: Any, k: int) -> tuple[list[float], list[Any]]:
        """Ask one by one; microseconds and ids."""
        search, clock = self._library.search, time.perf_counter_ns
        times, found = [], []
        for row in rows:
            started = clock()
            ids = search(row, k)
            times.append((clock() - started) / 1000)
            found.append(ids)
        return times, found


def _reaches(measure: Callable[[Setting], float], target: float, fixed: Setting, name: str, value: int) -> bool:
    """Tell whether one value of the swept knob reaches the target."""
    return measure({name: value, **fixed}) >= target


def _least(reaches: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the least value that reaches, to some 3 %, or None.

    It tries a doubling grid until one reaches, then between that one and the last that did not.
    """
    failed, value = low - 1, low
    while not reaches(value):
        if value >= high:
            return None
        failed, value = value, min(2 * value, high)
    while value - failed > max(1, value // 32):
        middle = (failed + value) // 2
        if reaches(middle):
            value = middle
        else:
            failed = middle
    return value


def _cycled(rows: Array, count: int) -> Iterator[Any]:
    """Yield `count` rows, from the start again as often as needed."""
    return itertools.islice(itertools.cycle(rows), count)


def _resident() -> tuple[int, int]:
    """Return bytes of resident memory, and of its anonymous part, without what the allocator only keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["RssAnon"].split()[0]) * 1024


def main() -> None:
    """Serve until told to quit, or until nobody asks."""
    name, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries talk
    worker = None
    for line in sys.stdin:
        try:
            command = json.loads(line)
            do = command.pop("do")
            if do == "quit":
                return
            if do not in _COMMANDS:
                raise ValueError(f"there is no command {do}")
            worker = worker or Worker(name, Path(folder))
            if do not in ("build", "open") and not worker.opened:
                raise ValueError("nothing is open yet: ask to open first")
            answer: Answer = getattr(worker, do)(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
