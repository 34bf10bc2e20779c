"""Row number ↔ uri, label, etag: one Arrow file per shard, sorted by the uri's hash."""

import bisect
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
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


class _Strings:
    """A string column read without Arrow's scalars, which cost microseconds each."""

    def __init__(self, column: pa.Array) -> None:
        _, offsets, data = column.buffers()
        self.first = column.offset
        self.offsets = memoryview(offsets).cast("i") if offsets else memoryview(b"")
        self.data = memoryview(data) if data else memoryview(b"")

    def __getitem__(self, row: int) -> str:
        at = self.first + row
        return str(self.data[self.offsets[at] : self.offsets[at + 1]], "utf-8")


class _Labels:
    """A dictionary column; its dictionary is decoded once."""

    def __init__(self, column: pa.DictionaryArray) -> None:
        self.names: list[str | None] = [*column.dictionary.to_pylist(), None]
        # The last name, None, stands for the missing. Where all are, filling them in would take memory to say nothing.
        labelled = column.null_count < len(column)
        codes: Any = column.indices.fill_null(-1).to_numpy() if labelled else np.broadcast_to(np.int32(-1), len(column))
        self.codes = memoryview(codes)

    def __getitem__(self, row: int) -> str | None:
        return self.names[self.codes[row]]

    def among(self, labels: Collection[str]) -> npt.NDArray[np.bool_]:
        """Tell of each row whether its label is one of these."""
        wanted = np.array([name is not None and name in labels for name in self.names])
        found: npt.NDArray[np.bool_] = wanted[np.asarray(self.codes)]
        return found


class Records:
    """The records of some shards, one after the other; rows count from 0 over all of them."""

    def __init__(self, shards: Sequence[pa.Table]) -> None:
        self._shards: list[tuple[_Strings, _Labels, _Strings]] = []
        self._starts: list[int] = []
        self._spans: list[tuple[int, memoryview, memoryview, list[str | None], memoryview]] = []
        self._count = 0
        for shard in shards:
            uri, label, etag = (_one_chunk(shard.column(name)) for name in SCHEMA.names)
            uris, labels = _Strings(uri), _Labels(label)
            self._shards.append((uris, labels, _Strings(etag)))
            self._spans.append((uris.first, uris.offsets, uris.data, labels.names, labels.codes))
            self._starts.append(self._count)
            self._count += len(shard)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < self._count:
            raise IndexError(f"row {row} of {self._count}")
        # An empty shard starts where the next one does: the rightmost start is the shard that holds the row.
        shard = bisect.bisect_right(self._starts, row) - 1
        local = row - self._starts[shard]
        uri, label, etag = self._shards[shard]
        return Record(uri[local], label[local], etag[local])

    def uris_and_labels(self, rows: Sequence[int]) -> list[tuple[str, str | None]]:
        """Return what a search answers with; `rows` must be rows there are."""
        found = []
        starts, spans, find = self._starts, self._spans, bisect.bisect_right
        for row in rows:  # the columns' own item access would cost a call each, twice what it does
            shard = find(starts, row) - 1
            row -= starts[shard]
            first, offsets, data, names, codes = spans[shard]
            at = first + row
            found.append((str(data[offsets[at] : offsets[at + 1]], "utf-8"), names[codes[row]]))
        return found

    def labelled(self, labels: Collection[str]) -> npt.NDArray[np.int64]:
        """Return the rows of these labels, sorted."""
        found = [
            np.flatnonzero(label.among(labels)) + start
            for (_, label, _), start in zip(self._shards, self._starts, strict=True)
        ]
        return np.concatenate([np.empty(0, np.int64), *found])


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    # Combining copies even where there is nothing to combine, and so reads what is only mapped.
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


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
