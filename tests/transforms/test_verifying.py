"""Every fault is one sentence that names the file: damage first, then content whose checksums were made to fit."""

import dataclasses
import shutil
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import signed
import stores

from serving import records
from serving.embedder import write_artifact
from serving.manifest import Accounting, FileEntry, load_index_manifest, load_run_manifest
from transforms.catalog import part_name, read_catalog
from transforms.designing import Wishes, designs
from transforms.planning import ListingDigest
from transforms.schema import to_parquet, uri_hash
from transforms.training import train
from transforms.verifying import check_embedder, check_files, check_run, check_version, shard_files


def flip(path, place=None):
    """Turn one byte over."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 0xFF
    path.write_bytes(data)


def swap(one, other):
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def entry_of(root, entry):
    return FileEntry.of(entry.name, Path(root, entry.name).read_bytes())


def run_faults(store, **changes):
    return list(check_run(store.root, dataclasses.replace(store.run, **changes)))


def version_faults(index, **changes):
    return list(check_version(index.root, dataclasses.replace(index.version, **changes)))


@pytest.fixture(scope="module")
def second_run(tmp_path_factory):
    """A store of two runs: rows kept, added, relabelled and gone, rejects old and new."""
    path = tmp_path_factory.mktemp("second") / "store"
    vectors = stores.clustered(200, 16) + np.float32(0.25)
    uris = [f"/é/{number:03}.jpg" for number in range(200)]
    stores.write_store(path, vectors[:150], uris[:150], ["a"] * 150, rejected=["/x/1", "/x/2"], unit_size=40)
    stores.write_store(
        path, vectors[20:], uris[20:], ["a"] * 100 + ["b"] * 80, rejected=["/x/2", "/x/3"], run_id="run-2", unit_size=40
    )
    return path


@pytest.fixture
def store(second_run, store):
    """The store of two runs in place of the simple one."""
    shutil.rmtree(store.path)
    shutil.copytree(second_run, store.path)
    return store


def test_what_is_whole_has_no_faults(store, built, built_faithful, built_small, made, made_small):
    assert run_faults(store) == []
    assert list(check_run(store.root, load_run_manifest(store.root, "run-1"))) == []
    for store_made in (made, made_small):
        assert list(check_run(store_made.root, store_made.run)) == []
    for path, files in ((built, 3), (built_faithful, 4), (built_small, 2)):
        manifest = load_index_manifest(str(path))
        assert list(check_version(str(path), manifest)) == []
        assert len(shard_files(manifest)) == 1 + 3 * files


# Files


def test_files_missing_damaged_cut_and_swapped_are_told_apart(tmp_path):
    names = ["good", "missing", "damaged", "cut", "grown", "one", "two", "twin-1", "twin-2"]
    contents = {name: (b"twins" if name.startswith("twin") else name.encode()) * 300 for name in names}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    entries = [FileEntry.of(name, data) for name, data in contents.items()]
    assert list(check_files(str(tmp_path), entries)) == []
    (tmp_path / "missing").unlink()
    flip(tmp_path / "damaged")
    (tmp_path / "cut").write_bytes(contents["cut"][:-1])
    (tmp_path / "grown").write_bytes(contents["grown"] * 2)
    swap(tmp_path / "one", tmp_path / "two")
    swap(tmp_path / "twin-1", tmp_path / "twin-2")
    assert list(check_files(str(tmp_path), iter(entries))) == [
        f"{tmp_path}/missing is missing",
        f"{tmp_path}/damaged is damaged: its bytes are not those that were written",
        f"{tmp_path}/cut is damaged: 899 bytes instead of 900",
        f"{tmp_path}/grown is damaged: 3,000 bytes instead of 1,500",
        f"{tmp_path}/one is swapped: it holds what two should",
        f"{tmp_path}/two is swapped: it holds what one should",
    ]


RUN_FILES = [
    "parts/*/*",
    "catalog/run-2/*",
    "runs/run-2/plan/unit-*",
    "runs/run-2/plan/kept-*",
    "embedders/*/model.tflite",
]
VERSION_FILES = [
    *(f"versions/*/{name}" for name in ("trained.faiss", "shard-00001*.faiss", "refine-00001*", "records-00001*")),
    "embedders/*/model.tflite",
]


def pick(copy, pattern):
    return sorted(copy.path.glob(pattern))[0]


@pytest.mark.parametrize("place", [0, None, -1])
@pytest.mark.parametrize("pattern", RUN_FILES)
def test_a_flipped_byte_in_a_run_is_found(store, pattern, place):
    path = pick(store, pattern)
    flip(path, place)
    assert run_faults(store) == [f"{path} is damaged: its bytes are not those that were written"]


@pytest.mark.parametrize("place", [0, None, -1])
@pytest.mark.parametrize("pattern", VERSION_FILES)
def test_a_flipped_byte_in_a_version_is_found(index_copy, pattern, place):
    path = pick(index_copy, pattern)
    flip(path, place)
    assert version_faults(index_copy) == [f"{path} is damaged: its bytes are not those that were written"]


@pytest.mark.parametrize("pattern", RUN_FILES)
def test_a_missing_file_of_a_run_is_named(store, pattern):
    path = pick(store, pattern)
    path.unlink()
    assert run_faults(store) == [f"{path} is missing"]


@pytest.mark.parametrize("pattern", VERSION_FILES)
def test_a_missing_file_of_a_version_is_named(index_copy, pattern):
    path = pick(index_copy, pattern)
    path.unlink()
    assert version_faults(index_copy) == [f"{path} is missing"]


def test_a_file_cut_short_is_named_with_its_sizes(index_copy):
    path = pick(index_copy, "versions/*/records-00002*")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    assert version_faults(index_copy) == [f"{path} is damaged: 1,000 bytes instead of {size:,}"]


@pytest.mark.parametrize("kind", ["shard-*.faiss", "refine-*", "records-*"])
def test_swapped_shards_are_named_both(index_copy, kind):
    one, other, _ = sorted(index_copy.path.glob(f"versions/*/{kind}"))
    swap(one, other)
    assert version_faults(index_copy) == [
        f"{one} is swapped: it holds what {other.name} should",
        f"{other} is swapped: it holds what {one.name} should",
    ]


def test_swapped_parts_are_named_both(store):
    one, other = sorted(store.path.glob("parts/*/*"))[:2]
    swap(one, other)
    assert [fault.split()[0] for fault in run_faults(store)] == [str(one), str(other)]


def test_all_damage_is_told_at_once(store):
    for pattern in RUN_FILES:
        flip(pick(store, pattern))
    assert len(run_faults(store)) == len(RUN_FILES)


# The embedder


OTHER = stores.spec(32, weights="untrained:seed=1")


@pytest.fixture
def other_embedder(index_copy):
    """Put another embedder, of vectors of as many dimensions, beside the one of the index."""
    write_artifact(f"{index_copy.root}/embedders", OTHER, b"another model", {})
    return OTHER.ref


def test_an_index_whose_manifest_names_an_embedder_that_is_not_there(index_copy):
    (fault,) = version_faults(index_copy, embedder=OTHER.ref)
    assert fault == f"{index_copy.path}/embedders/{OTHER.fingerprint}/embedder.json does not exist"


def test_an_index_whose_manifest_names_another_embedder(index_copy, other_embedder, made):
    (fault,) = version_faults(index_copy, embedder=other_embedder)
    assert "is an index of another embedder" in fault
    assert made.run.embedder.fingerprint in fault
    assert other_embedder.fingerprint in fault


def test_an_index_copied_without_its_partials_has_no_faults(index_copy):
    shutil.rmtree(index_copy.path / "encoded")
    assert version_faults(index_copy) == []


def test_an_index_whose_embedder_was_replaced(index_copy, other_embedder, made):
    folder = index_copy.path / "embedders"
    mine = folder / made.run.embedder.fingerprint
    shutil.rmtree(mine)
    shutil.copytree(folder / other_embedder.fingerprint, mine)
    (fault,) = version_faults(index_copy)
    assert fault.startswith(f"{mine}/embedder.json is another embedder: its content makes {OTHER.fingerprint}")


def test_an_index_whose_embedder_was_replaced_and_renamed(index_copy, made):
    path = index_copy.path / "embedders" / made.run.embedder.fingerprint / "embedder.json"
    signed.edit(path, spec={"weights": "untrained:seed=1"})
    (fault,) = version_faults(index_copy)
    assert f"{path} is another embedder" in fault


def test_an_embedder_with_another_model_inside(index_copy, made):
    folder = index_copy.path / "embedders" / made.run.embedder.fingerprint
    (folder / "model.tflite").write_bytes(b"another model, longer")
    (fault,) = version_faults(index_copy)
    assert fault.startswith(f"{folder}/model.tflite is damaged: 21 bytes")


@pytest.mark.parametrize("change", [{"backbone": "resnet/avg"}, {"weights": "imagenet:abc"}])
def test_an_embedder_called_what_it_is_not(index_copy, made, change):
    ref = dataclasses.replace(made.run.embedder, **change)
    (fault,) = check_embedder(index_copy.root, ref)
    assert "is another embedder" in fault
    assert next(iter(change.values())) in fault


def test_an_index_of_vectors_of_other_dimensions(index_copy):
    (fault,) = version_faults(index_copy, dim=33)
    assert "is an index of another embedder: its vectors have 32 dimensions, the manifest says 33" in fault
    wide = stores.spec(48)
    write_artifact(f"{index_copy.root}/embedders", wide, b"wide", {})
    faults = version_faults(index_copy, embedder=wide.ref)
    assert any("have 32 dimensions" in fault and "gives 48" in fault for fault in faults)
    assert all("is an index of another embedder" in fault for fault in faults)


def test_a_run_of_another_embedder(store):
    other = stores.spec(16, weights="untrained:seed=1")
    (fault,) = run_faults(store, embedder=other.ref)
    assert fault.endswith(f"embedders/{other.fingerprint}/embedder.json does not exist")
    write_artifact(f"{store.root}/embedders", other, b"another model", {})
    faults = run_faults(store, embedder=other.ref)
    assert faults
    assert all(other.fingerprint in fault for fault in faults)


# What is inside an index


def replace_shard(index, number, kind, data):
    """Put other bytes into a shard's file and make the manifest fit; return the faults."""
    manifest = index.version
    shard = manifest.shards[number]
    entry = getattr(shard, kind)
    (index.path / "versions" / manifest.version / entry.name).write_bytes(data)
    shard = dataclasses.replace(shard, **{kind: FileEntry.of(entry.name, data)})
    signed.edit(pick(index, f"versions/*/shard-{number:05}*.json"), shard=dataclasses.asdict(shard))
    shards = tuple(shard if shard.number == other.number else other for other in manifest.shards)
    return version_faults(index, shards=shards)


