"""`lookalike VERB …`, the same as `python -m jobs.VERB …`."""

import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NoReturn

from serving.errors import LookalikeError, MissingExtra

VERBS = {
    "embed": "images in folders or buckets become embeddings in a store",
    "index": "a store becomes a published index: train, encode, merge, measure, publish",
    "reindex": "bring an index up to date with a bucket, and publish it if it measures up",
    "train": "train a quantizer on a store, and nothing else",
    "merge": "encode and merge a store with a trained quantizer into a version",
    "search": "find the nearest indexed images of some pictures",
    "versions": "list an index's versions and what was measured on them",
    "publish": "make a finished version the current one",
    "rollback": "make the version that was current before the current one again",
    "gc": "remove what no published version, run in use or job at work needs",
    "verify": "check again everything that an index or a store says of itself",
    "demo": "embed, index and search a collection drawn on the spot, or a folder of yours",
}

_EXTRAS = {"search": "images"}
"""What a verb needs beyond the bare install, where it is not `pipeline`."""

_ROOMS = ("serving", "transforms", "pipelines", "jobs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    0 done, 1 failed, 2 wrong usage, 3 what was built is not good enough to publish, 4 another run is at work.

    As in a shell, 130 is Ctrl-C, 143 is SIGTERM, and 141 says that nobody reads the output any more, as in `| head`.
    """
    is_program = argv is None or _is_program()
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv), is_program)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it exits
        return 141


def _run(arguments: list[str], is_program: bool) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"lookalike: {verb} is not a verb; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    terminated = threading.Event()
    try:
        with _sigterm_interrupts(terminated) if is_program else nullcontext():
            code: int = _load(verb).main(rest)
    except LookalikeError as error:
        print(f"lookalike {verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\nlookalike {verb}: interrupted; run the same command again to go on", file=sys.stderr)
        code = 143 if terminated.is_set() else 130
        if is_program:
            _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """End the process now: Python would wait for threads amid a read that stalls, or amid a whole shard."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _is_program() -> bool:
    """Tell whether the process is `python -m jobs.VERB`, not somebody else's that calls `main`."""
    return str(getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")).startswith("jobs.")


@contextmanager
def _sigterm_interrupts(terminated: threading.Event) -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C, so that what is temporary is removed."""

    def interrupt(number: int, _frame: object) -> NoReturn:
        terminated.set()
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _load(verb: str) -> Any:
    try:
        return importlib.import_module(f"jobs.{verb}")
    except (ModuleNotFoundError, MissingExtra) as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _ROOMS:
            raise  # a bug of ours, which no package cures
        raise MissingExtra("it", _EXTRAS.get(verb, "pipeline")) from error


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    head = "usage: lookalike VERB [options]\n\nReverse image search built in batch."
    return f"{head}\n\n{verbs}\n\nlookalike VERB --help tells more."


if __name__ == "__main__":
    sys.exit(main())
