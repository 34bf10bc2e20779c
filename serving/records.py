"""Row number ↔ uri, label, etag: one Arrow file per shard, sorted by uri."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from serving.errors import FormatError

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("label", pa.dictionary(pa.int32(), pa.string())),
        pa.field("etag", pa.string(), nullable=False),
    ]
)


class Record(NamedTuple):
    """One row of an index."""

    uri: str
    label: str | None
    etag: str


class Records:
    """The records of some shards, one after the other; rows count from 0 over all of them."""

    def __init__(self, shards: Sequence[pa.Table]) -> None:
        self._shards = [[shard.column(name) for name in SCHEMA.names] for shard in shards]
        self._starts: list[int] = []
        self._count = 0
        for shard in shards:
            self._starts.append(self._count)
            self._count += len(shard)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < self._count:
            raise IndexError(f"row {row} of {self._count}")
        # An empty shard starts where the next one does: the rightmost start is the shard that holds the row.
        shard = bisect.bisect_right(self._starts, row) - 1
        uri, label, etag = (column[row - self._starts[shard]].as_py() for column in self._shards[shard])
        return Record(uri, label, etag)


def to_bytes(table: pa.Table) -> bytes:
    """Serialize records as one Arrow file of one batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table.cast(SCHEMA).combine_chunks().unify_dictionaries())
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def from_buffer(source: bytes | pa.Buffer, uri: str) -> pa.Table:
    """Read what `to_bytes` wrote, without copying."""
    try:
        table = pa.ipc.open_file(pa.py_buffer(source) if isinstance(source, bytes) else source).read_all()
        if table.schema != SCHEMA:
            raise FormatError(f"{uri} holds the columns {_columns(table.schema)}, not {_columns(SCHEMA)}")
    except (pa.ArrowException, OSError, ValueError) as error:  # a damaged schema can be anything
        raise FormatError(f"{uri} cannot be read as records: {error}") from None
    return table


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
