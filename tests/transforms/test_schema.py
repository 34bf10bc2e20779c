import itertools
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.errors import FormatError, NotFound, TimedOut
from transforms import schema
from transforms.schema import (
    BUCKETS,
    CATALOG,
    UNIT,
    CatalogRow,
    ImageRef,
    hash_range,
    iter_rows,
    part_schema,
    partial_schema,
    read_parquet,
    shard_buckets,
    to_parquet,
    to_table,
    uri_hash,
)


def _refs(count, seed=0):
    rng = random.Random(seed)
    words = ["a b", "é", "日本", "#%?*[", "\U0001f600", ".hidden"]
    return [
        ImageRef(f"/{rng.choice(words)}/{number}.jpg", f"{number:x}", rng.randrange(2**40), rng.randrange(2**50), label)
        for number, label in enumerate(rng.choices([None, "", "cat", "naïve"], k=count))
    ]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        # printf %s URI | b2sum -l 64
        ("", "e4a6a0577479b2b4"),
        ("gs://bucket/a.jpg", "8f9d949cebb3a62a"),
        ("/photos/日本/é.png", "b6a02c53ae98a9d1"),
    ],
)
def test_uris_hash_alike_on_every_machine(uri, expected):
    assert f"{uri_hash(uri):016x}" == expected


def test_hashes_fill_the_buckets_evenly():
    counts = np.bincount([uri_hash(f"gs://bucket/{n:07}.jpg") >> 54 for n in range(64 * BUCKETS)], minlength=BUCKETS)
    assert len(counts) == BUCKETS
    # The chi-square of 1,023 degrees of freedom: five standard deviations around its mean.
    assert np.square(counts - 64).sum() / 64 == pytest.approx(BUCKETS - 1, abs=5 * (2 * (BUCKETS - 1)) ** 0.5)


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 8, 1000, BUCKETS])
def test_shards_share_out_all_buckets(shards):
    ranges = [shard_buckets(number, shards) for number in range(shards)]
    assert [bucket for first, last in ranges for bucket in range(first, last)] == list(range(BUCKETS))
    sizes = {last - first for first, last in ranges}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shards", [1, 3, BUCKETS])
