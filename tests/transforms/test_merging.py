import faiss
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import stores

from serving import records, storage
from serving.errors import FormatError, NotFound
from serving.manifest import FileEntry
from transforms import catalog, encoding
from transforms.catalog import catalog_files
from transforms.encoding import encode_part, partial_bytes, partial_uri, quantizer_folder
from transforms.merging import (
    MergeSettings,
    MergeShard,
    ShardDocument,
    build_lists,
    build_store,
    live_in,
    merge_shard,
    shard_document,
    shard_name,
)
from transforms.progress import tally
from transforms.schema import hash_range, shard_buckets, to_parquet, uri_hash


def encode_all(store, run, index, quantizer):
    for part in run.parts:
        table = encode_part(f"{store}/{part.name}", quantizer)
        target = partial_uri(str(index), quantizer.id, part.name)
        storage.create(target, partial_bytes(table, quantizer.id))


def merge_all(store, run, index, quantizer, shards, version="v"):
    """Merge every shard; return the settings and the shards."""
    settings = MergeSettings(str(index), version, quantizer.id, shards, tuple(catalog_files(str(store), run)))
    return settings, [merge_shard(number, settings, quantizer) for number in range(shards)]


def build(store, run, index, quantizer, shards, version="v"):
    encode_all(store, run, index, quantizer)
    return merge_all(store, run, index, quantizer, shards, version)


def read_records(folder, shard):
    return records.from_buffer(shard.records.read(folder), shard.records.name).to_pylist()


def read_faiss(folder, entry):
    return faiss.deserialize_index(np.frombuffer(entry.read(folder), np.uint8))


def codes_by_row(lists):
    """Return row → (list number, code) of inverted lists."""
    found = {}
    for number in range(lists.nlist):
        size = lists.invlists.list_size(number)
        ids = faiss.rev_swig_ptr(lists.invlists.get_ids(number), size)
        codes = faiss.rev_swig_ptr(lists.invlists.get_codes(number), size * lists.code_size)
        assert sorted(ids) == list(ids), "row after row"
        for row, code in zip(ids.tolist(), codes.reshape(size, lists.code_size), strict=True):
            assert row not in found
            found[row] = (number, code.tobytes())
    return found


def append(lists, more):
    """Put the lists of a shard, which has no centroids of its own, behind others."""
    lists.invlists.merge_from(more.invlists, lists.ntotal)
    lists.ntotal += more.ntotal


def random_store(path, seed, count=400):
    """Vectors under random uris; return uri → vector, uri → label and the run."""
    rng = np.random.default_rng(seed)
    uris = sorted({f"gs://b/{'aé~'[number % 3]}/{rng.integers(10**6)}.jpg" for number in range(count)})
    vectors = stores.clustered(len(uris), 32, seed=seed)
    labels = [[None, "cat", "dog", "naïve"][rng.integers(4)] for _ in uris]
    rejected = [f"{uri}x" for uri in uris[::9]]
    run = stores.write_store(path, vectors, uris, labels, rejected=rejected, unit_size=int(rng.integers(50, 90)))
    return dict(zip(uris, vectors, strict=True)), dict(zip(uris, labels, strict=True)), run


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize("seed", [1, 2])
def test_shards_hold_the_live_rows_each_once_and_in_its_place(tmp_path, quantizer, seed, shards):
    vectors, labels, run = random_store(tmp_path / "store", seed)
    settings, made = build(tmp_path / "store", run, tmp_path / "index", quantizer, shards)
    merged = []
    for number, shard in enumerate(made):
        rows = read_records(settings.folder, shard)
        uris = [row["uri"] for row in rows]
        low, high = hash_range(shard_buckets(number, shards))
        assert (shard.number, shard.rows, shard.buckets) == (number, len(rows), shard_buckets(number, shards))
        assert all(low <= uri_hash(uri) <= high for uri in uris)
        assert uris == sorted(uris, key=uri_hash)
        merged += rows
        expected = quantizer.encode(np.array([vectors[uri] for uri in uris]).reshape(-1, 32))
        lists = read_faiss(settings.folder, shard.lists)
        assert lists.ntotal == len(rows)
        assert codes_by_row(lists) == {row: (code[0], code[1:].tobytes()) for row, code in enumerate(expected.codes)}
        kept = read_faiss(settings.folder, shard.refine)
        codes = faiss.vector_to_array(kept.codes).reshape(-1, quantizer.refine_size)
        np.testing.assert_array_equal(codes, expected.refine)
    assert sorted(row["uri"] for row in merged) == sorted(vectors)
    assert {row["uri"]: row["label"] for row in merged} == labels
    assert {row["etag"] for row in merged} == {"etag"}


