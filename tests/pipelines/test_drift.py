"""Which quantizer the next version gets, on stores of made-up vectors."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import stores

from pipelines.drift import choose_quantizer
from pipelines.index import build_version, run
from pipelines.lineage import Origin
from pipelines.runner import Runner
from pipelines.training import IndexRequest, TrainedDocument, load_trained
from serving.manifest import IndexManifest, RunManifest
from transforms.comparing import Changes

pytestmark = pytest.mark.usefixtures("one_faiss_thread")

COUNT = 1600
CLUSTERED = stores.clustered(2 * COUNT)
ELSEWHERE = stores.clustered(400, clusters=200, seed=7)[:, ::-1]
"""As vectors of a network look on pictures of another kind."""


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A store, and the first version of its index."""
    root = tmp_path_factory.mktemp("drift")
    stores.write_store(root / "store", CLUSTERED[:COUNT])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transforms.measuring._LATENCY_QUERIES", 10)
        run(request(root), Runner())
    return root


@pytest.fixture
def root(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transforms.measuring._LATENCY_QUERIES", 10)
    for name in ("store", "index"):
        shutil.copytree(first / name, tmp_path / name)
    return tmp_path


def request(root: Path, **options) -> IndexRequest:
    return IndexRequest(str(root / "store"), str(root / "index"), **{"dim": 32, **options})


def current(root: Path) -> IndexManifest:
    (path,) = root.glob("index/versions/*/manifest.json")
    return IndexManifest.load(str(path))


def grow(root: Path, vectors: np.ndarray, run_id: str = "run-2", kept: int = COUNT) -> RunManifest:
    """Commit a run of the first `kept` vectors and some more."""
    uris = [f"/made/{number:06}.jpg" for number in range(kept)] + [f"/more/{n:06}.jpg" for n in range(len(vectors))]
    return stores.write_store(root / "store", np.concatenate([CLUSTERED[:kept], vectors]), uris, run_id=run_id)


def choose(root: Path, made: RunManifest, max_drift: float = 0.1, **options):
    return choose_quantizer(request(root, **options), made, current(root), max_drift)


def test_without_a_version_there_is_nothing_to_use_again(root):
    choice = choose_quantizer(request(root), grow(root, CLUSTERED[COUNT:1700]), None, 0.1)
    assert (choice.trained, choice.origin.parent) == (None, None)
    assert choice.origin.why == "no version was published before"


def test_rows_like_those_trained_on_use_it_again(root):
    made = grow(root, CLUSTERED[COUNT : COUNT + 300])
    choice = choose(root, made)
    assert choice.trained == load_trained(str(root / "index"), current(root).quantizer)
    assert choice.origin.reused
    drift = choice.origin.drift
    assert drift["new"] == 300
    assert drift["distortion_new"] == pytest.approx(drift["distortion_trained"], rel=0.1)
    assert drift["distortion_trained"] == pytest.approx(current(root).measured["distortion"], rel=1e-3)
    built = build_version(request(root), made, choice.trained, Runner(), choice.origin)
    assert built.quantizer == current_of(root, built).quantizer
    assert built.lineage["quantizer"] == {"reused": True, "why": "it fits", **drift}
    assert built.lineage["changes"] == dataclasses.asdict(Changes(added=300, reused=COUNT))
    assert (built.lineage["run"], built.lineage["parent_run"]) == ("run-2", "run-1")


def current_of(root: Path, built: IndexManifest) -> IndexManifest:
    return IndexManifest.load(str(root / "index" / "versions" / built.lineage["parent"] / "manifest.json"))


def test_rows_of_another_kind_ask_for_training(root):
    made = grow(root, ELSEWHERE)
    choice = choose(root, made)
    assert choice.trained is None
    drift = choice.origin.drift
    assert drift["new"] == 400
    assert drift["distortion_new"] > 1.1 * drift["distortion_trained"]
    assert choice.origin.why.startswith("the distortion of 400 new rows is 0.")
    assert "more than 10% above the 0." in choice.origin.why
    assert choose(root, made, max_drift=20).trained is not None


def test_a_handful_of_rows_says_nothing(root):
    choice = choose(root, grow(root, ELSEWHERE[:49]))
    assert choice.trained is not None
    assert choice.origin.drift["new"] == 49


def test_what_came_little_by_little_is_added_up(root):
    """Thirty a night would never be enough to tell by the nights alone."""
    grow(root, ELSEWHERE[:30])
    choice = choose(root, grow(root, ELSEWHERE[:60], run_id="run-3"))
    assert choice.trained is None
    assert choice.origin.drift["new"] == 60


def test_a_run_that_was_cleaned_up_is_done_without(root):
    made = grow(root, CLUSTERED[COUNT : COUNT + 100])
    shutil.rmtree(root / "store" / "runs" / "run-1")
    choice = choose(root, made)
    assert choice.trained is not None
    assert choice.origin.drift["new"] == 1000  # a sample of all rows


def test_a_quantizer_without_a_distortion_is_held_to_what_was_measured(root):
    made = grow(root, CLUSTERED[COUNT : COUNT + 100])
    path = root / "index" / "encoded" / current(root).quantizer / "trained.json"
    path.write_bytes(dataclasses.replace(TrainedDocument.load(str(path)), distortion=None).to_json())
    choice = choose(root, made)
    assert choice.origin.drift["distortion_trained"] == current(root).measured["distortion"]
    assert choice.trained is not None


def test_a_collection_that_outgrew_its_shape_is_trained_anew(root):
    choice = choose(root, grow(root, stores.clustered(2 * COUNT, seed=3)))
    assert choice.trained is None
    assert choice.origin.why == "4,800 vectors take another shape than the 1,600 it was trained for"


def test_other_options_are_trained_for(root):
    made = grow(root, CLUSTERED[COUNT : COUNT + 100])
    assert choose(root, made, dim=16).origin.why == "it was trained with another --dim"
    assert choose(root, made, recall_against="raw").origin.why == "it was trained with another --recall-against"
    assert choose(root, made, target_recall=0.8).trained is not None  # the same quantizer, tuned to less


def test_another_embedder_is_trained_for(root):
    other = stores.write_store(root / "other", CLUSTERED[:COUNT], embedder=stores.spec(64, "untrained:seed=1"))
    assert choose(root, other).origin.why == "the embedder is another"


def test_a_quantizer_that_is_gone_is_trained_again(root):
    made = grow(root, CLUSTERED[COUNT : COUNT + 100])
    shutil.rmtree(root / "index" / "encoded")
    assert choose(root, made).origin.why == "what the last one was trained for is not there any more"


def test_an_exact_index_never_drifts(tmp_path):
    stores.write_store(tmp_path / "store", CLUSTERED[:100])
    run(IndexRequest(str(tmp_path / "store"), str(tmp_path / "index")), Runner())
    made = stores.write_store(tmp_path / "store", CLUSTERED[:200], run_id="run-2")
    asked = IndexRequest(str(tmp_path / "store"), str(tmp_path / "index"))
    choice = choose_quantizer(asked, made, current(tmp_path), 0.0)
    assert choice.trained is not None
    assert choice.origin.drift == {"new": 0}


def test_a_parent_whose_run_is_gone_leaves_no_changes_to_tell(root):
    made = grow(root, CLUSTERED[COUNT : COUNT + 10])
    shutil.rmtree(root / "store" / "runs" / "run-1")
    trained = load_trained(str(root / "index"), current(root).quantizer)
    built = build_version(request(root), made, trained, Runner(), Origin(current(root)))
    assert built.lineage["changes"] is None
    assert built.lineage["parent_run"] == "run-1"
