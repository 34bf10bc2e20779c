"""Opening shards: into memory with every byte checked, mapped without reading them, from disk and from stores."""

import dataclasses
import gc
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest
import signed
from indexes import Built, assert_best, assert_same, queries_for, recall, uris_of

from serving import Index, storage
from serving.errors import ChecksumMismatch, FormatError, LookalikeError, NotFound, UsageError
from serving.manifest import move_current

MODES = ("memory", "mmap")
MAPS = Path("/proc/self/maps")


@pytest.fixture(params=["pq", "exact", "plain", "faithful"])
def built(request: pytest.FixtureRequest) -> Built:
    found: Built = request.getfixturevalue(request.param)
    return found


# --- Mapped ---------------------------------------------------------------------------------------------------------


def test_mapped_answers_are_those_of_memory(built):
    """To the tuned settings; where there are no re-rank codes, FastScan's rounding leaves rows in another order."""
    queries = queries_for(built, 200)
    found, expected = built.mapped.search(queries, 10), built.whole.search(queries, 10)
    reranked = built.manifest.parameters["refine_bytes"] or built.manifest.kind == "exact"
    assert recall(uris_of(found), uris_of(expected)) >= (0.999 if reranked else 0.95)
    assert_same([built.mapped.search(query, 10)[0] for query in queries], found)


def test_visiting_all_lists_mapped_answers_are_those_of_memory(built):
    queries = queries_for(built, 100)
    found, expected = (index.search(queries, 10, settings=built.exhaustive) for index in (built.mapped, built.whole))
    if built.manifest.parameters["refine_bytes"] or built.manifest.kind == "exact":
        assert_same(found, expected)
    else:
        for hits, others in zip(found, expected, strict=True):
            np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in others], atol=0.02)


def test_one_mapped_shard_is_left_as_it_is(plain):
    """FAISS would repack it, which maps do not bear."""
    assert len(plain.manifest.shards) == 1
    before = {path: path.read_bytes() for path in plain.folder.iterdir()}
    index = Index.open(plain.index, mode="mmap")
    [hits] = index.search(plain.vectors[0], len(plain.vectors))
    assert sorted(hit.uri for hit in hits) == plain.uris
    del index
    gc.collect()
    assert {path: path.read_bytes() for path in plain.folder.iterdir()} == before


def test_opening_mapped_reads_no_list(built, monkeypatch):
    read: list[str] = []
    whole = storage.read

    def seen(uri: str, etag: str | None = None) -> bytes:
        read.append(storage.name_of(uri))
        return whole(uri, etag)

    monkeypatch.setattr(storage, "read", seen)
    monkeypatch.setattr(storage, "open_binary", lambda uri: pytest.fail(f"{uri} is read to be checked"))
    Index.open(built.index, mode="mmap").search(built.vectors[:2])
    assert sorted(read) == ["manifest.json", "trained.faiss"]


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not tell what is mapped")
def test_files_are_mapped_while_the_index_lives(copied_faithful):
    built = copied_faithful

    def mapped() -> set[str]:
        maps = MAPS.read_text()
        return {path.name for path in built.folder.iterdir() if str(path) in maps}

    assert mapped() == set()
    index = Index.open(built.index, mode="mmap")
    assert mapped() == {entry.name for shard in built.manifest.shards for entry in shard.files}
    index = Index.open(built.index)
    gc.collect()
    assert mapped() == {entry.name for shard in built.manifest.shards for entry in (shard.raw, shard.records)}
    del index
    gc.collect()
    assert mapped() == set()


def test_processes_and_threads_may_map_the_same_files(faithful):
    queries = queries_for(faithful, 20)
    expected = faithful.mapped.search(queries)

    def open_and_search(_: int) -> bool:
        return Index.open(faithful.index, mode="mmap").search(queries) == expected

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(open_and_search, range(12)))


@pytest.mark.parametrize("mode", ["mapped", "", "MMAP", None])
def test_another_mode_is_refused(pq, mode):
    with pytest.raises(UsageError, match=f"mode is {mode!r}; take one of memory, mmap"):
        Index.open(pq.index, mode=mode)


# --- Damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


STORES = ("lists", "refine", "raw", "records")