def final_state(path, history, vectors, uris, labels):
    """Write the same last state of a collection along one of several histories."""
    rejected = [uris[0] + "x"]
    if history == "one unit":
        return stores.write_store(path, vectors, uris, labels, unit_size=5000, rejected=rejected)
    if history == "small units":
        return stores.write_store(path, vectors, uris, labels, unit_size=11, rejected=rejected)
    if history == "more rejects":
        bad = [f"{uri}x" for uri in uris[::3]]
        return stores.write_store(path, vectors, uris, labels, unit_size=64, rejected=bad)
    extra = [f"{uri}+" for uri in uris[:50]]
    stores.write_store(path, vectors[::2], uris[::2], unit_size=32)  # half, without labels
    stores.write_store(path, np.concatenate([vectors, vectors[:50]]), [*uris, *extra], unit_size=64, run_id="run-2")
    stores.write_store(path, vectors[100:], uris[100:], labels[100:], unit_size=8, run_id="run-3")
    return stores.write_store(path, vectors, uris, labels, unit_size=64, rejected=rejected, run_id="run-4")


@pytest.fixture(scope="module")
def collection():
    rng = np.random.default_rng(4)
    uris = sorted(f"/x/{number:04}.jpg" for number in range(400))
    labels = [[None, "b", "a"][rng.integers(3)] for _ in uris]
    labels[:120] = [None] * 120  # whole row groups without a label
    return stores.clustered(400, 32, seed=5), uris, labels


@pytest.fixture(scope="module")
def reference(collection, quantizer, tmp_path_factory):
    """The shards of the collection written in one go, in three and in one."""
    path = tmp_path_factory.mktemp("reference")
    run = final_state(path / "store", "one unit", *collection)
    encode_all(path / "store", run, path / "index", quantizer)
    return {
        shards: merge_all(path / "store", run, path / "index", quantizer, shards, f"v{shards}") for shards in (1, 3)
    }


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("history", ["small units", "more rejects", "four runs"])
def test_files_are_the_same_bytes_whatever_the_history(tmp_path, collection, reference, quantizer, history, shards):
    run = final_state(tmp_path / "store", history, *collection)
    settings, made = build(tmp_path / "store", run, tmp_path / "index", quantizer, shards)
    assert made == reference[shards][1]
    for shard in made:
        for entry in (shard.lists, shard.refine, shard.records):
            assert entry.read(settings.folder) == entry.read(reference[shards][0].folder)


