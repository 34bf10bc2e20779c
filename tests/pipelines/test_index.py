import dataclasses
import json
import math
import re
from pathlib import Path

import faiss
import numpy as np
import pytest
import stores
from real import embed_folder

from pipelines import index
from pipelines.index import build_version, publish, run
from pipelines.runner import Runner
from pipelines.training import IndexRequest, load_trained, train_quantizer
from serving import Index
from serving.errors import ChecksumMismatch, Conflict, EmbedderMismatch, NotFound, TargetMissed, UsageError
from serving.manifest import IndexManifest, load_run_manifest
from transforms.verifying import check_version


def checksums(manifest: IndexManifest) -> list[str]:
    return [manifest.trained.sha256, *(entry.sha256 for shard in manifest.shards for entry in shard.files)]


def build(tmp_path: Path, count: int, name: str = "", **options: int) -> IndexManifest:
    store = tmp_path / f"store{name}"
    stores.write_store(store, stores.clustered(count), labels=[str(number % 20) for number in range(count)])
    manifest, changed = run(IndexRequest(str(store), str(tmp_path / f"index{name}"), dim=32, **options), Runner())
    assert changed
    return manifest


@pytest.mark.parametrize(("count", "kind"), [(1, "exact"), (2, "exact"), (50, "exact"), (700, "ivf-pq")])
def test_collections_of_every_size_answer(count, kind, tmp_path):
    manifest = build(tmp_path, count, shards=3)
    assert (manifest.kind, manifest.rows) == (kind, count)
    assert manifest.measured["recall_at_10"] >= 0.95
    vectors = stores.clustered(count)
    answers = Index.open(str(tmp_path / "index")).search(vectors, 1)
    found = [hits[0].uri == f"/made/{number:06}.jpg" for number, hits in enumerate(answers)]
    assert sum(found) >= 0.99 * count


@pytest.mark.soak
def test_twenty_thousand_vectors_small(tmp_path):
    manifest = build(tmp_path, 20_000, shards=8)
    print(manifest.measured)
    assert (manifest.kind, manifest.rows) == ("ivf-pq", 20_000)
    assert manifest.measured["recall_at_10"] >= 0.95
    assert manifest.measured["precision_at_1"] == 1.0


def test_a_store_without_an_embedded_image_is_one_clear_sentence(tmp_path):
    stores.write_store(tmp_path / "store", stores.clustered(1)[:0], rejected=["/made/bad.jpg"])
    with pytest.raises(UsageError, match="holds no embedded image to index; its 1 images were all rejected"):
        run(IndexRequest(str(tmp_path / "store"), str(tmp_path / "index")), Runner())
    assert not (tmp_path / "index").exists()


def test_indexing_again_builds_nothing(tmp_path):
    first = build(tmp_path, 700)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*") if path.is_file()}
    again, changed = run(IndexRequest(str(tmp_path / "store"), str(tmp_path / "index"), dim=32), Runner())
    assert (again, changed) == (first, False)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*") if path.is_file()}


def test_an_index_depends_on_its_rows_and_quantizer_alone(tmp_path):
    """Units, history and worker processes leave no trace in the shards."""
    vectors = stores.clustered(900)
    uris = [f"/made/{number:06}.jpg" for number in range(900)]
    plain, grown = tmp_path / "plain", tmp_path / "grown"
    stores.write_store(plain, vectors, uris, unit_size=500)
    stores.write_store(grown, vectors[200:], uris[200:], unit_size=64, rejected=["/made/bad.jpg"])
    stores.write_store(grown, vectors, uris, unit_size=100, run_id="run-2")
    request = IndexRequest(str(plain), str(tmp_path / "one"), dim=32, shards=3)
    one, _ = run(request, Runner())
    two, _ = run(
        IndexRequest(str(grown), str(tmp_path / "two"), dim=32, shards=3),
        Runner(["--direct_num_workers=2", "--direct_running_mode=multi_processing"]),
    )
    assert checksums(one) == checksums(two)
    assert len(checksums(one)) == 10


def test_in_process_and_two_worker_processes_give_the_same_index(drawn, tmp_path, artifact):
    workers = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
    inside = embed_folder(drawn, tmp_path / "inside", artifact, unit_size=2048)
    outside = embed_folder(drawn, tmp_path / "outside", artifact, *workers, unit_size=16)
    assert inside.manifest.accounting == outside.manifest.accounting
    one, _ = run(IndexRequest(str(tmp_path / "inside"), str(tmp_path / "one"), shards=2), Runner())
    two, _ = run(IndexRequest(str(tmp_path / "outside"), str(tmp_path / "two"), shards=2), Runner(workers))
    assert checksums(one) == checksums(two)