def file_of(built: Built, store: str) -> Path:
    return built.folder / getattr(built.manifest.shards[1], store).name


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (flip, ChecksumMismatch, "is damaged: its checksum is not the manifest's; restore it"),
        (cut, ChecksumMismatch, "bytes, its manifest names .*; restore it"),
        (empty, ChecksumMismatch, "has 0 bytes, its manifest names .*; restore it"),
        (Path.unlink, NotFound, "does not exist"),
    ],
    ids=["flipped", "cut", "emptied", "missing"],
)
def test_every_byte_is_checked_in_memory(copied_faithful, store, damage, error, sentence):
    path = file_of(copied_faithful, store)
    damage(path)
    with pytest.raises(error, match=f"{path}.*{sentence}"):
        Index.open(copied_faithful.index)
    assert len(Index.open(copied_faithful.index, shards=[0, 2])) > 0


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [(cut, FormatError, ""), (empty, FormatError, ""), (Path.unlink, NotFound, "does not exist")],
    ids=["cut", "emptied", "missing"],
)
def test_a_cut_file_is_not_mapped(copied_faithful, store, damage, error, sentence):
    path = file_of(copied_faithful, store)
    damage(path)
    with pytest.raises(error, match=f"{path}.*{sentence}"):
        Index.open(copied_faithful.index, mode="mmap")
    assert len(Index.open(copied_faithful.index, shards=[0, 2], mode="mmap")) > 0


@pytest.mark.parametrize("store", STORES[:3])
def test_a_map_of_another_size_is_named(copied_faithful, store):
    path = file_of(copied_faithful, store)
    size = path.stat().st_size
    cut(path)
    with pytest.raises(ChecksumMismatch, match=f"{path} has {size - 1:,} bytes, its manifest names {size:,}; restore"):
        Index.open(copied_faithful.index, mode="mmap")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("store", STORES)
def test_files_of_other_rows_are_refused(faithful, store, mode):
    first, second, third = faithful.manifest.shards
    assert first.rows != second.rows
    wrong = dataclasses.replace(first, **{store: getattr(second, store)})
    with pytest.raises(FormatError, match=f"{getattr(second, store).name} (does not hold the|has) .*rows"):
        Index(faithful.index, dataclasses.replace(faithful.manifest, shards=(wrong, second, third)), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("store", "what"), [("refine", "re-rank codes"), ("raw", "codes of whole vectors")])
def test_codes_cannot_be_left_out(faithful, store, what, mode):
    first, *others = faithful.manifest.shards
    wrong = (dataclasses.replace(first, **{store: None}), *others)
    with pytest.raises(FormatError, match=f"the manifest names no {what} for shard 0"):
        Index(faithful.index, dataclasses.replace(faithful.manifest, shards=wrong), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("store", "source"), [*itertools.permutations(STORES, 2)])
def test_files_of_another_kind_are_refused(faithful, store, source, mode):
    first, *others = faithful.manifest.shards
    wrong = (dataclasses.replace(first, **{store: getattr(first, source)}), *others)
    with pytest.raises(FormatError):
        Index(faithful.index, dataclasses.replace(faithful.manifest, shards=wrong), mode=mode)


# --- Faithful to the raw vectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_scores_are_cosines_with_raw_vectors(faithful, mode):
    """But for the few rows left out of training that reach beyond what 8-bit codes stand for."""
    queries = queries_for(faithful, 200)
    truth = faithful.raw_cosines(queries)
    place_of = {uri: place for place, uri in enumerate(faithful.uris)}
    for answers in (
        faithful.opened(mode).search(queries, 10),
        [faithful.opened(mode).search(query, 10)[0] for query in queries],
    ):
        errors = []
        for hits, cosines in zip(answers, truth, strict=True):
            expected = cosines[[place_of[hit.uri] for hit in hits]]
            errors.append(np.abs([hit.score for hit in hits] - expected))
        assert np.mean(np.array(errors) <= 2e-2) >= 0.98
        assert np.median(errors) <= 2e-3


