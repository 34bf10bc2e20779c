"""Who works for a local run: the thread that drives Beam, and the worker processes it starts.

Beam waits for its workers whatever happens: for hours after Ctrl-C, for ever when one has died, and those it started
stay behind. Here a run that ends takes them all with it.
"""

import io
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any

import grpc  # type: ignore[import-untyped]
from apache_beam.portability import python_urns
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from google.protobuf import json_format, text_format

from serving.errors import RunFailed

_LOOK = 0.25  # seconds between looks at signals
_GRACE = 1.0  # seconds for threads to stop by themselves


def run_apart(job: Callable[[], Any], stop: Callable[[], None]) -> Any:
    """Run `job`, which drives Beam, in a thread of its own; return its result or raise its error.

    Ctrl-C and the death of a worker process end the wait at once. Then worker processes are killed, and `stop` is to
    ask the threads of this process to stop, which are given a moment.
    """
    run = _Run(job)
    with _unheard():
        try:
            run.start()
            outcome = run.wait()
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome
        except BaseException:
            run.kill()
            with redirect_stderr(io.StringIO()):  # Beam prints what ends its threads
                stop()
                run.join(_GRACE)
            raise


class _Run(threading.Thread):
    """The thread that drives Beam; Beam starts the worker processes from it."""

    def __init__(self, job: Callable[[], Any]) -> None:
        super().__init__(name="beam", daemon=True)
        self.ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        """The result or the error; what comes first counts."""
        self.is_over = False
        self._job = job
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def run(self) -> None:
        try:
            self.ended.put(self._job())
        except BaseException as error:  # Ctrl-C inside a DoFn, too
            self.ended.put(error)

    def wait(self) -> Any:
        while True:  # a signal that the system gave to another thread does not wake this one
            with suppress(queue.Empty):
                return self.ended.get(timeout=_LOOK)

    def start_process(self, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a worker process in a group of its own: a terminal's Ctrl-C is for the launcher alone."""
        with self._lock:
            if self.is_over:
                raise RunFailed("the run is over")
            process = subprocess.Popen(arguments, stdin=subprocess.PIPE, env=environment, process_group=0)
            self._processes.append(process)
        return process

    def kill(self) -> None:
        with self._lock:
            self.is_over = True
            for process in self._processes:
                process.kill()


@worker_handlers.WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)
class _WatchedWorker(worker_handlers.SubprocessSdkWorkerHandler):
    """Beam's handle of a worker process, in place of one that leaves it to a shell and does not mind its death."""

    _process: subprocess.Popen[bytes] | None = None
    _closing = _failing = False

    def start_worker(self) -> None:
        run = threading.current_thread()
        if not isinstance(run, _Run):
            super().start_worker()  # somebody else's pipeline in the same process
            return
        options = self.provision_info.provision_info.pipeline_options
        environment = {
            **os.environ,
            "WORKER_ID": self.worker_id,
            "CONTROL_API_SERVICE_DESCRIPTOR": text_format.MessageToString(self.control_api_service_descriptor()),
            "PIPELINE_OPTIONS": json_format.MessageToJson(options),
        }
        self._process = run.start_process([sys.executable, "-m", "pipelines.workers"], environment)
        self._watcher = threading.Thread(target=self._watch, args=(run, self._process), daemon=True)
        self._watcher.start()

    def close(self) -> None:
        self._closing, self._failing = True, sys.exc_info()[0] is not None  # Beam closes while its error unwinds, too
        with suppress(grpc.RpcError):  # the broken stream of a worker that died
            super().close()
        self.stop_worker()

    def stop_worker(self) -> None:
        if self._process is None:
            super().stop_worker()
        else:
            self._watcher.join()

    def _watch(self, run: _Run, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        assert process.stdin is not None
        process.stdin.close()
        if not self._closing or (self._failing and code):
            error = RunFailed(_obituary(code))
            run.ended.put(error)
            self.control_conn.abort(error)  # or Beam's thread would wait for its answers for ever


def _obituary(code: int) -> str:
    kept = "what was finished is kept, run again to go on"
    if code == -9:
        return f"a worker process was killed, as happens when memory runs out; {kept}, with fewer workers if need be"
    how = f"died of signal {-code}" if code < 0 else f"ended with code {code}"
    return f"a worker process {how}; {kept}"


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep what Beam's threads say of broken streams from the terminal: they break when a worker dies or is killed."""

    def hook(thread: threading.ExceptHookArgs) -> None:
        if not isinstance(thread.exc_value, grpc.RpcError):
            before(thread)

    before, threading.excepthook = threading.excepthook, hook
    loggers = [logging.getLogger(f"apache_beam.runners.worker.{name}") for name in ("data_plane", "sdk_worker_main")]
    for logger in loggers:
        logger.addFilter(_no_broken_stream)
    try:
        yield
    finally:
        threading.excepthook = before
        for logger in loggers:
            logger.removeFilter(_no_broken_stream)


def _no_broken_stream(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], grpc.RpcError))


def main() -> None:
    """Be a worker process: Beam's own, that ends when the launcher does, however that ended."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logging.basicConfig(handlers=[handler], format="%(levelname)s %(name)s: %(message)s")
    for name in ("runners.worker.sdk_worker_main", "options.pipeline_options"):
        logging.getLogger(f"apache_beam.{name}").setLevel(logging.ERROR)  # they warn of how Beam starts a worker
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    from apache_beam.runners.worker import sdk_worker_main

    with _unheard(), suppress(grpc.RpcError):
        sdk_worker_main.main(sys.argv)


def _end_with_the_launcher() -> None:
    os.read(0, 1)  # of a pipe whose other end the launcher holds and never writes to
    os._exit(1)


if __name__ == "__main__":
    main()