def read_shard(index, number, kind):
    entry = getattr(index.version.shards[number], kind)
    return (index.path / "versions" / index.version.version / entry.name).read_bytes()


def serialized(index):
    return faiss.serialize_index(index).tobytes()


def test_lists_of_fewer_rows(index_copy):
    lists = faiss.deserialize_index(np.frombuffer(read_shard(index_copy, 1, "lists"), np.uint8))
    rows = lists.ntotal
    lists.remove_ids(np.array([rows - 1]))
    (fault,) = replace_shard(index_copy, 1, "lists", serialized(lists))
    assert f"shard-00001-of-00003.faiss holds {rows - 1} rows, the manifest says {rows}" in fault


def test_re_rank_codes_of_fewer_rows(index_copy):
    refine = faiss.deserialize_index(np.frombuffer(read_shard(index_copy, 0, "refine"), np.uint8))
    rows = refine.ntotal
    refine.remove_ids(np.array([0]))
    (fault,) = replace_shard(index_copy, 0, "refine", serialized(refine))
    assert f"refine-00000-of-00003.faiss holds {rows - 1} rows, the manifest says {rows}" in fault


def test_codes_of_whole_vectors_damaged_or_of_fewer_rows(faithful_copy):
    path = pick(faithful_copy, "versions/*/raw-00001*")
    data = path.read_bytes()
    flip(path)
    assert version_faults(faithful_copy) == [f"{path} is damaged: its bytes are not those that were written"]
    raw = faiss.deserialize_index(np.frombuffer(data, np.uint8))
    rows = raw.ntotal
    raw.remove_ids(np.array([rows - 1]))
    (fault,) = replace_shard(faithful_copy, 1, "raw", serialized(raw))
    assert f"raw-00001-of-00003.faiss holds {rows - 1} rows, the manifest says {rows}" in fault


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.slice(1), "rows, the manifest says"),
        (lambda table: table.take(list(range(len(table)))[::-1]), "holds rows of another shard, or out of order"),
        (lambda table: table.take([1, 0, *range(2, len(table))]), "holds rows of another shard, or out of order"),
    ],
)
def test_records_that_are_fewer_or_out_of_order(index_copy, change, said):
    table = records.from_buffer(read_shard(index_copy, 2, "records"), "records")
    (fault,) = replace_shard(index_copy, 2, "records", records.to_bytes(change(table)))
    assert "records-00002-of-00003.arrow" in fault
    assert said in fault


