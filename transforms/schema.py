"""Arrow schemas of what the batch side writes, and how a uri hashes."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from serving import storage
from serving.errors import FormatError, LookalikeError

BUCKETS = 1024
"""Virtual buckets of hash(uri); an index shard is a range of them."""

EMBEDDED = "embedded"
REJECTED = "rejected"
UNREAD = "unread"
"""Rejected because the store did not give the bytes: the next run tries again, while `rejected` waits for new bytes."""

VectorType = Literal["float16", "float32"]

_TIME = pa.timestamp("us", tz="UTC")

UNIT = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("updated", _TIME),
        pa.field("label", pa.string()),
    ]
)

CATALOG = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("part", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("uri_hash", pa.uint64(), nullable=False),
    ]
)


class ImageRef(NamedTuple):
    """One listed image; `updated` in microseconds since 1970, UTC. The columns of `UNIT`."""

    uri: str
    etag: str
    size: int
    updated: int
    label: str | None


class CatalogRow(NamedTuple):
    """One live image of the store and where its embedding, or its rejection, stands. The columns of `CATALOG`."""

    uri: str
    etag: str
    label: str | None
    part: str
    row: int
    status: str
    reason: str | None
    uri_hash: int


def part_schema(vector_type: VectorType) -> pa.Schema:
    """Return the schema of a part: one row an image, `embedding` null where it was rejected.

    A plain list, not one of fixed size: Arrow before 26 writes nulls among lists of fixed size and then cannot read
    them (https://github.com/apache/arrow/issues/35692). The bytes in Parquet are the same.
    """
    number = {"float16": pa.float16(), "float32": pa.float32()}[vector_type]
    return pa.schema(
        [
            pa.field("uri", pa.string(), nullable=False),
            pa.field("etag", pa.string(), nullable=False),
            pa.field("updated", _TIME),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("bytes", pa.int64()),
            pa.field("content_hash", pa.binary(32)),
            pa.field("status", pa.string(), nullable=False),
            pa.field("reason", pa.string()),
            pa.field("message", pa.string()),
            pa.field("embedding", pa.list_(pa.field("element", number, nullable=False))),
        ]
    )


def partial_schema(code_size: int, refine_size: int, raw_size: int = 0) -> pa.Schema:
    """Return the schema of a partial: the codes of one part's embedded rows, sorted by `uri_hash`."""
    fields = [
        pa.field("uri_hash", pa.uint64(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("code", pa.binary(code_size), nullable=False),
    ]
    if refine_size:
        fields.append(pa.field("refine", pa.binary(refine_size), nullable=False))
    if raw_size:
        fields.append(pa.field("raw", pa.binary(raw_size), nullable=False))
    return pa.schema(fields)


def uri_hash(uri: str) -> int:
    """Hash a uri to 64 bits, the same on every machine; its top 10 bits are the bucket."""
    return int.from_bytes(hashlib.blake2b(uri.encode(), digest_size=8).digest(), "big")


def hash_range(buckets: tuple[int, int]) -> tuple[int, int]:
    """Return the lowest and the highest uri hash in the buckets [first, last)."""
    width = 64 - (BUCKETS - 1).bit_length()
    return buckets[0] << width, (buckets[1] << width) - 1


def shard_buckets(number: int, shards: int) -> tuple[int, int]:
    """Return the buckets [first, last) of one of `shards` shards."""
    return number * BUCKETS // shards, (number + 1) * BUCKETS // shards


def to_table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    """Turn rows into a table column by column."""
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)


def to_parquet(table: pa.Table, *, row_group: int, metadata: dict[str, str] | None = None) -> bytes:
    """Serialize to zstd-compressed Parquet with `row_group` rows a group and a checksum a page."""
    sink = io.BytesIO()
    if metadata:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
    pq.write_table(
        table, sink, compression="zstd", row_group_size=row_group, write_statistics=True, write_page_checksum=True
    )
    return sink.getvalue()


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for partial reads; damage met on the way is a `FormatError`."""
    try:
        with storage.open_binary(uri) as source:
            yield pq.ParquetFile(source, page_checksum_verification=True)
    except LookalikeError:
        raise  # a store that does not answer in time is an OSError too, and no damage
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # most damage is an OSError to Arrow
        line, *_ = str(error).partition("\n")
        raise FormatError(f"{uri} cannot be read as Parquet: {line}") from None


def read_parquet(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file, or some of its columns."""
    with open_parquet(uri) as file:
        return file.read(columns=None if columns is None else list(columns))


def iter_rows(uris: Iterable[str], kind: type[Any], schema: pa.Schema) -> Iterator[Any]:
    """Stream the rows of several files as `kind`, one batch in memory at a time."""
    for uri in uris:
        with open_parquet(uri) as file:
            for batch in file.iter_batches(batch_size=8192, columns=schema.names):
                yield from map(kind._make, zip(*(_plain(column) for column in batch.columns), strict=True))


def _plain(column: pa.Array) -> list[Any]:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    values: list[Any] = column.to_pylist()
    return values
