import os
import signal
import threading
import time
from pathlib import Path

import apache_beam as beam
import pytest

from pipelines.runner import Runner, refuse_unknown
from serving.errors import NotFound, RunFailed, UsageError
from transforms.progress import Heartbeat


class Recorded:
    """A progress display that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def start(self, stage: str, total: int, unit: str) -> None:
        self.calls.append(("start", stage, total, unit))

    def update(self, done: int, rejected: int) -> None:
        self.calls.append(("update", done, rejected))

    def finish(self) -> None:
        self.calls.append(("finish",))


def failing(error: BaseException):
    def fail(_element: int) -> int:
        raise error

    return lambda pipeline: pipeline | beam.Create([1]) | beam.Map(fail)


def run(build, *arguments: str, progress=None) -> dict[str, int]:
    return Runner(arguments, progress).run("stage", 1, "img", build, None)


def test_a_failing_worker_is_one_sentence():
    with pytest.raises(RunFailed, match=r"a worker failed: out of order.*what was finished is kept, run again"):
        run(failing(RuntimeError("out of order")))


def test_our_own_errors_stay_what_they_are():
    with pytest.raises(NotFound, match=r"^gs://b/x does not exist$"):
        run(failing(NotFound("gs://b/x does not exist")))


def test_ctrl_c_in_a_worker_is_ctrl_c():
    with pytest.raises(KeyboardInterrupt):
        run(failing(KeyboardInterrupt()))


PROCESSES = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")


@pytest.mark.parametrize(("does", "number"), [(os._exit, 7), (signal.raise_signal, signal.SIGTERM)])
def test_a_worker_process_that_ends_is_one_sentence_and_takes_the_other_along(does, number):
    """The other one would sleep for longer than anybody waits."""

    def build(pipeline):
        numbers = pipeline | beam.Create([number, 600]) | beam.Reshuffle()
        return numbers | beam.Map(lambda n: time.sleep(n) if n == 600 else does(n))

    started = time.monotonic()
    how = "ended with code 7" if does is os._exit else "died of signal 15"
    with pytest.raises(RunFailed, match=rf"^a worker process {how}; what was finished is kept, run again to go on$"):
        run(build, *PROCESSES)
    assert time.monotonic() - started < 30
    deadline = time.monotonic() + 5
    while any(thread.name == "beam" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("mode", ["in_memory", "multi_threading"])
def test_threads_of_an_interrupted_run_stop_at_their_next_item(mode, tmp_path):
    """They would be at it for a minute."""

    def build(pipeline):
        def work(_element):
            heartbeat = Heartbeat(str(tmp_path))
            for _ in range(6000):
                heartbeat.add()
                time.sleep(0.01)

        return pipeline | beam.Create([1]) | beam.Map(work)

    timer = threading.Timer(1, signal.raise_signal, [signal.SIGUSR1])
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            Runner([f"--direct_running_mode={mode}"]).run("stage", 1, "img", build, str(tmp_path))
    finally:
        signal.signal(signal.SIGUSR1, before)
        timer.join()
    assert not any(thread.name == "beam" for thread in threading.enumerate())


def test_progress_ends_even_when_the_stage_fails(tmp_path: Path):
    progress = Recorded()
    with pytest.raises(RunFailed):
        Runner(progress=progress).run("embed", 7, "img", failing(RuntimeError("no")), str(tmp_path))
    assert progress.calls[0] == ("start", "embed", 7, "img")
    assert progress.calls[-1] == ("finish",)


@pytest.mark.parametrize(
    ("arguments", "local", "processes"),
    [
        ((), True, 1),
        (("--runner=DirectRunner", "--direct_num_workers=3"), True, 3),
        (("--direct_num_workers=0",), True, os.cpu_count()),
        (("--runner=DataflowRunner", "--direct_num_workers=3"), False, 1),
        (("--runner=apache_beam.runners.portability.flink_runner.FlinkRunner",), False, 1),
    ],
)
def test_where_the_workers_are(arguments, local, processes):
    runner = Runner(arguments)
    assert (runner.is_local, runner.worker_processes) == (local, processes)
    with runner.heartbeats() as folder:
        assert (folder is not None) == local
    assert folder is None or not Path(folder).exists()


def test_flags_of_nobody_are_refused_with_the_nearest_of_the_jobs_own():
    with pytest.raises(UsageError, match="did you mean --unit-size"):
        refuse_unknown(["--unit-sise", "3"], ["--unit-size"])
    refuse_unknown(["--project=p", "--region", "europe-west1"])


@pytest.mark.parametrize("arguments", [["junk"], ["-x"], ["junk", "-x"], ["--region", "europe-west1", "junk"], [""]])
def test_words_of_nobody_are_refused(arguments):
    with pytest.raises(UsageError, match=r"^(junk|-x|) is no option of this job nor of Beam; see --help$"):
        refuse_unknown(arguments)


def test_a_value_that_beam_cannot_use_is_refused():
    with pytest.raises(UsageError, match="direct_num_workers: invalid int value: 'many'"):
        refuse_unknown(["--direct_num_workers=many"])