def test_records_of_another_shard(index_copy):
    table = records.from_buffer(read_shard(index_copy, 2, "records"), "records")
    other = records.from_buffer(read_shard(index_copy, 1, "records"), "records")
    mixed = pa.concat_tables([table.slice(1), other.slice(0, 1)])
    in_order = sorted(range(len(mixed)), key=lambda row: uri_hash(mixed["uri"][row].as_py()))
    mixed = mixed.take(in_order)
    (fault,) = replace_shard(index_copy, 2, "records", records.to_bytes(mixed))
    assert "holds rows of another shard, or out of order" in fault


@pytest.mark.parametrize("kind", ["lists", "refine", "records"])
@pytest.mark.parametrize("data", [b"", b"rubbish" * 100])
def test_rubbish_with_the_right_checksum(index_copy, kind, data):
    faults = replace_shard(index_copy, 1, kind, data)
    assert len(faults) == 1
    assert getattr(index_copy.version.shards[1], kind).name in faults[0]


def test_lists_of_another_quantizer(index_copy):
    lists = faiss.IndexIVFPQ(faiss.IndexFlatIP(16), 16, 16, 4, 4, faiss.METRIC_INNER_PRODUCT)
    lists.is_trained = True
    lists.ntotal = index_copy.version.shards[0].rows
    faults = replace_shard(index_copy, 0, "lists", serialized(lists))
    assert any("was encoded with another quantizer" in fault for fault in faults)