def test_training_and_merging_alone(tmp_path):
    stores.write_store(tmp_path / "store", stores.clustered(700))
    request = IndexRequest(str(tmp_path / "store"), str(tmp_path / "index"), dim=32)
    source = load_run_manifest(request.store)
    trained = train_quantizer(request, source)
    assert load_trained(request.index, trained.quantizer) == trained
    manifest = build_version(request, source, trained, Runner())
    with pytest.raises(NotFound, match="is not a published index"):
        Index.open(request.index)
    assert len(Index.open(request.index, version=manifest.version)) == 700
    publish(request.index, manifest.version, None)
    assert Index.open(request.index).info == manifest


def test_a_partial_is_encoded_once(tmp_path):
    manifest = build(tmp_path, 700)
    partials = sorted((tmp_path / "index" / "encoded" / manifest.quantizer).glob("*.parquet"))
    written = [path.stat().st_mtime_ns for path in partials]
    request = IndexRequest(str(tmp_path / "store"), str(tmp_path / "index"), dim=32, shards=5)
    other = build_version(
        request, load_run_manifest(request.store), load_trained(request.index, manifest.quantizer), Runner()
    )
    assert (len(other.shards), other.rows) == (5, 700)
    assert [path.stat().st_mtime_ns for path in partials] == written


def test_a_quantizer_of_another_embedder_is_refused(tmp_path):
    manifest = build(tmp_path, 700)
    other = tmp_path / "other"
    stores.write_store(other, stores.clustered(700), embedder=stores.spec(64, "untrained:seed=1"))
    request = IndexRequest(str(other), str(tmp_path / "index"), dim=32)
    with pytest.raises(EmbedderMismatch, match="was trained on vectors of the embedder"):
        build_version(request, load_run_manifest(str(other)), load_trained(request.index, manifest.quantizer), Runner())


def test_embedders_whose_vectors_are_equally_long_share_no_quantizer(tmp_path):
    """Nothing is trained for few vectors, so that nothing but the stamp tells these quantizers apart."""
    manifests = []
    for weights in ("untrained:seed=0", "untrained:seed=1"):
        store = tmp_path / weights.removeprefix("untrained:")
        stores.write_store(store, stores.clustered(50), embedder=stores.spec(64, weights))
        request = IndexRequest(str(store), str(tmp_path / "index"))
        source = load_run_manifest(request.store)
        trained = load_trained(request.index, train_quantizer(request, source).quantizer)
        assert trained.embedder == source.embedder.fingerprint
        manifests.append(build_version(request, source, trained, Runner()))
        assert list(check_version(request.index, manifests[-1])) == []
    assert len({manifest.quantizer for manifest in manifests}) == 2


def test_an_unknown_quantizer_is_one_clear_sentence(tmp_path):
    with pytest.raises(NotFound, match="has no quantizer 0123; train one with `lookalike train`"):
        load_trained(str(tmp_path), "0123")


def test_publishing_over_somebody_elses_publication_is_refused(tmp_path):
    build(tmp_path, 50)
    with pytest.raises(Conflict, match="version other is finished and not current"):
        publish(str(tmp_path / "index"), "other", None)


def test_losing_the_race_to_an_equal_run_is_no_conflict(tmp_path):
    manifest = build(tmp_path, 50)
    publish(str(tmp_path / "index"), manifest.version, None)
    assert Index.open(str(tmp_path / "index")).info == manifest


def test_merging_alone_records_what_the_quantizer_was_trained_with(tmp_path):
    stores.write_store(tmp_path / "store", stores.clustered(700))
    request = IndexRequest(str(tmp_path / "store"), str(tmp_path / "index"))
    source = load_run_manifest(request.store)
    narrow = dataclasses.replace(request, dim=32, nlist=3)
    trained = load_trained(request.index, train_quantizer(narrow, source).quantizer)
    merged = build_version(request, source, trained, Runner())
    publish(request.index, merged.version, None)
    assert run(narrow, Runner()) == (merged, False)
    wide, changed = run(request, Runner())
    assert changed
    assert wide.reduced_dim == 64


