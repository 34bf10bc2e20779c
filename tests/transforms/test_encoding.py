import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stores

from serving import storage
from serving.errors import ChecksumMismatch, FormatError, NotFound
from serving.quantizer import BATCH
from transforms import encoding
from transforms.embedding import Outcome, part_table
from transforms.encoding import (
    ENCODED_BY,
    EncodePart,
    EncodeSettings,
    encode_part,
    load_quantizer,
    partial_uri,
    quantizer_folder,
)
from transforms.progress import tally
from transforms.schema import ImageRef, part_schema, partial_schema, to_parquet, uri_hash


def encoded(store, run, quantizer):
    """Encode all parts of a store; return uri hash → (part, row), code, re-rank code."""
    found = {}
    for part in run.parts:
        table = encode_part(f"{store}/{part.name}", quantizer)
        assert table.schema == partial_schema(quantizer.code_size, quantizer.refine_size, quantizer.raw_size)
        columns = [table[name].to_pylist() for name in table.column_names]
        for hashed, row, *codes in zip(*columns, strict=True):
            assert hashed not in found
            found[hashed] = ((part.name, row), codes)
    return found


def write_part(path, outcomes, row_group=7):
    refs = [ImageRef(f"/{number:03}", "e", 1, 0, None) for number in range(len(outcomes))]
    table = part_table(refs, outcomes, part_schema("float16"))
    path.write_bytes(to_parquet(table, row_group=row_group))
    return str(path)


# Codes


@pytest.mark.parametrize("kind", ["quantizer", "quantizer_faithful", "quantizer_small"])
def test_codes_depend_on_their_row_alone(request, kind):
    quantizer = request.getfixturevalue(kind)
    vectors = stores.clustered(BATCH + 300, quantizer.dim, seed=1)
    whole = quantizer.encode(vectors)
    order = np.random.default_rng(0).permutation(len(vectors))
    shuffled = quantizer.encode(vectors[order])
    pieces = [quantizer.encode(piece) for piece in np.array_split(vectors[:200], [1, 2, 5, 60, 61])]
    sizes = {"codes": quantizer.code_size, "refine": quantizer.refine_size, "raw": quantizer.raw_size}
    for name, size in sizes.items():
        codes = getattr(whole, name)
        if not size:
            assert codes is None
            continue
        assert codes.shape == (len(vectors), size)
        np.testing.assert_array_equal(getattr(shuffled, name), codes[order])
        np.testing.assert_array_equal(np.concatenate([getattr(piece, name) for piece in pieces]), codes[:200])


def test_codes_are_those_of_faiss(quantizer):
    vectors = stores.clustered(5000, quantizer.dim, seed=2)
    reduced = vectors
    for transform in quantizer.chain:
        reduced = transform.apply(reduced)
    codes = quantizer.encode(vectors)
    same = (codes.codes == quantizer.ivf.sa_encode(reduced)).all(axis=1)
    assert same.mean() >= 0.999
    # Scalar codes step by 1/255 of a range: float32 and float64 may fall on two sides of a step, never further.
    by_faiss = quantizer.empty_refine().sa_encode(reduced).astype(int)
    assert (np.abs(codes.refine - by_faiss) <= 1).all()
    assert (codes.refine == by_faiss).mean() >= 0.999


def test_codes_name_the_nearest_list(quantizer):
    vectors = stores.clustered(500, quantizer.dim, seed=3)
    centroids = quantizer.ivf.quantizer.reconstruct_n(0, quantizer.ivf.nlist)
    nearest = (quantizer.reduce(vectors) @ centroids.T).argmax(axis=1)
    assert quantizer.code_size == 1 + quantizer.ivf.pq.code_size
    assert (quantizer.encode(vectors).codes[:, 0] == nearest).mean() >= 0.998


def test_exact_codes_are_the_vectors(quantizer_small):
    vectors = stores.clustered(100, quantizer_small.dim, seed=4)
    codes = quantizer_small.encode(vectors)
    assert codes.refine is None
    kept = np.ascontiguousarray(codes.codes[:, -4 * quantizer_small.dim :]).view(np.float32)
    np.testing.assert_array_equal(kept, quantizer_small.reduce(vectors))


# Partials


def test_a_partial_holds_each_embedded_row_once_sorted_by_hash(made, quantizer):
    part = max(made.run.parts, key=lambda part: part.size).name
    table = encode_part(f"{made.root}/{part}", quantizer)
    rows = pq.read_table(f"{made.root}/{part}").to_pylist()
    assert {row["status"] for row in rows} == {"embedded", "rejected"}
    expected = {number: uri_hash(row["uri"]) for number, row in enumerate(rows) if row["status"] == "embedded"}
    assert dict(zip(table["row"].to_pylist(), table["uri_hash"].to_pylist(), strict=True)) == expected
    assert len(table) == len(expected) > 100
    assert table["uri_hash"].to_pylist() == sorted(expected.values())


@pytest.mark.parametrize("kind", ["quantizer", "quantizer_faithful", "quantizer_small"])
def test_partials_hold_the_codes_of_their_rows(request, kind):
    quantizer = request.getfixturevalue(kind)
    made = request.getfixturevalue("made_small" if kind == "quantizer_small" else "made")
    found = encoded(made.root, made.run, quantizer)
    codes = quantizer.encode(made.vectors)
    kept = [each for each in (codes.codes, codes.refine, codes.raw) if each is not None]
    assert len(kept) == {"quantizer": 2, "quantizer_faithful": 3, "quantizer_small": 1}[kind]
    assert found.keys() == {uri_hash(uri) for uri in made.uris}
    assert not found.keys() & {uri_hash(uri) for uri in made.rejected}
    for number, uri in enumerate(made.uris):
        assert found[uri_hash(uri)][1] == [each[number].tobytes() for each in kept]


