"""What may be asked of an index on the command line, and what is said of it."""

import re
from pathlib import Path

import pytest
import stores

from jobs import cli
from jobs import index as job
from jobs.options import parse
from pipelines.index import IndexRequest
from serving.manifest import load_index_manifest


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight hundred vectors of 32 dimensions, 160 of them left out of training."""
    path = tmp_path_factory.mktemp("store")
    stores.write_store(path, stores.clustered(800, 32), labels=["cat", "dog"] * 400)
    return str(path)


@pytest.fixture
def ask(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Index the store with some flags; return the exit code, what is printed and what is complained of."""

    def index(*flags: str) -> tuple[int, str, str]:
        code = cli.main(["index", "--store", store, "--index", str(tmp_path / "index"), *flags])
        return code, *capsys.readouterr()

    return index


def test_flags_become_a_request():
    flags = "--dim 64 --nlist 9 --shards 3 --target-recall 0.9 --recall-against raw --max-bytes-per-vector 100.5"
    where = ["--store", "/s", "--index", "/i"]
    options, rest = parse(job.Options, [*where, *flags.split(), "--max-latency-us", "50"], "index", "", beam=True)
    assert not rest
    assert job.request(options) == IndexRequest("/s", "/i", 64, 9, 3, 0.9, "raw", 100.5, 50.0)
    options, _ = parse(job.Options, [*where, "--index-factory", "PCA16,IVF8,PQ8x4"], "index", "", beam=True)
    assert job.request(options) == IndexRequest("/s", "/i", index_factory="PCA16,IVF8,PQ8x4")
    options, _ = parse(job.Options, where, "index", "", beam=True)
    assert job.request(options) == IndexRequest("/s", "/i")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--target-recall 0", "--target-recall is 0; take more than 0, at most 1"),
        ("--target-recall 97", "--target-recall is 97; take more than 0, at most 1"),
        ("--target-recall nan", "--target-recall is nan; take more than 0, at most 1"),
        ("--target-recall high", "argument --target-recall: invalid float value: 'high'; see lookalike index --help"),
        ("--recall-against pixels", "argument --recall-against: invalid choice: 'pixels'"),
        ("--max-bytes-per-vector 0", "--max-bytes-per-vector is 0; take more than 0"),
        ("--max-bytes-per-vector 3", "--max-bytes-per-vector is 3; the smallest index takes 12"),
        ("--max-bytes-per-vector 15 --dim 32", "--max-bytes-per-vector is 15; the smallest index takes 16"),
        ("--max-latency-us -1", "--max-latency-us is -1; take more than 0 microseconds"),
        ("--max-latency-us nan", "--max-latency-us is nan; take more than 0 microseconds"),
        ("--dim 33", "--dim 33 is odd; codes stand for 2 dimensions each, take an even one"),
        ("--nlist 99", "--nlist is 99; 640 vectors can train 1 to 16 lists"),
        ("--index-factory HNSW32", "--index-factory HNSW32: take inverted lists"),
        ("--index-factory nonsense", "--index-factory nonsense: FAISS cannot build it"),
        ("--index-factory IVF8,Flat --dim 16", "--index-factory says everything about the index's shape"),
        ("--index-factory IVF8,Flat --nlist 8", "--index-factory says everything about the index's shape"),
        ("--index-factory IVF8,Flat --max-bytes-per-vector 99", "--index-factory says everything"),
        ("--index-factroy IVF8,Flat", "--index-factory"),
    ],
)
def test_wrong_values_are_one_sentence_and_exit_code_2(ask, tmp_path, flags, said):
    code, out, error = ask(*flags.split())
    assert (code, out) == (2, "")
    last = error.strip().splitlines()[-1]
    assert last.startswith("lookalike index: ")
    assert said in last
    assert "Traceback" not in error
    assert not (tmp_path / "index" / "CURRENT").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--target-recall 0.999 --max-bytes-per-vector 12", "--target-recall 0.999 cannot be met; the best that can"),
        ("--max-latency-us 0.001 --dim 16", "--max-latency-us 0.001 cannot be met; the best that can"),
    ],
)
def test_a_target_that_is_missed_is_exit_code_1_and_nothing_is_published(ask, tmp_path, flags, said):
    code, out, error = ask(*flags.split())
    assert (code, out) == (1, "")
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"lookalike index: {said} is recall@10 0.")
    assert "Nothing was published" in last
    assert not (tmp_path / "index" / "CURRENT").exists()
    assert not list(tmp_path.glob("index/versions/*/manifest.json"))


def table(printed: str) -> dict[str, str]:
    return dict(re.split("  +", line, maxsplit=1) for line in printed.splitlines() if "  " in line)


def test_the_report_says_what_was_measured(ask, tmp_path):
    code, out, _ = ask("--dim", "16", "--target-recall", "0.9")
    manifest = load_index_manifest(str(tmp_path / "index"))
    said = table(out)
    assert code == 0
    assert (said["version"], said["kind"], said["images"]) == (manifest.version, "ivf-pq", "800")
    assert said["dimensions"] == "32 → 16"
    assert said["search"] == f"nprobe {manifest.search.nprobe}, rerank {manifest.search.rerank}"
    assert said["recall@10"] == f"{manifest.measured['recall_at_10']:.3f}"
    assert manifest.measured["recall_at_10"] >= 0.9
    assert said["bytes a vector"] == "28 in memory"
    assert said["lookup, p50"] == f"{manifest.measured['p50_us']:.0f} µs"
    assert "is below" not in out
    assert ask("--dim", "16", "--target-recall", "0.9")[1].startswith("nothing to do: version")


def test_the_report_of_an_index_faithful_to_raw_vectors_says_so(ask, tmp_path):
    code, out, _ = ask("--dim", "16", "--recall-against", "raw")
    search = load_index_manifest(str(tmp_path / "index")).search
    assert code == 0
    words = f"nprobe {search.nprobe}, rerank {search.rerank}, {search.rerank_raw} of them by whole vectors"
    assert table(out)["search"] == words


def test_the_report_tells_of_a_recall_below_what_was_looked_for(ask):
    """Nobody asked for it, so that the best is published, and said to be no more than that."""
    code, out, _ = ask("--max-bytes-per-vector", "12")
    assert code == 0
    assert "recall@10 is below 0.97, the best that could be tuned; other dimensions (--dim) may raise it" in out


def test_a_quantizer_trained_for_the_raw_order_is_merged_for_it(store, tmp_path, capsys):
    where = ["--store", store, "--index", str(tmp_path / "index")]
    assert cli.main(["train", *where, "--dim", "16", "--recall-against", "raw"]) == 0
    quantizer = table(capsys.readouterr().out)["quantizer"]
    assert cli.main(["merge", *where, "--quantizer", quantizer]) == 0
    assert "of them by whole vectors" in table(capsys.readouterr().out)["search"]
    assert cli.main(["index", *where, "--dim", "16", "--recall-against", "raw"]) == 0
    assert "nothing to do" in capsys.readouterr().out