def test_only_the_very_quantizer_is_copied_into_a_version(tmp_path, monkeypatch):
    stores.write_store(tmp_path / "store", stores.clustered(50))
    request = IndexRequest(str(tmp_path / "store"), str(tmp_path / "index"))
    merge = index._merge

    def merge_then_damage(request, run, quantizer, *rest):
        merge(request, run, quantizer, *rest)
        path = tmp_path / "index" / "encoded" / quantizer / "trained.faiss"
        path.write_bytes(path.read_bytes() + b"x")

    monkeypatch.setattr(index, "_merge", merge_then_damage)
    with pytest.raises(ChecksumMismatch, match=r"trained\.faiss is damaged or another quantizer's"):
        run(request, Runner())
    assert not list((tmp_path / "index").glob("versions/*/trained.faiss"))


def test_the_manifest_records_where_the_version_came_from(tmp_path):
    manifest = build(tmp_path, 700)
    body = json.loads((tmp_path / "index" / "versions" / manifest.version / "manifest.json").read_text())
    assert body["lineage"]["run"] == "run-1"
    assert body["embedder"]["weights"] == "untrained:seed=0"
    assert {"recall_at_10", "recall_at_10_raw", "precision_at_1", "bytes_per_vector", "p50_us"} <= set(body["measured"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"shards": -1}, "--shards is -1"),
        ({"shards": 1025}, "--shards is 1025"),
        ({"dim": 33}, "--dim 33 is odd"),
        ({"target_recall": 0.0}, "--target-recall is 0; take more than 0, at most 1"),
        ({"target_recall": 1.01}, "--target-recall is 1.01"),
        ({"target_recall": math.nan}, "--target-recall is nan"),
        ({"recall_against": "pixels"}, "--recall-against is pixels; take reduced or raw"),
        ({"max_bytes_per_vector": 0.0}, "--max-bytes-per-vector is 0; take more than 0"),
        ({"max_latency_us": 0.0}, "--max-latency-us is 0; take more than 0 microseconds"),
        ({"max_latency_us": math.nan}, "--max-latency-us is nan"),
        ({"index_factory": "IVF8,Flat", "nlist": 8}, "--index-factory says everything"),
    ],
)
def test_wrong_wishes_are_refused_before_anything_is_read(wrong, said):
    with pytest.raises(UsageError, match=said):
        IndexRequest("nowhere", "index", **wrong)


# Promises


@pytest.fixture(scope="module")
def twelve_hundred(tmp_path_factory) -> str:
    """A store of 1,200 vectors of 64 dimensions, 240 of them left out of training."""
    path = tmp_path_factory.mktemp("twelve-hundred") / "store"
    stores.write_store(path, stores.clustered(1200), labels=[str(number % 20) for number in range(1200)])
    return str(path)


@pytest.fixture
def ask_for(twelve_hundred, tmp_path):
    """Index that store again and again into one folder, each time with other wishes."""

    def ask(**wishes) -> tuple[IndexManifest, bool]:
        return run(IndexRequest(twelve_hundred, str(tmp_path / "index"), **wishes), Runner())

    return ask


def finished(index: Path) -> set[str]:
    return {path.parent.name for path in index.glob("versions/*/manifest.json")}


def current(index: Path) -> bytes | None:
    path = index / "CURRENT"
    return path.read_bytes() if path.exists() else None


def test_a_recall_that_cannot_be_reached_publishes_nothing(ask_for, tmp_path):
    index = tmp_path / "index"
    out_of_reach = {"target_recall": 0.999, "max_bytes_per_vector": 16}
    with pytest.raises(TargetMissed) as missed:
        ask_for(**out_of_reach)
    # Thirty-two dimensions take 8 + 8 bytes without codes to rank again by, sixteen 8 + 4.
    told = re.findall(
        r"the best that can is recall@10 (0\.\d+) against the reduced vectors, (\d+) bytes", str(missed.value)
    )
    assert str(missed.value).startswith("--target-recall 0.999 cannot be met; the best that can is recall@10 0.")
    ((recall, size),) = told
    assert (int(size), "at 32 dimensions" in str(missed.value)) in [(16, True), (12, False)]
    assert 0.2 < float(recall) < 0.95
    assert "Nothing was published" in str(missed.value)
    assert str(missed.value).endswith("(2 shapes were tried)"), "and the one nearest to the target is named"
    assert list(index.glob("versions/*/shard-*.json")), "it was built"
    assert (finished(index), current(index)) == (set(), None)

    manifest, changed = ask_for(target_recall=0.9)
    assert changed
    assert manifest.measured["recall_at_10"] >= 0.9
    assert manifest.parameters["target_recall"] == 0.9
    assert finished(index) == {manifest.version}
    before = current(index)
    with pytest.raises(TargetMissed, match="cannot be met"):
        ask_for(**out_of_reach)
    assert (finished(index), current(index)) == ({manifest.version}, before)
    assert Index.open(str(index)).info == manifest


