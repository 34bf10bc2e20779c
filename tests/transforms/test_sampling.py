import numpy as np
import pyarrow as pa
import pytest
import stores

from serving.errors import FormatError
from transforms.catalog import part_uri
from transforms.embedding import Outcome, part_table
from transforms.planning import read_unit
from transforms.sampling import LiveRows, _mix, embeddings, live_rows, sample
from transforms.schema import part_schema, to_parquet, uri_hash

COLUMNS = ("uri", "label", "part", "row", "uri_hash")


@pytest.fixture(scope="module")
def rows(made) -> LiveRows:
    return live_rows(made.root, made.run, COLUMNS)


@pytest.fixture(scope="module")
def vector_of(made):
    return dict(zip(made.uris, made.vectors, strict=True))


def test_live_rows_are_the_embedded_ones(made, rows):
    assert rows.column("uri") == made.uris
    assert rows.column("label") == made.labels
    assert len(rows) == made.run.live == len(made.vectors)
    assert made.run.rows == len(made.vectors) + len(made.rejected)
    assert set(rows.table.column_names) == set(COLUMNS)


def test_vectors_are_what_was_written(made, rows):
    np.testing.assert_array_equal(rows.vectors(), made.vectors)
    assert rows.vectors().dtype == np.float32


@pytest.mark.parametrize("count", [0, 1, 7, 400])
def test_some_rows_in_any_order_with_repeats(made, rows, count):
    chosen = np.random.default_rng(count).integers(0, len(rows), count)
    taken = rows.take(chosen)
    assert taken.column("uri") == [made.uris[place] for place in chosen]
    np.testing.assert_array_equal(taken.vectors(), made.vectors[chosen])


@pytest.mark.parametrize("count", [0, 1, 7, 1200])
def test_all_rows_but_some(made, rows, count):
    some = rows.take(np.random.default_rng(count).permutation(len(rows))[:count])
    kept = rows.without(some)
    left = [uri for uri in rows.column("uri") if uri not in set(some.column("uri"))]
    assert kept.column("uri") == left
    assert len(left) == len(rows) - count
    np.testing.assert_array_equal(kept.vectors(), made.vectors[[made.uris.index(uri) for uri in left]].reshape(-1, 32))


def test_chunks_cover_every_row_once(made, rows):
    seen = np.zeros(len(rows), int)
    chunks = 0
    for places, vectors in rows.chunks():
        seen[places] += 1
        chunks += 1
        np.testing.assert_array_equal(vectors, made.vectors[places])
        assert 1 <= len(places) <= 100, "a row group of these parts"
    assert (seen == 1).all()
    assert chunks >= len(made.run.parts)


def test_a_sample_is_the_rows_whose_mixed_hashes_are_least(rows):
    for size, salt in [(1, 0), (50, 0), (50, 7), (len(rows), 3)]:
        uris = [uri for uri in rows.column("uri") if uri]
        keys = _mix(np.array([uri_hash(uri) ^ salt for uri in uris], np.uint64)).tolist()
        expected = [uri for _, uri in sorted(zip(keys, uris, strict=True))][:size]
        assert sample(rows, size, salt).column("uri") == expected


def test_a_sample_larger_than_the_collection_is_all_of_it(made, rows):
    taken = sample(rows, 10 * len(rows), 1)
    assert sorted(taken.column("uri")) == made.uris


def test_salts_set_samples_apart_and_sizes_nest(rows):
    one, other = (set(sample(rows, 300, salt).column("uri")) for salt in (1, 2))
    # Two independent quarters share a sixteenth: 75 of 1,200, give or take 7.
    assert 75 - 5 * 7 < len(one & other) < 75 + 5 * 7
    assert set(sample(rows, 100, 1).column("uri")) < one


def test_mixing_is_one_to_one():
    # The first outputs of SplitMix64 from seed 0 are its finalizer at multiples of the golden gamma.
    gammas = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [f"{value:016x}" for value in _mix(gammas).tolist()] == [
        "e220a8397b1dcdaf",
        "6e789e6aa1b965f4",
        "06c45d188009454f",
    ]
    values = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64)
    assert len(np.unique(_mix(values))) == len(np.unique(values))


@pytest.mark.parametrize("unit_size", [1, 37, 5000])
def test_a_sample_does_not_depend_on_how_units_were_cut(made, rows, tmp_path, unit_size):
    count = 150 if unit_size == 1 else len(made.vectors)
    few = rows.take(np.arange(count))
    run = stores.write_store(tmp_path, made.vectors[:count], unit_size=unit_size)
    other = live_rows(str(tmp_path), run, COLUMNS)
    one, two = sample(few, 100, 5), sample(other, 100, 5)
    assert one.column("uri") == two.column("uri")
    assert one.column("part") != two.column("part")
    np.testing.assert_array_equal(one.vectors(), two.vectors())


def test_a_sample_does_not_depend_on_the_history_of_a_store(made, rows, tmp_path, vector_of):
    halves = made.uris[::2], made.uris[1::2]
    for number, uris in enumerate([halves[0], made.uris]):
        vectors = np.array([vector_of[uri] for uri in uris])
        run = stores.write_store(tmp_path, vectors, uris, run_id=f"run-{number}", rejected=["/made/zzz.jpg"])
    other = live_rows(str(tmp_path), run, COLUMNS)
    one, two = sample(rows, 200, 9), sample(other, 200, 9)
    assert one.column("uri") == two.column("uri")
    np.testing.assert_array_equal(one.vectors(), two.vectors())


@pytest.mark.parametrize("number", [np.float16, np.float32])
def test_a_column_of_embeddings_becomes_a_matrix(number):
    values = np.arange(24).reshape(6, 4).astype(number)
    column = pa.array(list(values), pa.list_(pa.from_numpy_dtype(number)))
    np.testing.assert_array_equal(embeddings(column, 4, "part"), values.astype(np.float32))
    np.testing.assert_array_equal(embeddings(column.slice(2, 3), 4, "part"), values[2:5].astype(np.float32))
    chunked = pa.chunked_array([column.slice(0, 1), column.slice(1, 0), column.slice(1)])
    np.testing.assert_array_equal(embeddings(chunked, 4, "part"), values.astype(np.float32))
    assert embeddings(column.slice(0, 0), 4, "part").shape == (0, 4)


@pytest.mark.parametrize("fault", ["fewer rows", "no vectors", "other dimensions"])
def test_a_part_that_does_not_hold_what_the_catalog_says_is_refused(store, made, fault):
    name = made.run.parts[0].name
    unit = read_unit(f"{store.root}/runs/run-1/plan", name.rpartition("/")[2].removesuffix(".parquet"))
    unit = unit[:-1] if fault == "fewer rows" else unit
    vector = np.ones(33 if fault == "other dimensions" else 32, np.float32)
    bad = Outcome(reason="empty") if fault == "no vectors" else Outcome(vector=vector)
    table = part_table(unit, [bad] * len(unit), part_schema("float16"))
    (store.path / name).write_bytes(to_parquet(table, row_group=100))
    with pytest.raises(FormatError, match=name):
        live_rows(store.root, made.run, COLUMNS).vectors()


def test_a_part_is_found_by_its_name(made, rows):
    names = {part_uri(made.root, made.run.embedder.fingerprint, part) for part in rows.column("part")}
    assert names == {f"{made.root}/{part.name}" for part in made.run.parts}
