"""Run a graph on the runner that was meant."""

import argparse
import difflib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, SetupOptions, StandardOptions

from pipelines.workers import run_apart
from serving.errors import LookalikeError, RunFailed, UsageError
from transforms.metrics import counters
from transforms.progress import stop, watch

LOCAL = ("DirectRunner", "FnApiRunner", "SwitchingDirectRunner")


class Progress(Protocol):
    """What is told how far a stage has come."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """Begin a stage of `total` items."""
        ...

    def update(self, done: int, rejected: int) -> None:
        """Say how many items are done in all, and how many of them were rejected."""
        ...

    def finish(self) -> None:
        """End the stage."""
        ...


class Silent:
    """A `Progress` that says nothing."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """Say nothing."""

    def update(self, done: int, rejected: int) -> None:
        """Say nothing."""

    def finish(self) -> None:
        """Say nothing."""


@contextmanager
def shown(progress: Progress, stage: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a stage that the launcher does itself; give the function to tell how much of it is done."""
    progress.start(stage, total, unit)
    try:
        yield lambda done: progress.update(done, 0)
    finally:
        progress.finish()


class Runner:
    """Beam options, and the one way graphs are run with them.

    `arguments` are Beam's own flags. Without `--runner` it is the local one: Beam's FnApiRunner, pinned.
    """

    def __init__(self, arguments: Sequence[str] = (), progress: Progress | None = None) -> None:
        refuse_unknown(arguments)
        self._arguments = list(arguments)
        self.progress: Progress = progress or Silent()
        self.last_result: Any = None

    @property
    def is_local(self) -> bool:
        """Tell whether workers share this machine."""
        name = self.options().view_as(StandardOptions).runner
        return name is None or name.rpartition(".")[2] in LOCAL

    @property
    def worker_processes(self) -> int:
        """Return how many workers share this machine's cores."""
        if not self.is_local:
            return 1
        asked = self.options().view_as(DirectOptions).direct_num_workers
        return asked if asked > 0 else os.cpu_count() or 1  # as Beam takes 0

    @property
    def cores_per_worker(self) -> int:
        """Return a worker's share of the cores: Dataflow and its like start a process for each core."""
        return max(1, _cores() // self.worker_processes) if self.is_local else 1

    def options(self) -> PipelineOptions:
        """Build fresh options; a run may change them."""
        # Otherwise DirectRunner tries Prism first (a download), and falls back to whatever suits the graph. This
        # flag, which our batch graphs cannot feel, makes it choose FnApiRunner at once.
        pinned = ["--allow_unsafe_triggers"] if not any(a.startswith("--allow_unsafe") for a in self._arguments) else []
        options = PipelineOptions(self._arguments + pinned)
        options.view_as(SetupOptions).save_main_session = False  # our packages are importable
        return options

    @contextmanager
    def heartbeats(self) -> Iterator[str | None]:
        """Lend a folder for the workers' heartbeats; None where workers are on other machines."""
        if not self.is_local:
            yield None
            return
        folder = tempfile.mkdtemp(prefix="lookalike-")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def run(
        self,
        stage: str,
        total: int,
        unit: str,
        build: Callable[[beam.Pipeline], Any],
        heartbeats: str | None,
    ) -> dict[str, int]:
        """Build and run a graph, showing progress of `total` items; return its counters."""
        self.progress.start(stage, total, unit)
        try:
            if heartbeats is None:
                return self._run(build, None)
            with watch(Path(heartbeats), self.progress.update):
                return self._run(build, heartbeats)
        finally:
            self.progress.finish()

    def _run(self, build: Callable[[beam.Pipeline], Any], heartbeats: str | None) -> dict[str, int]:
        # Ctrl-C is no error to trace.
        for name in ("common", "worker.sdk_worker"):
            logging.getLogger(f"apache_beam.runners.{name}").addFilter(_not_interrupted)
        pipeline = beam.Pipeline(options=self.options())
        build(pipeline)

        def finish() -> tuple[Any, str | None]:
            result = pipeline.run()
            return result, result.wait_until_finish()

        with _sentences():
            result, state = run_apart(finish, lambda: stop(heartbeats)) if self.is_local else finish()
        self.last_result = result
        if state is not None and state != "DONE":
            raise RunFailed(f"the pipeline ended as {state}; the runner's log says why")
        return counters(result)


def _cores() -> int:
    """Count the cores this process may use: fewer than there are in a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _BeamParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def refuse_unknown(arguments: Sequence[str], own: Iterable[str] = ()) -> None:
    """Refuse what is neither a flag of Beam nor its value, suggesting one of Beam's or of the job's `own`.

    Beam itself drops it with a warning; a mistyped option must not be lost like that.
    """
    parser = _BeamParser(allow_abbrev=False, add_help=False, conflict_handler="resolve")
    for options in [PipelineOptions, *PipelineOptions.__subclasses__()]:
        options._add_argparse_args(parser)
    left = parser.parse_known_args(list(arguments))[1]
    if not left:
        return
    # The value of an unknown flag may come first among what is left; the flag is what was mistyped.
    name = next((token for token in left if token.startswith("-")), left[0]).partition("=")[0]
    close = difflib.get_close_matches(name, [*own, *parser._option_string_actions], 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(f"{name} is no option of this job nor of Beam{hint}; see --help")


def _not_interrupted(record: logging.LogRecord) -> bool:
    return "KeyboardInterrupt" not in f"{record.getMessage()} {record.exc_info}"


@contextmanager
def _sentences() -> Iterator[None]:
    """Turn what Beam makes of an error inside a worker into one sentence; Beam has logged the rest."""
    try:
        yield
    except LookalikeError as error:
        error.args = (re.sub(r" \[while running '.*'\]$", "", str(error)),)
        raise
    except RuntimeError as error:
        # Beam wraps whatever a DoFn raises, Ctrl-C too, and appends where that was.
        if str(error).startswith("KeyboardInterrupt"):
            raise KeyboardInterrupt from None
        said = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        raise RunFailed(f"a worker failed: {said}; what was finished is kept, run again to go on") from error