def test_another_quantizer(index_copy, made):
    shape = designs(len(made.vectors), 32, Wishes(dim=16))[0]
    data = train(shape, 32, made.vectors[::-1].copy())
    path = pick(index_copy, "versions/*/trained.faiss")
    path.write_bytes(data)
    (fault,) = version_faults(index_copy, trained=FileEntry.of("trained.faiss", data))
    assert "trained.faiss is the quantizer" in fault
    assert f"not {index_copy.version.quantizer}" in fault


@pytest.mark.parametrize("rows", [0, 1199, 1201])
def test_a_manifest_of_other_rows(index_copy, rows):
    (fault,) = version_faults(index_copy, rows=rows)
    assert f"the shards' rows do not add up to the {rows:,} of the manifest" in fault


def test_a_manifest_that_lost_a_shard(index_copy):
    *missing, fault = version_faults(index_copy, shards=index_copy.version.shards[:2])
    assert "do not add up" in fault
    assert [Path(said.split()[0]).name for said in missing] == [
        f"shard-0000{number}-of-00002.json" for number in (0, 1)
    ]


def test_a_manifest_whose_shards_changed_places(index_copy):
    one, two, three = index_copy.version.shards
    faults = version_faults(
        index_copy,
        shards=(dataclasses.replace(one, buckets=two.buckets), dataclasses.replace(two, buckets=one.buckets), three),
    )
    assert len(faults) == 4
    assert all("and the manifest say different things of shard" in fault for fault in faults[:2])
    assert all("holds rows of another shard" in fault for fault in faults[2:])


