"""Ctrl-C, SIGTERM and dying workers: the process ends at once, leaves nobody behind, and the next run goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import cli

MODES = {
    "in process": [],
    "threads": ["--direct_running_mode=multi_threading", "--direct_num_workers=2"],
    "processes": ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
}
# Where the tests run in the background, Ctrl-C may be ignored, and a child process inherits that.
HEEDING = "import signal, sys; signal.signal(2, signal.default_int_handler); from jobs import cli; sys.exit(cli.main())"


@pytest.fixture(scope="module")
def images(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures under many names, so that there is time to interrupt."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(4):
        for path in drawn.glob("*/*"):
            os.link(path, folder / f"{number:02}-{path.name}")
    return folder


def start(command: list[str], temporary: Path) -> subprocess.Popen[str]:
    temporary.mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", HEEDING, *command],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )


def wait_until(job: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    while not happened():
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.02)


def end(job: subprocess.Popen[str], seconds: float) -> list[str]:
    """Wait for the job and for all who have its standard error, as its workers do; return what was said there."""
    started = time.monotonic()
    try:
        _, error = job.communicate(timeout=30)
    finally:
        job.kill()
    assert time.monotonic() - started < seconds
    assert "Traceback" not in error
    return error.splitlines()


def parts(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.glob("parts/*/*.parquet")}


@pytest.mark.parametrize(
    ("mode", "interrupt", "code"),
    [
        ("in process", "SIGINT", 130),
        ("in process", "SIGTERM", 143),
        ("threads", "SIGINT", 130),
        ("processes", "SIGINT", 130),
        ("processes", "SIGINT to all", 130),
        ("processes", "SIGTERM", 143),
    ],
)
def test_an_interrupted_run_stops_at_once_and_the_next_one_goes_on(mode, interrupt, code, images, artifact, tmp_path):
    store, temporary = tmp_path / "store", tmp_path / "temporary"
    command = ["embed", "--images", str(images), "--store", str(store), "--embedder", artifact, "--unit-size", "16"]
    job = start([*command, *MODES[mode]], temporary)
    wait_until(job, lambda: len(parts(store)) >= 3)
    if interrupt == "SIGINT to all":  # as a terminal does it
        os.killpg(job.pid, signal.SIGINT)
    else:
        job.send_signal(signal.Signals[interrupt])
    lines = end(job, seconds=5)
    assert job.returncode == code
    assert lines[-1] == "lookalike embed: interrupted; run the same command again to go on"
    assert list(temporary.glob("lookalike-*")) == []
    kept = parts(store)
    assert len(kept) >= 3
    assert not (store / "CURRENT").exists()
    assert cli.main(command) == 0
    assert {path: when for path, when in parts(store).items() if path in kept} == kept
    assert cli.main(["verify", str(store)]) == 0


def test_a_run_whose_worker_process_dies_says_so_and_ends(images, artifact, tmp_path):
    store, temporary = tmp_path / "store", tmp_path / "temporary"
    command = ["embed", "--images", str(images), "--store", str(store), "--embedder", artifact, "--unit-size", "16"]
    job = start([*command, *MODES["processes"]], temporary)
    wait_until(job, lambda: len(parts(store)) >= 3)
    heartbeat = next(temporary.glob("lookalike-*/*-*"))  # named for the worker's process
    os.kill(int(heartbeat.name.partition("-")[0]), signal.SIGKILL)
    lines = end(job, seconds=30)
    assert job.returncode == 1
    assert lines[-1] == (
        "lookalike embed: a worker process was killed, as happens when memory runs out; what was finished is kept, "
        "run again to go on, with fewer workers if need be"
    )


def test_a_read_that_stalls_delays_no_interrupt(drawn, artifact, gcs_fake, tmp_path):
    bucket = gcs_fake.new_bucket()
    for path in drawn.glob("*/*"):
        gcs_fake.put(bucket.removeprefix("gs://"), path.name, path.read_bytes())
    command = ["embed", "--images", bucket, "--store", str(tmp_path / "store"), "--embedder", artifact]
    job = start(command, tmp_path / "temporary")
    wait_until(job, lambda: any("alt=media" in request for request in gcs_fake.requests))
    gcs_fake.faults.extend(["stall"] * 1000)
    wait_until(job, lambda: len(gcs_fake.faults) < 1000)
    job.send_signal(signal.SIGINT)
    assert end(job, seconds=5)[-1] == "lookalike embed: interrupted; run the same command again to go on"
    assert job.returncode == 130
