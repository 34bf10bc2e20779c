"""`lookalike reindex` as a scheduler runs it: exit codes, reports, runs that meet, stop and are killed."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from forked import Job

from jobs import cli
from pipelines.lease import LeaseDocument, leased
from serving import Index, storage
from serving.manifest import load_index_manifest, load_run_manifest
from transforms.catalog import read_catalog
from transforms.sampling import live_rows

LEASE = 0.8
"""Seconds of the leases of runs that are to lose them."""


@pytest.fixture(autouse=True)
def _few_queries(monkeypatch):
    monkeypatch.setattr("transforms.measuring._LATENCY_QUERIES", 5)


@pytest.fixture(scope="module")
def images(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures under two names each, so that there is time to meet."""
    folder = tmp_path_factory.mktemp("images")
    for path in drawn.glob("*/*"):
        for number in range(2):
            target = folder / path.parent.name / f"{number}-{path.name}"
            target.parent.mkdir(exist_ok=True)
            os.link(path, target)
    return folder


@pytest.fixture
def command(images: Path, artifact: str, tmp_path: Path) -> list[str]:
    return command_for(images, tmp_path, artifact)


def command_for(images: Path | str, root: Path | str, artifact: str) -> list[str]:
    where = ["--images", str(images), "--store", f"{root}/store", "--index", f"{root}/index"]
    return ["reindex", *where, "--embedder", artifact, "--unit-size", "16"]


def parts(root: Path) -> list[Path]:
    return list(root.glob("store/parts/*/*.parquet"))


def test_a_first_night_and_one_without_news(command, tmp_path, capsys):
    where = tmp_path / "run.json"
    assert cli.main([*command, "--report", str(where)]) == 0
    out = capsys.readouterr().out
    said = dict(line.split(maxsplit=1) for line in out.splitlines()[:-1])
    told = json.loads(where.read_text())
    manifest = load_index_manifest(str(tmp_path / "index"))
    assert (said["listed"], said["embedded"], said["images"]) == ("120", "120", "120")
    assert (said["version"], said["published"]) == (manifest.version, "as the first version")
    assert "the weights are untrained" in out
    assert (told["exit_code"], told["error"], told["published"]) == (0, None, True)
    assert (told["version"], told["parent"], told["why"]) == (manifest.version, None, "it passed the gate")
    assert told["run"] == load_run_manifest(str(tmp_path / "store")).run_id
    assert told["accounting"] == {
        **{"listed": 120, "embedded": 120, "reused": 0, "rejected": {}, "relabelled": 0, "gone": 0}
    }
    assert told["counters"]["embed/embedded"] == 120
    assert [check["passed"] for check in told["checks"]] == [True, True]
    assert {"prepare", "lease", "embed", "build", "gate", "publish"} == set(told["seconds"])
    assert {"embed", "encode", "merge"} <= set(told["steps"])
    assert json.loads((tmp_path / "index" / "versions" / manifest.version / "gate.json").read_text())["forced"] is False

    assert cli.main([*command, "--report", str(where)]) == 0
    assert "nothing to do: all 120 images are as run" in capsys.readouterr().out
    told = json.loads(where.read_text())
    assert (told["exit_code"], told["published"], told["why"]) == (0, False, "nothing changed")
    assert (told["counters"], told["committed"], told["steps"]) == ({}, False, {})
    assert told["version"] == told["parent"] == manifest.version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "run.json", "store"]


def test_a_refusal_is_code_3_and_says_why(drawn, artifact, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / "images")
    command = [*command_for(tmp_path / "images", tmp_path, artifact), "--report", f"{tmp_path}/run.json"]
    assert cli.main(command) == 0
    before = load_index_manifest(f"{tmp_path}/index").version
    for path in sorted((tmp_path / "images").glob("*/*"))[::2]:
        path.unlink()
    command += ["--max-precision-drop", "1"]
    assert cli.main(command) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lookalike reindex: version ")
    assert "rows 30 where 48 is the least, the current version's is 60" in error
    told = json.loads((tmp_path / "run.json").read_text())
    assert (told["exit_code"], told["published"], told["parent"]) == (3, False, before)
    assert f"lookalike reindex: {told['error']}" == error
    assert [check["name"] for check in told["checks"] if not check["passed"]] == ["rows"]
    assert load_index_manifest(f"{tmp_path}/index").version == before
    assert cli.main([*command, "--force"]) == 0
    assert "the gate was overruled by --force" in capsys.readouterr().out
    told = json.loads((tmp_path / "run.json").read_text())
    assert (told["published"], told["forced"]) == (True, True)
    assert cli.main([*command_for(tmp_path / "images", tmp_path, artifact), "--target-recall", "0.5"]) == 0


