"""The whole on real photos with real weights: what a user gets, against figures worked out by exact search."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from real import damaged, embed_folder, photos_folder, weights_file

from jobs import cli
from pipelines import index
from pipelines.gate import Tolerance, failed, judge
from pipelines.runner import Runner
from pipelines.training import IndexRequest
from serving import Hit, Index
from serving.manifest import load_index_manifest, load_run_manifest
from serving.quantizer import Quantizer
from transforms.sampling import live_rows

MOBILENET_V2 = "mobilenet_v2_1.0_224_no_top_bnfolded.h5"
K = 10


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    photos, weights = photos_folder(), weights_file(MOBILENET_V2)
    assert cli.main(["embed", "--images", photos, "--store", str(root / "store"), "--weights", weights]) == 0
    assert cli.main(["index", "--store", str(root / "store"), "--index", str(root / "index"), "--shards", "4"]) == 0
    return root


@pytest.fixture(scope="module")
def vectors(built: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    live = live_rows(str(built / "store"), load_run_manifest(str(built / "store")))
    return live.column("uri"), np.array(live.column("label")), live.vectors()


@pytest.fixture(scope="module")
def answers(built: Path, vectors) -> list[list[Hit]]:
    """Ask with every photo, and leave it out of its own answer."""
    uris, _, raw = vectors
    found = Index.open(str(built / "index")).search(raw, K + 1)
    return [[hit for hit in hits if hit.uri != uri][:K] for uri, hits in zip(uris, found, strict=True)]


def nearest(space: np.ndarray) -> np.ndarray:
    """Search exactly, the query itself left out."""
    unit = space / np.linalg.norm(space, axis=1, keepdims=True)
    closeness = unit @ unit.T
    np.fill_diagonal(closeness, -np.inf)
    return np.argsort(-closeness, axis=1)[:, :K]


def test_every_photo_is_accounted_for(built):
    run = load_run_manifest(str(built / "store"))
    assert run.accounting.listed == 1485 == run.accounting.embedded + run.accounting.rejects
    info = Index.open(str(built / "index")).info
    assert (info.kind, info.rows, len(info.shards)) == ("ivf-pq", run.live, 4)


def test_exact_search_on_raw_vectors_is_the_published_one(vectors):
    """If this fails, decoding or the network differ from those the reference figures were made with."""
    _, labels, raw = vectors
    right = labels[nearest(raw)] == labels[:, np.newaxis]
    assert right[:, 0].mean() == pytest.approx(0.727, abs=0.005)
    assert right.mean() == pytest.approx(0.652, abs=0.005)


def test_precision_by_label_through_the_index(vectors, answers):
    _, labels, _ = vectors
    right = np.array([[hit.label == label for hit in hits] for hits, label in zip(answers, labels, strict=True)])
    print(f"P@1 {right[:, 0].mean():.3f}, P@10 {right.mean():.3f}")
    assert right[:, 0].mean() >= 0.72
    assert right.mean() >= 0.64


def test_recall_against_exact_search_in_the_index_own_space(built, vectors, answers):
    uris, _, raw = vectors
    info = load_index_manifest(str(built / "index"))
    quantizer = Quantizer((built / "index" / "versions" / info.version / info.trained.name).read_bytes())
    truth = nearest(quantizer.reduce(raw))
    shares = [
        len({hit.uri for hit in hits} & {uris[place] for place in places}) / K
        for hits, places in zip(answers, truth, strict=True)
    ]
    print(f"recall@10 {np.mean(shares):.3f}")
    assert np.mean(shares) >= 0.95


def test_a_photo_file_finds_its_own_kind(built, vectors):
    uris, labels, _ = vectors
    opened = Index.open(str(built / "index"))
    shoes = [uri for uri, label in zip(uris, labels, strict=True) if label == "shoes"][:20]
    hits = opened.search_images([Path(uri).read_bytes() for uri in shoes], 2)
    assert [found[0].uri for found in hits] == shoes
    assert np.mean([found[1].label == "shoes" for found in hits]) > 0.8


def test_an_embedder_of_scrambled_weights_does_not_pass_the_gate(built, tmp_path):
    """Its weights are all there, in another order: near copies are still alike to it, things of one kind are not."""
    for folder in Path(photos_folder()).iterdir():
        for path in sorted(folder.glob("*.jpg"))[:25]:
            (tmp_path / "images" / folder.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "images" / folder.name)
    (artifact,) = (built / "store" / "embedders").iterdir()
    scrambled = damaged(str(artifact), str(tmp_path / "scrambled"), "scrambled")
    embed_folder(tmp_path / "images", tmp_path / "store", scrambled)
    manifest, _ = index.run(IndexRequest(str(tmp_path / "store"), str(tmp_path / "index")), Runner())
    current = load_index_manifest(str(built / "index"))
    refused = failed(judge(str(tmp_path / "index"), manifest, current, Tolerance(max_shrink=1.0)))
    assert [check.name for check in refused] == ["P@1 by label"]
    assert refused[0].candidate < refused[0].current - 0.2