def test_bytes_that_suffice_publish_the_richest_shape_that_fits(ask_for):
    manifest, _ = ask_for(max_bytes_per_vector=48)
    assert (manifest.reduced_dim, manifest.parameters["refine_bytes"]) == (32, 32)
    assert manifest.measured["bytes_per_vector"] == 8 + 8 + 32
    smaller, _ = ask_for(max_bytes_per_vector=47)
    assert (smaller.reduced_dim, smaller.parameters["refine_bytes"]) == (16, 16)
    assert smaller.measured["bytes_per_vector"] == 8 + 4 + 16


def test_fewer_dimensions_are_tried_where_more_miss_the_target(ask_for, monkeypatch):
    """Sixty-four dimensions are told to be slow."""
    measure = index.measure

    def measured(opened, shape, *rest):
        return measure(opened, shape, *rest) | {"p50_us": 10.0 if shape.dim < 64 else 90.0}

    monkeypatch.setattr(index, "measure", measured)
    manifest, _ = ask_for(max_latency_us=50)
    assert manifest.reduced_dim == 32
    assert manifest.measured["p50_us"] == 10


def test_a_latency_that_cannot_be_met_publishes_nothing(ask_for, tmp_path):
    with pytest.raises(TargetMissed) as missed:
        ask_for(max_latency_us=0.001, dim=16)
    assert re.fullmatch(
        r"--max-latency-us 0\.001 cannot be met; the best that can is recall@10 0\.\d+ against the reduced vectors, 28 "
        r"bytes a vector, \d+ µs a lookup, at 16 dimensions\. Nothing was published; .*",
        str(missed.value),
    )
    assert (finished(tmp_path / "index"), current(tmp_path / "index")) == (set(), None)


def test_an_exact_index_keeps_every_promise_but_bytes(tmp_path):
    stores.write_store(tmp_path / "store", stores.clustered(50))
    where = str(tmp_path / "store"), str(tmp_path / "index")
    manifest, _ = run(IndexRequest(*where, target_recall=1.0, max_bytes_per_vector=264), Runner())
    assert (manifest.kind, manifest.measured["recall_at_10"], manifest.measured["recall_at_10_raw"]) == ("exact", 1, 1)
    with pytest.raises(UsageError, match="whole vectors take 264"):
        run(IndexRequest(*where, max_bytes_per_vector=263), Runner())


def test_equal_wishes_build_nothing_and_others_a_version(ask_for, tmp_path):
    first, _ = ask_for(dim=16, target_recall=0.8)
    assert ask_for(dim=16, target_recall=0.8) == (first, False)
    higher, changed = ask_for(dim=16, target_recall=0.9)
    assert changed
    assert higher.version != first.version
    assert higher.quantizer == first.quantizer, "nothing is trained anew"
    assert checksums(higher) == checksums(first)
    assert (higher.search.nprobe, higher.search.rerank) > (first.search.nprobe, first.search.rerank)
    assert ask_for(dim=16, target_recall=0.9) == (higher, False)
    assert finished(tmp_path / "index") == {first.version, higher.version}