def test_ranges_of_hashes_meet_without_gap(shards):
    ranges = [hash_range(shard_buckets(number, shards)) for number in range(shards)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 2**64 - 1
    assert all(high + 1 == low for (_, high), (low, _) in itertools.pairwise(ranges))


def test_a_hash_lies_in_the_range_of_its_bucket():
    for number in range(500):
        hashed = uri_hash(f"/{number}")
        low, high = hash_range((hashed >> 54, (hashed >> 54) + 1))
        assert low <= hashed <= high


@pytest.mark.parametrize("counts", [[0], [1], [100, 0, 57]])
def test_rows_come_back_as_they_went(tmp_path, counts):
    files = [_refs(count, seed) for seed, count in enumerate(counts)]
    for number, refs in enumerate(files):
        (tmp_path / f"{number}.parquet").write_bytes(to_parquet(to_table(refs, UNIT), row_group=30))
    uris = [str(tmp_path / f"{number}.parquet") for number in range(len(files))]
    assert list(iter_rows(uris, ImageRef, UNIT)) == [ref for refs in files for ref in refs]


def test_catalog_rows_come_back_with_their_types(tmp_path):
    rows = [
        CatalogRow("/a", "e", None, "part", 0, "embedded", None, 2**64 - 1),
        CatalogRow("/b", "e", "cat", "part", 2**31 - 1, "rejected", "empty", 0),
    ]
    (tmp_path / "c.parquet").write_bytes(to_parquet(to_table(rows, CATALOG), row_group=1))
    back = list(iter_rows([str(tmp_path / "c.parquet")], CatalogRow, CATALOG))
    assert back == rows
    assert [type(value) for value in back[1]] == [str, str, str, str, int, str, str, int]


def test_a_null_where_there_must_be_none_is_refused():
    with pytest.raises((ValueError, pa.ArrowInvalid)):
        to_parquet(to_table([ImageRef("/a", None, 1, 1, None)], UNIT), row_group=1)


def test_parquet_is_zstd_with_the_row_groups_asked_for_and_says_who_wrote_it():
    data = to_parquet(to_table(_refs(25), UNIT), row_group=10, metadata={"lookalike.unit": "u"})
    file = pq.ParquetFile(pa.BufferReader(data))
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    assert [group.num_rows for group in groups] == [10, 10, 5]
    assert {group.column(column).compression for group in groups for column in range(len(UNIT))} == {"ZSTD"}
    assert file.schema_arrow.metadata[b"lookalike.unit"] == b"u"
    assert groups[0].column(0).statistics.has_min_max


@pytest.mark.parametrize(("precision", "number"), [("float16", pa.float16()), ("float32", pa.float32())])
def test_a_part_holds_vectors_of_the_precision_asked_for(precision, number):
    fields = part_schema(precision)
    assert fields.field("embedding").type.value_type == number
    assert [field.name for field in fields if not field.nullable] == ["uri", "etag", "status"]


@pytest.mark.parametrize(
    ("refine", "raw", "names"), [(0, 0, []), (16, 0, ["refine"]), (16, 32, ["refine", "raw"]), (0, 32, ["raw"])]
)
def test_a_partial_has_codes_to_rank_again_by_where_there_are_any(refine, raw, names):
    fields = partial_schema(5, refine, raw)
    assert fields.names == ["uri_hash", "row", "code", *names]
    widths = [fields.field(name).type.byte_width for name in ("code", *names)]
    assert widths == [5, *({"refine": 16, "raw": 32}[name] for name in names)]


def test_some_columns_are_read_alone(tmp_path):
    (tmp_path / "u.parquet").write_bytes(to_parquet(to_table(_refs(3), UNIT), row_group=2))
    assert read_parquet(str(tmp_path / "u.parquet"), ["uri", "size"]).column_names == ["uri", "size"]
    assert read_parquet(str(tmp_path / "u.parquet")).column_names == UNIT.names


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(NotFound, match=r"gone\.parquet"):
        read_parquet(str(tmp_path / "gone.parquet"))


@pytest.mark.parametrize("data", [b"", b"PAR1", b"<html>404</html>" * 9])
def test_what_is_not_parquet_is_refused_by_name(tmp_path, data):
    (tmp_path / "odd.parquet").write_bytes(data)
    with pytest.raises(FormatError, match=r"odd\.parquet cannot be read as Parquet"):
        read_parquet(str(tmp_path / "odd.parquet"))


def test_a_file_cut_short_is_refused(tmp_path):
    data = to_parquet(to_table(_refs(50), UNIT), row_group=20)
    for length in range(0, len(data), 37):
        (tmp_path / "cut.parquet").write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"cut\.parquet"):
            read_parquet(str(tmp_path / "cut.parquet"))


def test_damage_ends_in_a_format_error_and_nothing_else(tmp_path):
    """Pages have checksums; a flipped byte elsewhere may go unseen, but never raises what callers do not expect."""
    table = to_table(_refs(50), UNIT)
    data = to_parquet(table, row_group=20)
    refused = 0
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        (tmp_path / "bad.parquet").write_bytes(damaged)
        try:
            list(iter_rows([str(tmp_path / "bad.parquet")], ImageRef, UNIT))
        except FormatError:
            refused += 1
    assert refused > len(data) / 7 / 2


def test_a_flipped_bit_in_a_page_is_found(tmp_path):
    rows = [CatalogRow(f"/{n}", "e", None, "p", n, "embedded", None, n * 2**50) for n in range(50)]
    data = to_parquet(to_table(rows, CATALOG), row_group=50)
    (tmp_path / "c.parquet").write_bytes(data)
    column = pq.ParquetFile(tmp_path / "c.parquet").metadata.row_group(0).column(CATALOG.names.index("row"))
    start = column.dictionary_page_offset or column.data_page_offset
    damaged = bytearray(data)
    damaged[start + column.total_compressed_size - 1] ^= 1
    (tmp_path / "c.parquet").write_bytes(damaged)
    with pytest.raises(FormatError, match=r"c\.parquet cannot be read as Parquet.*(checksum|CRC)"):
        read_parquet(str(tmp_path / "c.parquet"))


def test_a_store_that_does_not_answer_is_not_called_damaged(monkeypatch):
    def late(_uri):
        raise TimedOut("no answer in time")

    monkeypatch.setattr(schema.storage, "open_binary", late)
    with pytest.raises(TimedOut):
        read_parquet("gs://bucket/a.parquet")
