"""The jobs as they are called: real arguments, real folders, exit codes and what is printed."""

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pictures
import pytest
import signed

from jobs import cli


class Sources(HTMLParser):
    """Collect what a page's pictures point to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if tag == "img" and name == "src"]


@pytest.fixture(scope="module")
def built(drawn: Path, artifact: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embed and index the drawn pictures through the command line."""
    root = tmp_path_factory.mktemp("built")
    shutil.copytree(drawn, root / "images")
    (root / "images" / "bad.jpg").write_bytes(b"")
    embed = ["embed", "--images", str(root / "images"), "--store", str(root / "store"), "--embedder", artifact]
    assert cli.main(embed) == 0
    assert cli.main(["index", "--store", str(root / "store"), "--index", str(root / "index"), "--shards", "2"]) == 0
    return root


def test_embedding_again_says_that_there_is_nothing_to_do(built, artifact, capsys):
    arguments = ["--images", str(built / "images"), "--store", str(built / "store"), "--embedder", artifact]
    assert cli.main(["embed", *arguments]) == 0
    assert "nothing to do: all 61 images are as run" in capsys.readouterr().out
    assert cli.main(["index", "--store", str(built / "store"), "--index", str(built / "index"), "--shards", "2"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_embed_prints_the_accounting(drawn, artifact, tmp_path, capsys):
    assert cli.main(["embed", "--images", str(drawn), "--store", str(tmp_path), "--embedder", artifact]) == 0
    lines = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:-1])
    assert (lines["listed"], lines["embedded"], lines["rejected"]) == ("60", "60", "0")


def test_search_finds_the_picture_itself_first(built, capsys):
    image = str(next((built / "images" / "maze").iterdir()))
    assert cli.main(["search", "--index", str(built / "index"), "--image", image, "-k", "3", "--json"]) == 0
    captured = capsys.readouterr()
    (answer,) = json.loads(captured.out)
    assert answer["query"] == answer["hits"][0]["uri"] == image
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-3)
    assert answer["hits"][0]["label"] == "maze"
    assert len(answer["hits"]) == 3
    assert "untrained" in captured.err


def test_search_answers_for_the_good_and_fails_for_the_bad(built, tmp_path, capsys):
    good = str(next((built / "images" / "leaf").iterdir()))
    (tmp_path / "note.jpg").write_text("a note")
    images = [str(tmp_path / "note.jpg"), good, str(tmp_path / "nowhere.jpg")]
    assert cli.main(["search", "--index", str(built / "index"), "--image", *images]) == 1
    out = capsys.readouterr().out
    assert "note.jpg cannot be used, not_an_image" in out
    assert "nowhere.jpg does not exist" in out
    assert f"    1  1.0000  {good}  [leaf]" in out


def test_search_draws_a_sheet_that_stands_alone(built, tmp_path):
    image = str(next((built / "images" / "fish").iterdir()))
    page = tmp_path / "sheet.html"
    assert cli.main(["search", "--index", str(built / "index"), "--image", image, "--html", str(page), "-k", "4"]) == 0
    text = page.read_text()
    sources = Sources()
    sources.feed(text)
    assert len(sources.found) == 5
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources.found)
    assert "untrained" in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_good_pictures_of_every_kind_are_found_and_bad_ones_counted(tmp_path, artifact, capsys):
    for name, data in pictures.good().items():
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(data)
    for name, (data, _) in pictures.bad().items():
        (tmp_path / "images" / f"bad-{name}").write_bytes(data)
    where = ["--store", str(tmp_path / "store")]
    images = ["--images", str(tmp_path / "images"), "--all-files", "--max-reject-ratio", "0.9"]
    assert cli.main(["embed", *images, *where, "--embedder", artifact]) == 0
    assert cli.main(["index", *where, "--index", str(tmp_path / "index")]) == 0
    capsys.readouterr()
    good = [str(tmp_path / "images" / name) for name in pictures.good()]
    assert cli.main(["search", "--index", str(tmp_path / "index"), "--image", *good, "-k", "1000", "--json"]) == 0
    for answer in json.loads(capsys.readouterr().out):
        scores = {hit["uri"]: hit["score"] for hit in answer["hits"]}
        assert set(scores) == set(good)
        assert scores[answer["query"]] == pytest.approx(max(scores.values()), abs=1e-5)