def exact_neighbours(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    whole = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.argsort(-(queries @ whole.T), axis=1)[:, :k]


def test_recall_against_raw_vectors_is_brute_force_on_them(ask_for, tmp_path):
    """Of new queries, with two standard errors of 300 queries' mean to spare."""
    manifest, _ = ask_for(dim=16, recall_against="raw", target_recall=0.95)
    plain, _ = ask_for(dim=16, target_recall=0.95)
    assert (manifest.parameters["raw_bytes"], plain.parameters["raw_bytes"]) == (64, 0)
    assert manifest.search.rerank_raw >= 20
    assert manifest.measured["recall_at_10_raw"] >= 0.95
    queries = stores.clustered(1500)[1200:]
    exact = exact_neighbours(stores.clustered(1200), queries, 10)
    recalls = []
    for version in (manifest.version, plain.version):
        opened = Index.open(str(tmp_path / "index"), version=version)
        answers = opened.search(queries, 10)
        found = [
            len({int(hit.uri[6:-4]) for hit in hits} & set(near.tolist())) / 10
            for hits, near in zip(answers, exact, strict=True)
        ]
        recalls.append((np.mean(found), np.std(found) / 300**0.5))
    (faithful, error), (reduced, _) = recalls
    assert faithful > 0.95 - 2 * error
    assert reduced < 0.8, "sixteen dimensions alone do not know the raw order"


@pytest.mark.parametrize(
    ("key", "against", "expected"),
    [
        ("IVF8,PQ16x4fs,RFlat", "reduced", {"nlist": 8, "code_bytes": 8, "refine_bytes": 256, "raw_bytes": 0}),
        ("PCA32,IVF8,SQ8", "reduced", {"nlist": 8, "code_bytes": 32, "refine_bytes": 0, "raw_bytes": 0}),
        ("PCA16,IVF8,PQ8x4,Refine(SQ8)", "raw", {"nlist": 8, "code_bytes": 4, "refine_bytes": 0, "raw_bytes": 64}),
    ],
)
def test_a_key_of_faiss_builds_what_it_says_and_is_searched(ask_for, tmp_path, key, against, expected):
    manifest, _ = ask_for(index_factory=key, recall_against=against, target_recall=0.9, shards=2)
    assert manifest.kind == "custom"
    assert manifest.parameters["factory"] == key
    assert {name: manifest.parameters[name] for name in expected} == expected
    assert manifest.measured["bytes_per_vector"] == 8 + expected["code_bytes"] + expected["refine_bytes"]
    assert list(check_version(str(tmp_path / "index"), manifest)) == []
    vectors = stores.clustered(1200)
    answers = Index.open(str(tmp_path / "index")).search(vectors, 1)
    assert np.mean([int(hits[0].uri[6:-4]) == number for number, hits in enumerate(answers)]) > 0.97
    assert ask_for(index_factory=key, recall_against=against, target_recall=0.9, shards=2) == (manifest, False)


def test_a_key_that_cannot_be_built_leaves_no_index(ask_for, tmp_path):
    for key in ("HNSW32", "nonsense"):
        with pytest.raises(UsageError, match=f"--index-factory {key}: "):
            ask_for(index_factory=key)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    "wishes", [{"recall_against": "raw"}, {"max_bytes_per_vector": 30.0}, {"index_factory": "PCA16,IVF8,PQ8x4"}]
)
def test_merging_alone_goes_by_what_the_quantizer_was_trained_for(twelve_hundred, tmp_path, wishes):
    plain = IndexRequest(twelve_hundred, str(tmp_path / "index"))
    wanted = dataclasses.replace(plain, **wishes)
    source = load_run_manifest(twelve_hundred)
    trained = load_trained(plain.index, train_quantizer(wanted, source).quantizer)
    merged = build_version(plain, source, trained, Runner())
    assert merged.parameters["recall_against"] == wanted.recall_against
    publish(plain.index, merged.version, None)
    assert run(wanted, Runner()) == (merged, False)
    other, changed = run(plain, Runner())
    assert changed
    assert (other.quantizer, other.kind) != (merged.quantizer, merged.kind)


@pytest.mark.parametrize("wishes", [{}, {"recall_against": "raw"}])
def test_the_number_of_shards_changes_nothing_in_what_is_found(ask_for, tmp_path, wishes):
    queries = stores.clustered(1400)[1150:]
    answers = []
    for shards in (1, 2, 7):
        manifest, changed = ask_for(dim=16, shards=shards, **wishes)
        assert changed
        assert len(manifest.shards) == shards
        opened = Index.open(str(tmp_path / "index"))
        answers.append([opened.search(queries, 10), opened.search(queries, 100), opened.info.search])
    assert answers[0] == answers[1] == answers[2]
    assert len({hit.row for hits in answers[0][0] for hit in hits}) > 500


def test_a_graph_of_centroids_is_searched_as_wide_as_was_measured(ask_for, tmp_path, monkeypatch):
    monkeypatch.setattr("transforms.designing.GRAPH_FROM", 16)
    manifest, _ = ask_for(dim=16, target_recall=0.9)
    assert manifest.search.ef_search >= manifest.search.nprobe
    trained = load_trained(str(tmp_path / "index"), manifest.quantizer)
    quantizer = index.load_quantizer(str(tmp_path / "index"), trained.quantizer)
    assert isinstance(faiss.downcast_index(quantizer.ivf.quantizer), faiss.IndexHNSWFlat)
    assert manifest.measured["recall_at_10"] >= 0.9
    assert list(check_version(str(tmp_path / "index"), manifest)) == []