@pytest.mark.parametrize("mode", MODES)
def test_the_raw_neighbours_are_found(faithful, mode):
    queries = queries_for(faithful, 300)
    uris = np.array(faithful.uris)
    truth = [[*uris[places]] for places in np.argsort(-faithful.raw_cosines(queries), axis=1)[:, :10]]
    index = faithful.opened(mode)
    target = faithful.manifest.parameters["target_recall"]
    assert faithful.manifest.measured["recall_at_10_raw"] >= target
    assert recall(uris_of(index.search(queries, 10)), truth) >= target
    assert recall(uris_of(index.search(queries, 10, settings=faithful.exhaustive)), truth) >= 0.97
    reduced = recall(faithful.nearest(queries, 10), truth)
    assert reduced < 0.9, "the reduced space alone would not do"


def test_ranking_by_raw_codes_is_brute_force_over_them(faithful):
    queries = queries_for(faithful, 50)
    for index in (faithful.whole, faithful.mapped):
        answers = index.search(queries, 10, settings=faithful.exhaustive)
        assert_best(faithful, answers, faithful.code_scores(queries), 10)


# --- Stores ---------------------------------------------------------------------------------------------------------


def upload(built: Built, bucket: str) -> str:
    root = f"{bucket}/an index"
    for path in sorted((built.root / "index").rglob("*")):
        name = path.relative_to(built.root / "index").as_posix()
        if path.is_file() and name != "CURRENT" and not name.startswith("encoded/"):
            assert storage.create(f"{root}/{name}", path.read_bytes())
    move_current(root, "version", built.manifest.version, None)
    return root


@pytest.mark.parametrize("server", ["gcs_server", "s3_server"])
@pytest.mark.parametrize("kind", ["faithful", "exact"])
def test_an_index_is_read_from_a_store(request, kind, server):
    built: Built = request.getfixturevalue(kind)
    root = upload(built, request.getfixturevalue(server))
    queries = queries_for(built, 50)
    remote = Index.open(root)
    assert remote.search(queries) == built.whole.search(queries)
    assert remote.search(queries[0]) == built.whole.search(queries[0])
    assert remote.record(17) == built.whole.record(17)
    some = Index.open(root, shards=[1])
    assert some.search(queries) == Index.open(built.index, shards=[1]).search(queries)


def test_what_is_not_on_this_disk_is_not_mapped(exact, gcs_server):
    root = upload(exact, gcs_server)
    with pytest.raises(UsageError, match=f"{root}.* is not on a local disk, so it cannot be mapped; copy it here, or"):
        Index.open(root, mode="mmap")


@pytest.mark.parametrize("store", STORES)
def test_a_damaged_object_is_refused(copied_faithful, gcs_server, store):
    flip(file_of(copied_faithful, store))
    root = upload(copied_faithful, gcs_server)
    name = file_of(copied_faithful, store).name
    with pytest.raises(ChecksumMismatch, match=f"{root}.*{name} is damaged"):
        Index.open(root)


# --- Manifests of before --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_manifests_that_know_nothing_of_raw_codes_are_read(copied, mode):
    def without(document: dict[str, object], *names: str) -> dict[str, object]:
        return {name: value for name, value in document.items() if name not in names}

    manifest = copied.manifest
    shards = [without(dataclasses.asdict(shard), "raw") for shard in manifest.shards]
    search = without(dataclasses.asdict(manifest.search), "ef_search", "rerank_raw")
    signed.edit(copied.folder / "manifest.json", shards=shards, search=search)
    queries = queries_for(copied, 20)
    index = Index.open(copied.index, mode=mode)
    assert index.info == manifest
    assert index.search(queries) == copied.opened(mode).search(queries)


def test_garbage_is_not_mapped(copied_faithful):
    """FAISS's own complaint is passed on as a sentence, whatever the bytes."""
    rng = np.random.default_rng(0)
    for store in STORES:
        path = file_of(copied_faithful, store)
        whole = path.read_bytes()
        garbage: list[Callable[[], bytes]] = [lambda: rng.bytes(len(whole)), lambda: b"\0" * len(whole)]  # noqa: B023
        for make in garbage:
            path.write_bytes(make())
            with pytest.raises(LookalikeError, match=str(path)):
                Index.open(copied_faithful.index, mode="mmap")
        path.write_bytes(whole)
    assert faiss.omp_get_max_threads() > 0
    assert len(Index.open(copied_faithful.index, mode="mmap")) == copied_faithful.manifest.rows
