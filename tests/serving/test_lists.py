"""Inverted lists of every kind that a quantizer may have, those of earlier releases among them."""

import dataclasses
from pathlib import Path

import faiss
import indexes
import numpy as np
import pytest
import stores
from indexes import Built, assert_best, assert_same, queries_for, recall, uris_of

from pipelines.index import build_version, publish
from pipelines.runner import Runner
from pipelines.training import IndexRequest, TrainedDocument
from serving import Index, storage
from serving.lists import Lists
from serving.manifest import SearchSettings
from serving.quantizer import Quantizer
from transforms.designing import Design
from transforms.encoding import TRAINED, quantizer_folder
from transforms.training import stamp

RAW, DIM, ROWS, NLIST = 48, 24, 1200, 16
MODES = ("memory", "mmap")


# --- Earlier releases -----------------------------------------------------------------------------------------------


def earlier(vectors: np.ndarray) -> bytes:
    """What was trained before: no rotation, codes of the vectors themselves, flat centroids."""
    pca = faiss.PCAMatrix(RAW, DIM)
    chain = [faiss.NormalizationTransform(RAW), pca, faiss.NormalizationTransform(DIM)]
    reduced = vectors
    for transform in chain:
        transform.train(reduced)
        reduced = transform.apply(reduced)
    lists = faiss.IndexIVFPQ(faiss.IndexFlatIP(DIM), DIM, NLIST, DIM // 2, 4, faiss.METRIC_INNER_PRODUCT)
    lists.cp.spherical, lists.by_residual = True, False
    refined = faiss.IndexRefine(
        lists, faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    )
    refined.train(reduced)
    index = faiss.IndexPreTransform(refined)
    for transform in reversed(chain):
        index.prepend_transform(transform)
    index.is_trained = True
    return bytes(faiss.serialize_index(index))


@pytest.fixture(scope="module")
def of_before(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root, vectors = tmp_path_factory.mktemp("earlier"), stores.clustered(ROWS, RAW)
    labels = ["even", "odd"] * (ROWS // 2)
    store = stores.write_store(root / "store", vectors, labels=labels)
    request = IndexRequest(str(root / "store"), str(root / "index"), shards=3)
    data = stamp(earlier(vectors), store.embedder.fingerprint)
    trained = TrainedDocument(
        quantizer=Quantizer(data).id,
        embedder=store.embedder.fingerprint,
        design=Design("ivf-pq", DIM, NLIST, DIM // 4, ROWS, DIM),
        rows=ROWS,
        store=request.store,
        run=store.run_id,
        created="2026-01-01T00:00:00Z",
    )
    storage.create(storage.join(quantizer_folder(request.index, trained.quantizer), TRAINED), data)
    with indexes.few_probes():
        manifest = build_version(request, store, trained, Runner())
    publish(request.index, manifest.version, None)
    return Built(root, vectors, labels, store, manifest, request)


@pytest.mark.parametrize("mode", MODES)
def test_an_earlier_quantizer_answers_right(of_before, mode):
    assert not of_before.quantizer.ivf.by_residual
    queries, index = queries_for(of_before, 200), of_before.opened(mode)
    answers = index.search(queries, 10, settings=of_before.exhaustive)
    assert_best(of_before, answers, of_before.code_scores(queries), 10)
    assert recall(uris_of(index.search(queries, 10)), of_before.nearest(queries, 10)) >= 0.95
    assert_same([index.search(query, 10)[0] for query in queries], index.search(queries, 10))
    odd = index.search(queries, 10, labels={"odd"}, settings=of_before.exhaustive)
    assert_best(of_before, odd, of_before.code_scores(queries), 10, range(1, ROWS, 2))


def test_an_earlier_quantizer_keeps_its_promise(of_before):
    assert of_before.manifest.measured["recall_at_10"] >= of_before.manifest.parameters["target_recall"]


# --- FAISS's own keys -----------------------------------------------------------------------------------------------

KEYS = {  # `np` spares a training that only other searches need
    "graph": "IVF16_HNSW8,PQ24x4fs,RFlat",
    "half floats": "OPQ12_24,IVF16,PQ12x4,Refine(SQfp16)",
    "scalar codes": "IVF16,SQ8",
    "whole vectors": "PCA24,IVF16,Flat",
    "bytes": "IVF16,PQ12x8np",
    "bytes, ranked again": "IVF16,PQ12x8np,Refine(SQ8)",
}


@pytest.fixture(scope="module", params=KEYS)
def custom(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    vectors, labels = stores.clustered(ROWS, RAW), ["even", "odd"] * (ROWS // 2)
    root = tmp_path_factory.mktemp("custom")
    return indexes.build(root, vectors, 3, labels=labels, index_factory=KEYS[request.param])


@pytest.mark.parametrize("mode", MODES)
def test_any_lists_are_searched_whole(custom, mode):
    queries, index = queries_for(custom, 40), custom.opened(mode)
    scores = custom.code_scores(queries)
    for labels, among in ((None, None), ({"odd"}, range(1, ROWS, 2))):
        answers = index.search(queries, 10, labels=labels, settings=custom.exhaustive)
        assert_best(custom, answers, scores, 10, among)
        alone = [index.search(query, 10, labels=labels, settings=custom.exhaustive)[0] for query in queries]
        assert_best(custom, alone, scores, 10, among)


@pytest.mark.parametrize("mode", MODES)
def test_any_lists_give_all_they_hold(custom, mode):
    [hits] = custom.opened(mode).search(custom.vectors[3], 10**6)
    assert sorted(hit.row for hit in hits) == list(range(len(custom.vectors)))


# --- Threads, lists that are not there ------------------------------------------------------------------------------


def test_lists_that_a_graph_does_not_find_are_passed_over(pq, monkeypatch):
    """It says -1 then."""
    index, queries = Index.open(pq.index, mode="mmap"), queries_for(pq, 50)
    expected = index.search(queries, 5, settings=SearchSettings(4, 100))
    coarse = Lists._coarse

    def forgetful(self: Lists, reduced: np.ndarray, settings: SearchSettings, selection: None) -> tuple:
        lists, closeness = coarse(self, reduced, dataclasses.replace(settings, nprobe=4), selection)
        nothing = np.full((len(lists), 3), -1)
        far = np.full(nothing.shape, -np.inf, np.float32)
        return np.hstack([lists, nothing]), np.hstack([closeness, far])

    monkeypatch.setattr(Lists, "_coarse", forgetful)
    assert index.search(queries, 5, settings=SearchSettings(7, 100)) == expected


def test_a_graph_of_many_centroids_is_searched_as_wide_as_said(tmp_path: Path):
    """The more centroids are kept in view, the nearer the lists come to the nearest there are."""
    built = indexes.build(
        tmp_path, stores.clustered(4000, 16, clusters=80), 2, index_factory="IVF100_HNSW2,PQ8x4,Refine(SQ8)"
    )
    queries = queries_for(built, 200)
    truth = built.nearest(queries, 10)
    found = [
        recall(uris_of(built.whole.search(queries, 10, settings=SearchSettings(8, 400, effort))), truth)
        for effort in (8, 100)
    ]
    assert found[0] < found[1]
    assert found[1] >= 0.9