def test_verify_says_good(built, capsys):
    assert cli.main(["verify", str(built / "index")]) == 0
    assert cli.main(["verify", str(built / "store")]) == 0
    assert capsys.readouterr().out.count("everything is as it says") == 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def swap(one: Path, two: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


@pytest.mark.parametrize("name", ["shard-00001-of-00002.faiss", "records-00000-of-00002.arrow", "trained.faiss"])
def test_verify_names_a_flipped_byte(name, built, tmp_path, capsys):
    index = Path(shutil.copytree(built / "index", tmp_path / "index"))
    flip(next(index.glob(f"versions/*/{name}")))
    assert cli.main(["verify", str(index)]) == 1
    assert f"{name} is damaged" in capsys.readouterr().out


def test_verify_names_a_missing_and_a_swapped_shard(built, tmp_path, capsys):
    index = Path(shutil.copytree(built / "index", tmp_path / "index"))
    first, second = sorted(index.glob("versions/*/records-*.arrow"))
    swap(first, second)
    next(index.glob("versions/*/shard-00000-of-00002.faiss")).unlink()
    assert cli.main(["verify", str(index)]) == 1
    out = capsys.readouterr().out
    assert "shard-00000-of-00002.faiss is missing" in out
    assert "records-00000-of-00002.arrow is swapped: it holds what records-00001-of-00002.arrow should" in out


def test_verify_names_an_index_of_another_embedder(built, tmp_path, capsys):
    index = Path(shutil.copytree(built / "index", tmp_path / "index"))
    description = next(index.glob("embedders/*/embedder.json"))
    signed.edit(description, spec={"weights": "untrained:seed=7"})
    assert cli.main(["verify", str(index)]) == 1
    assert "is another embedder" in capsys.readouterr().out


def test_verify_names_a_damaged_part_and_a_version_that_is_gone(built, tmp_path, capsys):
    store = Path(shutil.copytree(built / "store", tmp_path / "store"))
    part = next(store.glob("parts/*/*.parquet"))
    flip(part)
    assert cli.main(["verify", str(store)]) == 1
    assert f"{part} is damaged" in capsys.readouterr().out
    (store / "CURRENT").write_text('{"run": "20200101T000000Z-000000"}')
    assert cli.main(["verify", str(store)]) == 1
    assert "20200101T000000Z-000000 is missing, or was never finished" in capsys.readouterr().out
    (store / "CURRENT").write_text("{}")
    assert cli.main(["verify", str(store)]) == 1
    assert "names neither a version nor a run" in capsys.readouterr().err
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert "is neither an index nor a store" in capsys.readouterr().err


def test_train_and_merge_run_those_steps_alone(built, tmp_path, capsys):
    where = ["--store", str(built / "store"), "--index", str(tmp_path / "index")]
    assert cli.main(["train", *where]) == 0
    quantizer = capsys.readouterr().out.splitlines()[0].split()[1]
    assert cli.main(["merge", *where, "--quantizer", quantizer, "--shards", "3", "--no-publish"]) == 0
    assert not (tmp_path / "index" / "CURRENT").exists()
    assert cli.main(["merge", *where, "--quantizer", quantizer, "--shards", "3"]) == 0
    assert (tmp_path / "index" / "CURRENT").exists()
    assert cli.main(["merge", *where, "--quantizer", "0" * 16]) == 1
    assert "has no quantizer" in capsys.readouterr().err


def test_demo_on_a_folder_and_on_its_own_drawings(drawn, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["demo", "--images", str(drawn), "--out", str(out), "--weights", "untrained"]) == 0
    printed = capsys.readouterr().out
    assert "UNTRAINED (random)" in printed
    assert (out / "neighbours.html").stat().st_size > 50_000
    again = ["demo", "--count", "24", "--out", str(out), "--weights", "untrained", "--backbone", "mobilenet"]
    assert cli.main(again) == 0
    printed = capsys.readouterr().out
    assert "33" in printed  # 24 drawn, and 9 broken ones
    assert "1 empty" in printed


def test_demo_keeps_its_hands_off_what_is_not_its_own(built, tmp_path, capsys):
    shutil.copytree(built / "store", tmp_path / "store")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["demo", "--out", str(tmp_path), "--images", str(built / "images")]) == 2
    assert "store exists and is no demo's; name another place with --out" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_demo_looks_before_it_removes(tmp_path, capsys):
    (tmp_path / "store").mkdir()
    (tmp_path / ".lookalike-demo").touch()
    assert cli.main(["demo", "--out", str(tmp_path), "--images", str(tmp_path / "nowhere")]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err
    assert (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["embed"], "the following arguments are required: --images, --store"),
        (["embed", "--images", "x", "--store", "s", "--unit-sise", "3"], "did you mean --unit-size"),
        (
            ["embed", "--images", "a.jpg", "--store", "s", "--unit-size", "0", "--weights", "untrained"],
            "--unit-size is 0",
        ),
        (["embed", "--images", "nowhere", "--store", "s", "--weights", "untrained"], "nowhere does not exist"),
        (["embed", "--images", "x", "--store", "ftp://s"], "the scheme ftp:// is not known"),
        (["index", "--store", "nowhere", "--index", "i"], "nowhere is not an embedding store"),
        (["index", "--store", "s", "--index", "i", "--shards", "5000"], "--shards is 5000"),
        (["search", "--index", "nowhere", "--image", "x.jpg"], "nowhere is not a published index"),
        (["search", "--index", "i", "--image", "x.jpg", "-k", "0"], "-k is 0"),
        (["search", "--index", "i", "--imgae", "x.jpg"], "--image"),
        (["train", "--store", "s", "--index", "i", "--runner=DirectRunner"], "--runner=DirectRunner is not an option"),
        (["embedd"], "embedd is not a verb; there are embed"),
    ],
)
def test_wrong_usage_is_one_sentence_and_a_code(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").touch()
    monkeypatch.setattr("jobs.backbones.convert", lambda _: b"model")
    assert cli.main(arguments) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_help_lists_the_verbs_and_each_has_help(capsys):
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(verb in overview for verb in cli.VERBS)
    for verb in cli.VERBS:
        with pytest.raises(SystemExit) as done:
            cli.main([verb, "--help"])
        assert done.value.code == 0
        assert f"usage: lookalike {verb}" in capsys.readouterr().out


def test_a_missing_extra_is_one_helpful_sentence(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] in ("apache_beam", "jobs", "pipelines")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert cli.main(["embed", "--images", "x", "--store", "s"]) == 2
    assert 'pip install "lookalike[pipeline]"' in capsys.readouterr().err


def test_the_module_is_the_same_as_the_verb():
    run = subprocess.run([sys.executable, "-m", "jobs.verify", "/nowhere"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (
        1,
        "lookalike verify: /nowhere is neither an index nor a store: it has no CURRENT\n",
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    helped = subprocess.run(["lookalike", "--help"], capture_output=True, text=True, check=False, env=environment)
    assert (helped.returncode, helped.stderr) == (0, "")
