"""Row number ↔ uri, label, etag, over shards of any size."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from serving.errors import FormatError
from serving.records import SCHEMA, Record, Records, from_buffer, to_bytes

URI = "/somewhere/records.arrow"
ROWS = [
    Record("/a.jpg", "cat", "1"),
    Record("/é/日本語 😀.png", "größe", "2"),
    Record("/no label.jpg", None, "3"),
    Record("gs://bucket/#?%[*].jpg", "", "4"),
    Record("/again.jpg", "cat", ""),
]


DICTIONARY = pa.dictionary(pa.int32(), pa.string())


def table(rows: list[Record], label: pa.DataType = DICTIONARY) -> pa.Table:
    """Lay rows out as columns; `label` plain or as a dictionary."""
    uris, labels, etags = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        {"uri": pa.array(uris, pa.string()), "label": pa.array(labels, label), "etag": pa.array(etags, pa.string())}
    )


def read(*shards: list[Record]) -> Records:
    return Records([from_buffer(to_bytes(table(rows)), URI) for rows in shards])


@pytest.mark.parametrize("label", [pa.string(), DICTIONARY, pa.dictionary(pa.int8(), pa.string())])
def test_records_survive_a_round_trip(label):
    found = from_buffer(to_bytes(table(ROWS, label)), URI)
    assert found.schema == SCHEMA
    assert [Record(**row) for row in found.to_pylist()] == ROWS


def test_labels_that_are_all_absent():
    rows = [row._replace(label=None) for row in ROWS]
    assert list(read(rows)) == rows


SPLITS = [
    [5],
    [0, 5],
    [5, 0],
    [2, 0, 3],
    [0, 0, 1, 0, 0, 4, 0],
    [1, 1, 1, 1, 1],
]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_rows_count_over_all_shards(sizes):
    bounds = list(itertools.accumulate(sizes, initial=0))
    found = read(*(ROWS[start:end] for start, end in itertools.pairwise(bounds)))
    assert len(found) == 5
    assert [found[row] for row in range(5)] == ROWS


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("labels", [{"cat"}, {"größe", ""}, {"cat", "größe", "", "more"}, {"dog"}, {}, {None}], ids=str)
def test_rows_are_found_by_their_labels(sizes, labels):
    bounds = list(itertools.accumulate(sizes, initial=0))
    found = read(*(ROWS[start:end] for start, end in itertools.pairwise(bounds))).labelled(labels)
    assert found.dtype == np.int64
    assert found.tolist() == [row for row, (_, label, _) in enumerate(ROWS) if label is not None and label in labels]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_uris_and_labels_come_in_the_order_asked(sizes):
    bounds = list(itertools.accumulate(sizes, initial=0))
    found = read(*(ROWS[start:end] for start, end in itertools.pairwise(bounds)))
    for rows in ([], [4, 0, 2], [3, 3], [*range(5)]):
        assert found.uris_and_labels(rows) == [ROWS[row][:2] for row in rows]


@pytest.mark.parametrize("shards", [[], [[]], [[], []]], ids=str)
def test_no_row_at_all(shards):
    found = read(*shards)
    assert len(found) == 0
    assert found.labelled({"cat"}).tolist() == []
    assert found.uris_and_labels([]) == []
    with pytest.raises(IndexError, match="row 0 of 0"):
        found[0]


@pytest.mark.parametrize("row", [-1, 5, 10**12])
def test_rows_that_are_not_there(row):
    with pytest.raises(IndexError, match=f"row {row} of 5"):
        read(ROWS)[row]


def test_many_chunks_become_one_batch():
    chunks = pa.concat_tables([table([row]) for row in ROWS] + [table([])])
    data = to_bytes(chunks)
    assert pa.ipc.open_file(pa.py_buffer(data)).num_record_batches == 1
    assert data == to_bytes(table(ROWS)), "however the rows were gathered, the bytes are the same"
    assert list(Records([from_buffer(data, URI)])) == ROWS


def test_a_slice_is_written_as_itself():
    assert list(Records([from_buffer(to_bytes(table(ROWS)[1:4]), URI)])) == ROWS[1:4]


def test_a_slice_is_read_as_itself():
    """Of columns that start amid their buffers, or are of many chunks."""
    for some in (table(ROWS)[1:4], pa.concat_tables([table(ROWS[1:2]), table(ROWS[2:4])]).unify_dictionaries()):
        found = Records([some.cast(SCHEMA), table(ROWS)[4:]])
        assert list(found) == ROWS[1:]
        assert found.uris_and_labels([2, 0, 3]) == [ROWS[row][:2] for row in (3, 1, 4)]
        assert found.labelled({"cat", ""}).tolist() == [2, 3]


def test_reading_copies_nothing():
    before = pa.total_allocated_bytes()
    data = to_bytes(table([Record(f"/{number:050}.jpg", "cat", "1") for number in range(5000)]))
    source = pa.py_buffer(data)
    found = from_buffer(source, URI)
    assert pa.total_allocated_bytes() - before < 50_000 < len(data)
    assert found["uri"].chunk(0).buffers()[2].address > source.address
    del data, source
    assert Records([found])[4999].uri.endswith("4999.jpg")


@pytest.mark.parametrize(
    "wrong",
    [
        table(ROWS).drop(["etag"]),
        table(ROWS).rename_columns(["uri", "name", "etag"]),
        table(ROWS).select(["label", "uri", "etag"]),
        table(ROWS).append_column("more", pa.nulls(5)),
        table(ROWS, pa.string()),
        pa.table({"uri": [1], "label": ["a"], "etag": [2]}),
    ],
    ids=lambda table: ", ".join(f"{field.name} {field.type}" for field in table.schema),
)
def test_other_columns_are_refused(wrong):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, wrong.schema) as writer:
        writer.write_table(wrong)
    with pytest.raises(FormatError, match=rf"{URI} holds the columns .*, not uri \(string\), label \(dict.*, etag"):
        from_buffer(sink.getvalue(), URI)


@pytest.mark.parametrize("data", [b"", b"garbage", b"ARROW1\0\0", b"x" * 5000])
def test_garbage_is_refused(data):
    with pytest.raises(FormatError, match=f"{URI} cannot be read as records"):
        from_buffer(data, URI)


def test_a_cut_file_is_refused():
    data = to_bytes(table(ROWS))
    for end in range(0, len(data), 5):
        with pytest.raises(FormatError):
            from_buffer(data[:end], URI)


def test_a_damaged_footer_is_refused_or_harmless():
    """Behind a checksum this cannot happen; still no error but our own comes out."""
    data = to_bytes(table(ROWS))
    refused = 0
    for place in range(len(data) - 300, len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x41
        try:
            from_buffer(bytes(damaged), URI)
        except FormatError:
            refused += 1
    assert refused > 30