@pytest.mark.parametrize(("row_group", "file_rows"), [(16, 10**6), (64, 100), (10**6, 7)])
def test_files_are_the_same_bytes_however_the_catalog_was_laid_out(
    tmp_path, collection, reference, quantizer, monkeypatch, row_group, file_rows
):
    monkeypatch.setattr(catalog, "_ROW_GROUP", row_group)
    monkeypatch.setattr(catalog, "_FILE_ROWS", file_rows)
    run = final_state(tmp_path / "store", "small units", *collection)
    assert len(run.catalog) == -(-401 // file_rows)
    assert build(tmp_path / "store", run, tmp_path / "index", quantizer, 3)[1] == reference[3][1]


def test_files_are_the_same_bytes_however_partials_were_laid_out(
    tmp_path, collection, reference, quantizer, monkeypatch
):
    """Small row groups: a shard reads some of them, told by their lowest and highest hash."""
    monkeypatch.setattr(encoding, "_ROW_GROUP", 5)
    run = final_state(tmp_path / "store", "one unit", *collection)
    encode_all(tmp_path / "store", run, tmp_path / "index", quantizer)
    for shards in (1, 3):
        _, made = merge_all(tmp_path / "store", run, tmp_path / "index", quantizer, shards, f"v{shards}")
        assert made == reference[shards][1]


def test_merging_gives_the_index_that_adding_gives(collection, reference, quantizer):
    vectors, uris, _ = collection
    settings, (shard,) = reference[1]
    order = sorted(range(len(uris)), key=lambda number: uri_hash(uris[number]))
    assert [row["uri"] for row in read_records(settings.folder, shard)] == [uris[number] for number in order]
    merged, added = quantizer.empty_lists(), quantizer.empty_lists()
    append(merged, read_faiss(settings.folder, shard.lists))
    added.add(quantizer.reduce(vectors[order]))
    assert codes_by_row(merged) == codes_by_row(added)
    refine = quantizer.empty_refine()
    refine.add(quantizer.reduce(vectors[order]))
    kept = read_faiss(settings.folder, shard.refine)
    queries = quantizer.reduce(stores.clustered(50, 32, seed=6))
    for one, other in ((merged, added), (kept, refine)):
        scores, found = one.search(queries, 10)
        other_scores, other_found = other.search(queries, 10)
        np.testing.assert_array_equal(found, other_found)
        np.testing.assert_array_equal(scores, other_scores)


def test_shards_put_together_are_the_one_shard(collection, reference, quantizer):
    """Rows count from one shard to the next: the same row is the same image, at the same place of the same list."""
    queries = quantizer.reduce(stores.clustered(50, 32, seed=7))
    together = []
    for settings, shards in (reference[1], reference[3]):
        lists, names = quantizer.empty_lists(), []
        for shard in shards:
            append(lists, read_faiss(settings.folder, shard.lists))
            names += [row["uri"] for row in read_records(settings.folder, shard)]
        together.append((names, codes_by_row(lists), *(answer.tolist() for answer in lists.search(queries, 10))))
    assert together[0] == together[1]
    assert sorted(together[0][0]) == collection[1]


@pytest.mark.parametrize("shards", [1, 8, 100])
def test_empty_shards_are_files_like_any(tmp_path, quantizer, shards):
    vectors = stores.clustered(3, 32)
    run = stores.write_store(tmp_path / "store", vectors)
    settings, made = build(tmp_path / "store", run, tmp_path / "index", quantizer, shards)
    assert sum(shard.rows for shard in made) == 3
    for shard in made[:8]:
        assert len(read_records(settings.folder, shard)) == shard.rows
        assert read_faiss(settings.folder, shard.lists).ntotal == shard.rows
        assert read_faiss(settings.folder, shard.refine).ntotal == shard.rows


def test_codes_of_whole_vectors_are_a_file_of_their_own(tmp_path, made, quantizer_faithful):
    settings, shards = build(made.root, made.run, tmp_path, quantizer_faithful, 3)
    vector_of = dict(zip(made.uris, made.vectors, strict=True))
    for number, shard in enumerate(shards):
        assert shard.raw.name == f"raw-{number:05}-of-00003.faiss"
        assert [entry.name.split("-")[0] for entry in shard.files] == ["shard", "refine", "raw", "records"]
        kept = read_faiss(settings.folder, shard.raw)
        uris = [row["uri"] for row in read_records(settings.folder, shard)]
        assert kept.ntotal == shard.rows == len(uris)
        vectors = np.array([vector_of[uri] for uri in uris])
        codes = faiss.vector_to_array(kept.codes).reshape(-1, 32)
        np.testing.assert_array_equal(codes, quantizer_faithful.encode(vectors).raw)
        whole = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        # Rows that training did not see may lie a little outside what codes span.
        off = np.abs(kept.reconstruct_n(0, shard.rows) - whole) > 0.01
        assert off.mean() < 0.001
    assert sum(shard.rows for shard in shards) == len(made.vectors)


def test_exact_shards_keep_whole_vectors(tmp_path, made_small, quantizer_small):
    settings, (shard,) = build(made_small.root, made_small.run, tmp_path, quantizer_small, 1)
    assert shard.refine is None
    order = sorted(range(len(made_small.uris)), key=lambda number: uri_hash(made_small.uris[number]))
    reduced = quantizer_small.reduce(made_small.vectors[order])
    kept = {
        row: np.frombuffer(code, np.float32)
        for row, (_, code) in codes_by_row(read_faiss(settings.folder, shard.lists)).items()
    }
    np.testing.assert_array_equal([kept[row] for row in range(len(reduced))], reduced)


def test_shard_files_leave_the_centroids_to_the_quantizer(reference, quantizer):
    settings, (shard,) = reference[1]
    assert read_faiss(settings.folder, shard.lists).quantizer.ntotal == 0
    assert quantizer.ivf.quantizer.ntotal == quantizer.ivf.nlist, "the trained one is left as it was"


def test_building_leaves_the_trained_quantizer_empty(quantizer):
    codes = quantizer.encode(stores.clustered(20, 32))

    def files():
        return build_lists(quantizer, codes.codes), build_store(quantizer.empty_refine(), codes.refine)

    assert files() == files()
    assert (quantizer.ivf.ntotal, quantizer.refine.ntotal) == (0, 0)


# Faults


def rewrite(path, change):
    table = pq.read_table(path)
    path.write_bytes(to_parquet(change(table), row_group=50))


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.slice(1),
        lambda table: table.slice(0, len(table) - 1),
        lambda table: table.slice(0, 0),
        lambda table: table.filter(pc.not_equal(table["row"], table["row"][len(table) // 2])),
        lambda table: table.set_column(1, table.schema.field(1), pc.add(table["row"], 1).cast("int32")),
    ],
    ids=["first", "last", "all", "middle", "other rows"],
)
def test_a_partial_that_lacks_rows_is_refused_by_name(tmp_path, made, quantizer, change):
    encode_all(made.root, made.run, tmp_path, quantizer)
    path = sorted((tmp_path / "encoded" / quantizer.id).iterdir())[1]
    rewrite(path, change)
    with pytest.raises(FormatError, match=f"{path.name} lacks rows that the catalog names; delete it and build again"):
        merge_all(made.root, made.run, tmp_path, quantizer, 2)


def test_a_partial_of_another_quantizer_is_refused_by_name(tmp_path, made, quantizer):
    other = "0123456789abcdef"
    encode_all(made.root, made.run, tmp_path, quantizer)
    path = sorted((tmp_path / "encoded" / quantizer.id).iterdir())[1]
    path.write_bytes(partial_bytes(pq.read_table(path).replace_schema_metadata(None), other))
    with pytest.raises(FormatError, match=f"{path.name} holds codes of the quantizer {other}, not {quantizer.id}"):
        merge_all(made.root, made.run, tmp_path, quantizer, 2)


def test_a_partial_that_does_not_tell_its_quantizer_is_taken_for_an_early_one(tmp_path, made, quantizer):
    encode_all(made.root, made.run, tmp_path, quantizer)
    for path in (tmp_path / "encoded" / quantizer.id).iterdir():
        rewrite(path, lambda table: table.replace_schema_metadata(None))
    _, (shard,) = merge_all(made.root, made.run, tmp_path, quantizer, 1)
    assert shard.rows == len(made.vectors)


def test_a_missing_partial_is_named(tmp_path, made, quantizer):
    encode_all(made.root, made.run, tmp_path, quantizer)
    path = sorted((tmp_path / "encoded" / quantizer.id).iterdir())[0]
    path.unlink()
    with pytest.raises(NotFound, match=path.name):
        merge_all(made.root, made.run, tmp_path, quantizer, 1)


@pytest.mark.parametrize(
    "kind", ["shard-00000-of-00001.faiss", "refine-00000-of-00001.faiss", "records-00000-of-00001.arrow"]
)
def test_a_file_that_an_attempt_cut_short_left_is_described_as_it_is(tmp_path, made, quantizer, kind):
    """Another release may write the same content as other bytes; the manifest must name those that are there."""
    encode_all(made.root, made.run, tmp_path, quantizer)
    (tmp_path / "versions" / "v").mkdir(parents=True)
    (tmp_path / "versions" / "v" / kind).write_bytes(b"left by an earlier attempt")
    settings, (shard,) = merge_all(made.root, made.run, tmp_path, quantizer, 1)
    entries = {entry.name: entry for entry in (shard.lists, shard.refine, shard.records)}
    assert entries[kind] == FileEntry.of(kind, b"left by an earlier attempt")
    assert all(entry.read(settings.folder) for entry in entries.values())


# Live rows, names and work


def test_rows_of_equal_hash_are_sorted_by_uri(tmp_path, monkeypatch):
    """Sixty-four bits may collide; the order of rows must not depend on the catalog's files then."""
    monkeypatch.setattr(catalog, "uri_hash", lambda uri: int(uri[-6:-4]) // 20)
    monkeypatch.setattr(catalog, "_FILE_ROWS", 7)
    run = stores.write_store(tmp_path, stores.clustered(40, 8), unit_size=16)
    files = tuple(catalog_files(str(tmp_path), run))
    found = live_in(files[::-1], 0, 1)["uri"].to_pylist()
    assert len(files) > 2
    assert found == sorted(found)
    assert len(found) == 40


def test_live_rows_of_a_range_of_hashes(made):
    files = tuple(catalog_files(made.root, made.run))
    for low, high in [(0, 2**64 - 1), (2**62, 2**63), (2**63, 2**64 - 1), (5, 4)]:
        expected = sorted((uri for uri in made.uris if low <= uri_hash(uri) <= high), key=uri_hash)
        assert live_in(files, low, high)["uri"].to_pylist() == expected


def test_names_of_shards():
    assert shard_name("refine", 7, 1024, "faiss") == "refine-00007-of-01024.faiss"
    assert shard_document("gs://b/v", 0, 8) == "gs://b/v/shard-00000-of-00008.json"


def test_a_worker_builds_what_does_not_say_it_is_finished(tmp_path, made, built, quantizer):
    (tmp_path / "hearts").mkdir()
    index = tmp_path / "index"
    encode_all(made.root, made.run, index, quantizer)
    trained = f"{quantizer_folder(str(built), quantizer.id)}/trained.faiss"
    storage.create(f"{quantizer_folder(str(index), quantizer.id)}/trained.faiss", storage.read(trained))
    files = tuple(catalog_files(made.root, made.run))
    settings = MergeSettings(str(index), "v", quantizer.id, 3, files, f"{tmp_path}/hearts")
    worker = MergeShard(settings)
    worker.setup()
    first = list(worker.process(1))
    rest = [record for number in range(3) for record in worker.process(number)]
    assert [number for number, _ in first + rest] == [1, 0, 2]
    assert sum(rows for _, rows in first + rest) == len(made.vectors)
    assert tally(tmp_path / "hearts") == (4, 0)
    documents = [ShardDocument.load(shard_document(settings.folder, number, 3)).shard for number in range(3)]
    assert [shard.number for shard in documents] == [0, 1, 2]
    assert [shard.rows for shard in documents] == [rows for _, rows in sorted(first + rest)]
