"""What a process and all its descendants take: memory looked at from outside, and time."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EVERY = 0.1  # seconds between looks


@dataclass(frozen=True, slots=True)
class Peak:
    """One run: peak memory in MiB of all its processes together, and how long it took."""

    mib: float
    seconds: float


def watch(command: Sequence[str], **popen: Any) -> Peak:
    """Run a command to its end; `subprocess.CalledProcessError` where it ends badly."""
    started, most = time.monotonic(), 0
    with subprocess.Popen(command, **popen) as process:
        while process.poll() is None:
            most = max(most, sum(map(_memory, _family(process.pid))))
            time.sleep(_EVERY)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Peak(most / 1024, time.monotonic() - started)


def _family(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _memory(pid: int) -> int:
    """Return a process's proportional set size in KiB: shared pages count by their share."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return 0


def ask(module: str, log: Path, *arguments: object) -> tuple[Peak, dict[str, Any]]:
    """Run `python -m MODULE --child ANSWER ARGUMENTS…` and return what it took and the JSON it wrote to ANSWER.

    What it says goes to the file `log`; where it ends badly, `SystemExit` tells its last words.
    """
    answer = log.with_suffix(".json")
    command = [sys.executable, "-m", module, "--child", str(answer), *map(str, arguments)]
    try:
        with log.open("w") as file:
            peak = watch(command, stdout=file, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[1])
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{module} ended with {error.returncode}: {last_words(log)}") from None
    return peak, json.loads(answer.read_text())


def last_words(log: Path) -> str:
    """Return the last line of a log that says anything."""
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return said[-1] if said else "it said nothing"
