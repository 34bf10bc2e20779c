"""How a job ends: its exit code, and what it says and leaves behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jobs import cli

PROGRAM = [sys.executable, "-m", "jobs.cli"]


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "/nowhere"]])
def test_output_that_nobody_reads_ends_a_job_quietly(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    job = subprocess.run([*PROGRAM, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    silent = arguments[0] == "verify"
    assert job.returncode == (1 if silent else 141)
    assert job.stderr.count("\n") == (1 if silent else 0)


def test_a_module_of_ours_that_is_not_there_is_no_missing_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "jobs.verify", raising=False)
    monkeypatch.setitem(sys.modules, "transforms.verifying", None)
    with pytest.raises(ModuleNotFoundError, match=r"transforms\.verifying"):
        cli.main(["verify", "x"])


def test_sigterm_ends_a_job_as_ctrl_c_does_and_leaves_nothing_temporary(drawn, artifact, tmp_path):
    """Sixty pictures under many names, so that there is time to end it."""
    (tmp_path / "images").mkdir()
    (tmp_path / "tmp").mkdir()
    for number in range(10):
        for path in drawn.glob("*/*"):
            os.link(path, tmp_path / "images" / f"{number:02}-{path.name}")
    store = tmp_path / "store"
    command = ["--images", str(tmp_path / "images"), "--store", str(store), "--embedder", artifact, "--unit-size", "16"]
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.embed", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )
    while not list(store.glob("parts/*/*.parquet")) and job.poll() is None:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    _, error = job.communicate(timeout=30)
    assert job.returncode == 143
    assert error.splitlines()[-1] == "lookalike embed: interrupted; run the same command again to go on"
    assert not list(Path(tmp_path, "tmp").glob("lookalike-*"))


def test_the_handler_of_a_caller_stays():
    before = signal.getsignal(signal.SIGTERM)
    with cli._sigterm_interrupts(threading.Event()):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
