import dataclasses
import json
from pathlib import Path

import pytest
import stores
from real import embed_folder

from pipelines import index
from pipelines.index import IndexRequest, build_version, load_trained, publish, run, train_quantizer
from pipelines.runner import Runner
from serving import Index
from serving.errors import ChecksumMismatch, Conflict, EmbedderMismatch, NotFound, UsageError
from serving.manifest import IndexManifest, load_run_manifest
from transforms.verifying import check_version


def checksums(manifest: IndexManifest) -> list[str]:
    entries = [entry for shard in manifest.shards for entry in (shard.lists, shard.refine, shard.records)]
    return [manifest.trained.sha256, *(entry.sha256 for entry in entries if entry)]


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


@pytest.mark.parametrize("wrong", [{"shards": -1}, {"shards": 1025}])
def test_wrong_shards_are_refused(wrong):
    with pytest.raises(UsageError, match="--shards is"):
        IndexRequest("store", "index", **wrong)