@pytest.mark.parametrize("unit_size", [17, 5000])
def test_codes_do_not_depend_on_how_units_were_cut(made, quantizer, tmp_path, unit_size):
    run = stores.write_store(tmp_path, made.vectors, unit_size=unit_size)
    one, other = encoded(made.root, made.run, quantizer), encoded(str(tmp_path), run, quantizer)
    assert {hashed: codes for hashed, (_, codes) in one.items()} == {
        hashed: codes for hashed, (_, codes) in other.items()
    }


@pytest.mark.parametrize("pattern", ["", "0", "1", "000000000", "0000000011", "1100000000", "01" * 20])
def test_partials_of_parts_with_any_mix_of_rejects(tmp_path, quantizer, pattern):
    vectors = stores.clustered(len(pattern), quantizer.dim)
    outcomes = [
        Outcome(vector=vector) if mark == "1" else Outcome(reason="empty")
        for mark, vector in zip(pattern, vectors, strict=True)
    ]
    table = encode_part(write_part(tmp_path / "part.parquet", outcomes), quantizer)
    rows = [number for number, mark in enumerate(pattern) if mark == "1"]
    assert sorted(table["row"].to_pylist()) == rows
    assert table.schema == partial_schema(quantizer.code_size, quantizer.refine_size)
    codes = dict(zip(table["row"].to_pylist(), table["code"].to_pylist(), strict=True))
    expected = quantizer.encode(vectors[rows]).codes
    assert codes == {row: code.tobytes() for row, code in zip(rows, expected, strict=True)}


def test_rows_of_equal_hash_keep_their_order(tmp_path, quantizer, monkeypatch):
    monkeypatch.setattr(encoding, "uri_hash", lambda uri: int(uri[1:]) // 10)
    uri = write_part(tmp_path / "part.parquet", [Outcome(vector=np.ones(32, np.float32))] * 40)
    table = encode_part(uri, quantizer)
    assert table["row"].to_pylist() == list(range(40))
    assert table["uri_hash"].to_pylist() == [number // 10 for number in range(40)]


def test_vectors_of_other_dimensions_are_refused(tmp_path, quantizer):
    uri = write_part(tmp_path / "part.parquet", [Outcome(vector=np.ones(33, np.float32))])
    with pytest.raises(FormatError, match=r"part\.parquet lacks vectors, or they are not of 32 dimensions"):
        encode_part(uri, quantizer)


# Names and work


def test_where_things_stand():
    assert quantizer_folder("gs://b/i", "q") == "gs://b/i/encoded/q"
    assert partial_uri("gs://b/i", "q", "parts/f00d/abc.parquet") == "gs://b/i/encoded/q/abc.parquet"
    assert partial_uri("gs://b/i", "q", "abc.parquet") == "gs://b/i/encoded/q/abc.parquet"


def test_a_quantizer_is_loaded_by_its_id(built, quantizer):
    again = load_quantizer(str(built), quantizer.id)
    assert again.id == quantizer.id
    assert faiss.serialize_index(again.ivf).tobytes() == faiss.serialize_index(quantizer.ivf).tobytes()
    with pytest.raises(NotFound, match="nowhere"):
        load_quantizer(str(built), "nowhere")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"?", lambda _: b""])
def test_a_quantizer_that_is_not_the_one_of_its_path_is_refused(index_copy, quantizer, damage):
    path = index_copy.path / "encoded" / quantizer.id / "trained.faiss"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ChecksumMismatch, match=r"trained\.faiss is damaged or another quantizer's"):
        load_quantizer(index_copy.root, quantizer.id)


def test_a_worker_encodes_what_is_not_encoded_yet(made, built, quantizer, tmp_path):
    (tmp_path / "hearts").mkdir()
    index = f"{tmp_path}/index"
    trained = f"{quantizer_folder(str(built), quantizer.id)}/trained.faiss"
    storage.create(f"{quantizer_folder(index, quantizer.id)}/trained.faiss", storage.read(trained))
    worker = EncodePart(EncodeSettings(made.root, index, quantizer.id, f"{tmp_path}/hearts"))
    worker.setup()
    names = [part.name for part in made.run.parts]
    first = list(worker.process(names[0]))
    assert [name for name, _ in first] == names[:1]
    written = partial_uri(index, quantizer.id, names[0])
    before = storage.of(written).stat(written)
    done = [record for name in names for record in worker.process(name)]
    assert [name for name, _ in done] == names[1:]
    assert sum(count for _, count in first + done) == len(made.vectors)
    assert storage.of(written).stat(written) == before
    assert tally(tmp_path / "hearts") == (1 + len(names), 0)
    for name in names:
        kept = pq.read_table(partial_uri(index, quantizer.id, name))
        assert kept.schema.metadata[ENCODED_BY.encode()] == quantizer.id.encode()
        assert kept.equals(encode_part(f"{made.root}/{name}", quantizer))
        # The indexes were built by the same steps through Beam.
        assert kept.equals(pq.read_table(partial_uri(str(built), quantizer.id, name)))
    assert pa.types.is_fixed_size_binary(kept.schema.field("code").type)