# What a shard and a plan say of themselves


SHARD, PLAN = "versions/*/shard-00001*.json", "runs/run-2/plan/plan.json"


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(b"{}")])
def test_a_damaged_shard_document_is_named(index_copy, damage):
    path = pick(index_copy, SHARD)
    damage(path)
    (fault,) = version_faults(index_copy)
    assert fault.startswith(f"{path} ")


@pytest.mark.parametrize("change", [{"rows": 1}, {"number": 2}, {"refine": None}, {"lists": {"name": "other"}}])
def test_a_shard_document_that_says_something_else_is_named(index_copy, change):
    path = pick(index_copy, SHARD)
    shard = dataclasses.asdict(index_copy.version.shards[1])
    if "lists" in change:
        change = {"lists": shard["lists"] | change["lists"]}
    signed.edit(path, shard=change)
    assert version_faults(index_copy) == [f"{path} and the manifest say different things of shard 1"]


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(b"{}")])
def test_a_damaged_plan_is_named(store, damage):
    path = pick(store, PLAN)
    damage(path)
    (fault,) = run_faults(store)
    assert fault.startswith(f"{path} ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unit_files": []}, "names other files than the manifest"),
        ({"kept_files": []}, "names other files than the manifest"),
        ({"listing_digest": "0" * 64}, "is of another listing than the manifest"),
    ],
)
def test_a_plan_that_says_something_else_is_named(store, change, said):
    path = pick(store, PLAN)
    signed.edit(path, **change)
    assert run_faults(store) == [f"{path} {said}"]


# What is inside a store


def replace_catalog(store, change):
    """Change the catalog as a list of dicts and make the manifest fit; return the faults."""
    entry = store.run.catalog[0]
    path = store.path / entry.name
    table = pq.read_table(path)
    rows = change(table.to_pylist())
    path.write_bytes(to_parquet(pa.Table.from_pylist(rows, table.schema), row_group=50))
    return run_faults(store, catalog=(entry_of(store.root, entry),))


def edited(number, **changes):
    return lambda rows: [*rows[:number], rows[number] | changes, *rows[number + 1 :]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edited(5, status="rejected", reason="empty"), "is not what the catalog says of /é/023.jpg"),
        (edited(5, row=4), "row 4 is not what the catalog says of /é/023.jpg"),
        (edited(5, row=10**6), "row 1000000 is not what the catalog says of /é/023.jpg"),
        (edited(5, row=-1), "row -1 is not what the catalog says of /é/023.jpg"),
        (edited(1, reason="empty"), "is not what the catalog says of /x/3"),
        (edited(1, status="embedded", reason=None), "is not what the catalog says of /x/3"),
        (edited(5, part="0" * 32), "0" * 32),
        (edited(5, etag="other"), "the catalog does not hold the very images that were listed"),
        (edited(5, uri="/é/023.jpeg"), "the catalog does not hold the very images that were listed"),
        (edited(5, uri_hash=7), "/é/023.jpg"),
        (edited(5, label="other"), "/é/023.jpg"),
        (edited(-1, label="other"), "/é/199.jpg"),
        (lambda rows: rows[1:], "the catalog does not hold the very images that were listed"),
        (lambda rows: [rows[0], *rows], "the catalog does not hold the very images that were listed"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "the catalog does not hold the very images that were listed"),
    ],
)
def test_a_catalog_row_that_was_edited(store, change, said):
    faults = replace_catalog(store, change)
    assert any(said in fault for fault in faults), faults


