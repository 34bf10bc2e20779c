"""What `versions`, `publish`, `rollback` and `gc` say, and what they end with."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from histories import History

from jobs import cli
from serving import storage


@pytest.fixture
def say(history, capsys):
    """Run a verb on the index; return the exit code, what is printed and what is complained of."""

    def verb(*arguments: str) -> tuple[int, list[str], str]:
        code = cli.main([*arguments, "--index", history.index])
        out, error = capsys.readouterr()
        return code, out.splitlines(), error

    return verb


def cells(line: str) -> list[str]:
    return re.split("  +", line.strip())


def test_versions_are_listed_published_rolled_back_and_cleaned_up(history, say):
    history.commit(range(40))
    first, second = history.build(1), history.build(2)
    unfinished = history.build(3, until="finish")
    code, lines, _ = say("versions")
    assert code == 0
    assert cells(lines[0]) == ["version", "created", "images", "dims", "recall@10", "P@1", "bytes"]
    size = sum(entry.size for entry in storage.list_entries(f"{history.index}/versions/{second}"))
    assert cells(lines[2])[0::2] == [second, "40", "1.000", f"{size:,}"]
    assert cells(lines[2])[-1] == "current"
    assert cells(lines[3])[0] == first
    assert cells(lines[3])[-1] == "previous"
    left = sum(entry.size for entry in storage.list_entries(f"{history.index}/versions/{unfinished}"))
    assert lines[4].startswith(f"1 unfinished ({left:,} bytes): {unfinished}; ")
    assert len(lines) == 5

    assert say("publish", first)[:2] == (0, [f"version {first} is current; before, {second} was"])
    assert say("publish", first, "--verify")[:2] == (0, [f"nothing to do: version {first} is current"])
    done = f"rolled back from version {first} to {second}; `lookalike publish {first}` undoes it"
    assert say("rollback")[:2] == (0, [done])
    code, lines, error = say("rollback")
    assert (code, lines) == (1, [])
    assert error.startswith(
        f"lookalike rollback: {history.index} cannot go back: version {second} is current, none was"
    )

    before = history.files()
    code, planned, _ = say("gc", "--store", history.store, "--min-age", "0", "--dry-run")
    assert (code, planned.pop()) == (0, "dry run: nothing was removed")
    assert history.files() == before
    code, lines, _ = say("gc", "--store", history.store, "--min-age", "0")
    assert (code, lines) == (0, planned)
    gone = before - history.files()
    assert cells(lines[0]) == ["removed", "files", "bytes", "which"]
    rows = {cells(line)[0]: cells(line)[1:] for line in lines[2:5]}
    assert rows.keys() == {"version", "unfinished version", "total"}
    assert (rows["version"][2], rows["unfinished version"][2]) == (first, unfinished)
    assert rows["total"][0] == str(len(gone))
    assert any(line.startswith("version ") and line.endswith(f"{second} (current)") for line in lines[6:])
    code, lines, _ = say("gc", "--store", history.store, "--min-age", "0")
    assert lines[0] == "nothing to remove"


def test_versions_for_programs(history, say):
    history.commit(range(40))
    first, second = history.build(1), history.build(2)
    unfinished = history.build(3, until="describe")
    told = json.loads("\n".join(say("versions", "--json")[1]))
    assert [(one["version"], one["finished"], one["current"], one["previous"]) for one in told] == [
        (second, True, True, None),
        (first, True, False, 1),
        (unfinished, False, False, None),
    ]
    assert (told[0]["images"], told[0]["dim"], told[0]["recall_at_10"], told[0]["precision_at_1"]) == (
        40,
        16,
        1.0,
        None,
    )
    assert told[2]["images"] is None
    assert told[2]["bytes"] > 0


def test_a_damaged_version_is_listed_with_its_fault(tmp_path, capsys):
    history = History(str(tmp_path))
    history.commit(range(30))
    version = history.build()
    path = Path(history.index, "versions", version, "manifest.json")
    path.write_bytes(b"{}")
    assert cli.main(["versions", "--index", history.index]) == 0
    assert f"version {version} cannot be used: {path} is not a manifest" in capsys.readouterr().out
    path.unlink()
    assert cli.main(["versions", "--index", history.index]) == 0
    assert capsys.readouterr().out.startswith("no version is finished\n1 unfinished")


def test_what_was_passed_over_is_said(tmp_path, capsys):
    history = History(str(tmp_path))
    history.commit(range(30))
    names = [history.build(shards) for shards in (1, 2, 3)]
    Path(history.index, "versions", names[1], "trained.faiss").unlink()
    assert cli.main(["rollback", "--index", history.index]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"passed over version {names[1]}: {history.index}/versions/{names[1]}/trained.faiss is missing"
    assert out[1].startswith(f"rolled back from version {names[2]} to {names[0]}; ")


def test_many_names_are_not_all_told(tmp_path, capsys):
    history = History(str(tmp_path))
    history.commit(range(30))
    for shards in range(1, 9):
        history.build(shards)
    assert cli.main(["gc", "--index", history.index, "--min-age", "0", "--keep", "1"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("version"))
    assert row.endswith(" and 4 more")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["versions", "--index", "nowhere"],
            1,
            "nowhere holds no version of an index; build one with `lookalike index`",
        ),
        (["publish", "--index", "i"], 2, "the following arguments are required: VERSION"),
        (["publish", "0123", "--index", "nowhere"], 2, "0123 is no finished version of"),
        (["rollback", "--index", "nowhere"], 1, "nowhere is not a published index: it has no CURRENT"),
        (["gc", "--index", "nowhere"], 1, "nowhere is not a published index: it has no CURRENT"),
        (["gc", "--index", "i", "--keep", "0"], 2, "--keep is 0; keep 1 version"),
        (["gc", "--index", "i", "--min-age", "-2"], 2, "--min-age is -2; take 0 hours or more"),
        (["gc", "--index", "i", "--min-agee", "2"], 2, "did you mean --min-age"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == code
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_these_verbs_need_neither_beam_nor_a_bar():
    """A server goes back to an earlier version with the bare install."""
    heavy = ("apache_beam", "tensorflow", "keras", "tqdm", "ai_edge_litert", "PIL")
    modules = ", ".join(f"jobs.{verb}" for verb in ("versions", "publish", "rollback", "gc"))
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