@pytest.mark.parametrize(
    ("wrong", "code", "said"),
    [
        (["--report", "nowhere/run.json"], 2, "--report nowhere/run.json cannot be written: the folder "),
        (["--max-shrink", "20"], 2, "--max-shrink is 20; take 0 to 1"),
        (["--wait", "-1"], 2, "--wait is -1"),
        (
            ["--max-shrinkage", "0.2"],
            2,
            "--max-shrinkage is no option of this job nor of Beam; did you mean --max-shrink",
        ),
        (["--images", "nowhere"], 1, "nowhere does not exist"),
    ],
)
def test_what_is_wrong_is_said_and_reported(wrong, code, said, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, "--report", "run.json", *wrong]) == code
    assert said in capsys.readouterr().err
    if (tmp_path / "run.json").exists():
        told = json.loads((tmp_path / "run.json").read_text())
        assert (told["exit_code"], told["published"], told["run"]) == (code, False, None)
        assert said in told["why"]
    else:
        assert code == 2
    assert not (tmp_path / "index").exists()


def test_a_report_in_a_bucket_takes_the_place_of_the_last(gcs_server, drawn, artifact, tmp_path):
    command = [*command_for(drawn / "maze", tmp_path, artifact), "--report", f"{gcs_server}/reports/last.json"]
    for published in (True, False):
        assert cli.main(command) == 0
        assert json.loads(storage.read(f"{gcs_server}/reports/last.json"))["published"] is published


def test_the_help_tells_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["reindex", "--help"])
    out = capsys.readouterr().out
    for line in (
        "0    published, or nothing to do",
        "3    built, but refused at the gate",
        "4    another run is at work",
    ):
        assert line in out


# --- Runs that meet ---------------------------------------------------------------------------------------------------


def test_of_two_runs_one_works_one_leaves_and_one_waits(command, tmp_path, capsys):
    first = Job(command, tmp_path / "first.txt")
    first.wait_until(lambda: len(parts(tmp_path)) > 0)
    waiting = Job([*command, "--wait", "60", "--report", f"{tmp_path}/waiting.json"], tmp_path / "waiting.txt")
    assert cli.main([*command, "--report", f"{tmp_path}/second.json"]) == 4
    assert f"{tmp_path}/store is in use by `lookalike reindex` on " in capsys.readouterr().err
    assert json.loads((tmp_path / "second.json").read_text())["exit_code"] == 4
    assert cli.main(["embed", *command[1:5], "--embedder", command[command.index("--embedder") + 1]]) == 4
    assert first.end() == 0, first.said
    assert waiting.end() == 0, waiting.said
    told = json.loads((tmp_path / "waiting.json").read_text())
    assert (told["why"], told["counters"]) == ("nothing changed", {})
    assert told["seconds"]["lease"] > 0.1
    assert len(list(tmp_path.glob("store/runs/*/manifest.json"))) == 1