def test_a_catalog_row_counted_from_the_end(store):
    rows = list(read_catalog(store.root, store.run))
    row = rows[5]
    length = pq.read_metadata(store.path / part_name(store.run.embedder.fingerprint, row.part)).num_rows
    (fault,) = replace_catalog(store, edited(5, row=row.row - length))
    assert f"is not what the catalog says of {row.uri}" in fault


def test_a_part_that_was_edited(store):
    """Embedded rows lose their vectors, and the checksum fits."""
    entry = store.run.parts[0]
    path = store.path / entry.name
    table = pq.read_table(path)
    field = table.schema.field("embedding")
    empty = table.set_column(table.column_names.index("embedding"), field, pa.nulls(len(table), field.type))
    path.write_bytes(to_parquet(empty, row_group=100))
    faults = run_faults(store, parts=tuple(entry_of(store.root, part) for part in store.run.parts))
    part = path.stem
    live = [row for row in read_catalog(store.root, store.run) if row.part == part and row.status == "embedded"]
    assert live
    assert faults == [f"{path}: row {row.row} is not what the catalog says of {row.uri}" for row in live]


def test_a_part_of_rubbish_with_the_right_checksum(store):
    entry = store.run.parts[0]
    (store.path / entry.name).write_bytes(b"rubbish")
    (fault,) = run_faults(store, parts=tuple(entry_of(store.root, part) for part in store.run.parts))
    assert fault.startswith(f"{store.path}/{entry.name} cannot be read as Parquet")


def test_a_part_that_the_manifest_does_not_name(store):
    left_out, *parts = store.run.parts
    (fault,) = run_faults(store, parts=tuple(parts))
    assert fault == f"{store.path}/{left_out.name} is in the catalog, and the manifest does not name it"


@pytest.mark.parametrize(
    "change",
    [
        {"listed": 183},
        {"embedded": 51, "listed": 183},
        {"reused": 130},
        {"embedded": 49, "reused": 132},
        {"rejected": {}},
        {"rejected": {"truncated": 2}},
        {"rejected": {"timeout": 1}},
        {"rejected": {"truncated": 0, "empty": 1}},
    ],
)
def test_an_accounting_that_was_edited(store, change):
    right = store.run.accounting
    assert right == Accounting(182, 50, 131, {"truncated": 1}, relabelled=30, gone=21)
    faults = run_faults(store, accounting=dataclasses.replace(right, **change))
    assert len(faults) == 1
    assert "run run-2: the accounting does not close" in faults[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": 181}, "the catalog has 182 rows, 180 of them embedded, the manifest says 181 and 180"),
        ({"live": 181}, "the catalog has 182 rows, 180 of them embedded, the manifest says 182 and 181"),
        ({"listing_digest": ListingDigest().hex()}, "the catalog does not hold the very images that were listed"),
        ({"plan": ()}, "the catalog does not hold the very images that were listed"),
        ({"catalog": ()}, "the catalog does not hold the very images that were listed"),
    ],
)
def test_a_run_manifest_that_was_edited(store, change, said):
    faults = run_faults(store, **change)
    assert any(said in fault for fault in faults), faults


@pytest.mark.parametrize("name", ["unit-tests", "kept-pictures", "runs"])
def test_a_store_may_be_called_anything(tmp_path, second_run, name):
    path = tmp_path / name / "unit-1"
    shutil.copytree(second_run, path)
    assert list(check_run(str(path), load_run_manifest(str(path)))) == []
