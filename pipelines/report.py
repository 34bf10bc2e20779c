"""What a reindex did, filled in as it goes so that it tells of a failure, too."""

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipelines.embed import EmbedResult
from pipelines.gate import Check
from pipelines.runner import Progress
from serving.errors import LookalikeError
from serving.manifest import IndexManifest, now


@dataclass(slots=True)
class Report:
    """One run's report; `to_json` is what a scheduler keeps."""

    store: str
    index: str
    started: str = field(default_factory=now)
    ended: str | None = None
    exit_code: int | None = None
    error: str | None = None
    embedded: EmbedResult | None = None
    candidate: IndexManifest | None = None
    """The version that was built, or found to be what would be built."""
    parent: str | None = None
    """The version that was current when the run began."""
    published: bool = False
    forced: bool = False
    why: str = "the run ended before"
    """Why nothing was published, or that it was."""
    checks: list[Check] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each stage."""
    steps: dict[str, float] = field(default_factory=dict)
    """Seconds of what the stages showed as they went."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a block."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 3)

    def end(self, error: BaseException | None = None) -> None:
        """Note how the run ended: its exit code, and what was said."""
        self.ended, self.exit_code = now(), exit_code(error)
        if error is not None:
            said = str(error) if isinstance(error, LookalikeError) else type(error).__name__
            self.error = "interrupted" if isinstance(error, KeyboardInterrupt) else said
            if not self.published:
                self.why = self.error

    def to_json(self) -> str:
        """Serialize."""
        manifest = self.embedded.manifest if self.embedded else None
        lineage = self.candidate.lineage if self.candidate else {}
        body: dict[str, Any] = {
            "format_version": 1,
            "store": self.store,
            "index": self.index,
            "started": self.started,
            "ended": self.ended,
            "exit_code": self.exit_code,
            "error": self.error,
            "run": manifest.run_id if manifest else None,
            "committed": bool(self.embedded and self.embedded.changed),
            "accounting": dataclasses.asdict(manifest.accounting) if manifest else None,
            "counters": self.embedded.counters if self.embedded else {},
            "version": self.candidate.version if self.candidate else None,
            "parent": self.parent,
            "published": self.published,
            "forced": self.forced,
            "why": self.why,
            "quantizer": lineage.get("quantizer"),
            "changes": lineage.get("changes"),
            "measured": self.candidate.measured if self.candidate else None,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "seconds": self.seconds,
            "steps": self.steps,
        }
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


class Timed:
    """A `Progress` that notes in a report how long everything it shows takes."""

    def __init__(self, shown: Progress, report: Report) -> None:
        self._shown, self._report = shown, report
        self._stage, self._started = "", 0.0

    def start(self, stage: str, total: int, unit: str) -> None:
        """Begin a stage of `total` items."""
        self._stage, self._started = stage, time.monotonic()
        self._shown.start(stage, total, unit)

    def update(self, done: int, rejected: int) -> None:
        """Say how many items are done in all, and how many of them were rejected."""
        self._shown.update(done, rejected)

    def finish(self) -> None:
        """End the stage."""
        self._shown.finish()
        taken = time.monotonic() - self._started
        self._report.steps[self._stage] = round(self._report.steps.get(self._stage, 0.0) + taken, 3)


def exit_code(error: BaseException | None) -> int:
    """Return the code that a job ends with; an interrupt that a signal caused names it."""
    if error is None:
        return 0
    if isinstance(error, LookalikeError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 128 + int(error.args[0]) if error.args and isinstance(error.args[0], int) else 130
    return 1