def test_embed_and_index_are_kept_out_too(drawn, artifact, tmp_path, capsys):
    where = ["--store", f"{tmp_path}/store"]
    embed = ["embed", "--images", str(drawn / "maze"), *where, "--embedder", artifact]
    index = ["index", *where, "--index", f"{tmp_path}/index"]
    with leased(f"{tmp_path}/store", "reindex"):
        assert cli.main(embed) == 4
    assert cli.main(embed) == 0
    with leased(f"{tmp_path}/index", "reindex"):
        assert cli.main(index) == 4
        assert "index is in use by `lookalike reindex`" in capsys.readouterr().err
    assert cli.main(index) == 0
    held = [LeaseDocument.load(f"{tmp_path}/{root}/LEASE") for root in ("store", "index")]
    assert [(lease.job, lease.released) for lease in held] == [("embed", True), ("index", True)]


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_run_that_was_stopped_past_its_lease_publishes_nothing(taken_over, command, tmp_path):
    job = Job([*command, "--report", f"{tmp_path}/run.json"], tmp_path / "said.txt", lease=LEASE)
    job.wait_until(lambda: len(parts(tmp_path)) > 0)
    job.send(signal.SIGSTOP)
    if taken_over:
        assert cli.main([*command, "--wait", "10"]) == 0
    else:
        time.sleep(LEASE + 0.2)
    before = (tmp_path / "store" / "CURRENT").read_bytes() if taken_over else None
    job.send(signal.SIGCONT)
    assert job.end() == 1
    assert "this run's lease on " in job.said.splitlines()[-1]
    assert "; nothing was published, run again" in job.said.splitlines()[-1]
    assert json.loads((tmp_path / "run.json").read_text())["published"] is False
    pointer = tmp_path / "store" / "CURRENT"
    assert (pointer.read_bytes() if pointer.exists() else None) == before
    if not taken_over:
        assert not (tmp_path / "index" / "CURRENT").exists()
        assert cli.main(command) == 0, "and the next one goes on, without waiting"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_reports_that_and_lets_go(number, code, command, tmp_path):
    job = Job([*command, "--report", f"{tmp_path}/run.json"], tmp_path / "said.txt")
    job.wait_until(lambda: len(parts(tmp_path)) > 0)
    job.send(number)
    assert job.end() == code
    told = json.loads((tmp_path / "run.json").read_text())
    assert (told["exit_code"], told["why"], told["published"]) == (code, "interrupted", False)
    assert all(LeaseDocument.load(f"{tmp_path}/{root}/LEASE").released for root in ("store", "index"))


# --- Runs that are killed ---------------------------------------------------------------------------------------------


def outcome(root: Path | str) -> tuple[list[tuple], list[tuple]]:
    """Return every row of the catalog, and every answer of the index to the store's own vectors."""
    store, index = f"{root}/store", f"{root}/index"
    manifest = load_run_manifest(store)
    rows = [(row.uri, row.etag, row.label, row.status, row.uri_hash) for row in read_catalog(store, manifest)]
    live = live_rows(store, manifest)
    order = sorted(range(len(live)), key=live.column("uri").__getitem__)
    found = Index.open(index).search(live.vectors()[order], 10)
    return rows, [tuple(hits) for hits in found]


@pytest.fixture(scope="module")
def undisturbed(images, artifact, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert cli.main(command_for(images, root, artifact)) == 0
    return root


def holder(root: Path) -> int | None:
    """Return the process that holds the store, or held it last."""
    lease = root / "store" / "LEASE"
    return LeaseDocument.load(str(lease)).pid if lease.exists() else None


def written(root: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(root))


def survive(command: list[str], root: Path, undisturbed: Path, seed: int, kills: int) -> None:
    """Kill a run at random moments, then let it end; compare with one that nobody disturbed."""
    rng = random.Random(seed)
    for number in range(kills):
        job = Job([*command, "--wait", "30"], root / f"killed-{number}.txt", lease=LEASE)
        job.wait_until(lambda pid=job.pid: holder(root) == pid)
        more = written(root) + rng.randint(0, 45)  # moments by what is done, as the machine may be slow
        job.wait_until(lambda more=more: written(root) >= more, or_over=True)
        job.send(signal.SIGKILL)
        job.end()
    assert cli.main([*command, "--wait", "30"]) == 0
    assert outcome(root) == outcome(undisturbed)
    assert cli.main(["verify", f"{root}/store"]) == cli.main(["verify", f"{root}/index"]) == 0


def test_runs_killed_at_random_moments_leave_what_an_undisturbed_one_does(command, undisturbed, tmp_path):
    survive(command, tmp_path, undisturbed, seed=1, kills=5)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_many_runs_killed_at_random_moments(seed, command, undisturbed, tmp_path):
    survive(command, tmp_path, undisturbed, seed, kills=10)
