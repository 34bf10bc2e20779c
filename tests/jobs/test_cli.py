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


@pytest.fixture(scope="module")
def index(drawn: Path, artifact: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Embed and index some of the drawn pictures."""
    root = tmp_path_factory.mktemp("built")
    images = str(drawn / "maze")
    assert cli.main(["embed", "--images", images, "--store", str(root / "store"), "--embedder", artifact]) == 0
    assert cli.main(["index", "--store", str(root / "store"), "--index", str(root / "index")]) == 0
    return str(root / "index")


@pytest.mark.parametrize("where", ["nowhere/sheet.html", ".", "x" * 300])
def test_a_sheet_that_cannot_be_written_loses_no_answer(where, drawn, index, tmp_path, capsys):
    image = str(next((drawn / "maze").iterdir()))
    assert cli.main(["search", "--index", index, "--image", image, "--html", str(tmp_path / where)]) == 1
    captured = capsys.readouterr()
    assert f"    1  1.0000  {image}" in captured.out
    assert captured.err.splitlines()[-1].startswith(f"lookalike search: --html {tmp_path / where} cannot be written: ")
    assert not list(tmp_path.iterdir())


def test_a_sheet_takes_the_place_of_an_older_one_also_at_home(drawn, index, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sheet.html").write_text("old")
    (tmp_path / "link.html").symlink_to(tmp_path / "linked.html")
    image = str(next((drawn / "maze").iterdir()))
    for name in ("sheet.html", "link.html"):
        assert cli.main(["search", "--index", index, "--image", image, "--html", f"~/{name}"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"sheet.html", "link.html", "linked.html"}
    assert all(path.read_text().startswith("<!doctype html>") for path in tmp_path.iterdir())


def test_a_sheet_is_written_to_this_machine_only(capsys):
    assert cli.main(["search", "--index", "i", "--image", "x.jpg", "--html", "gs://b/sheet.html"]) == 2
    assert "--html is gs://b/sheet.html; a contact sheet is written to a path" in capsys.readouterr().err


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
