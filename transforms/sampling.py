"""Deterministic samples of a store's live rows, and their vectors."""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from serving import storage
from serving.errors import FormatError
from serving.manifest import RunManifest
from transforms.catalog import catalog_files, part_name
from transforms.schema import CATALOG, EMBEDDED, CatalogRow, open_parquet, to_table


@dataclass(frozen=True, slots=True)
class LiveRows:
    """Embedded rows of a catalog, as columns: `uri`, `label`, `part`, `row`, `uri_hash`."""

    store: str
    fingerprint: str
    dim: int
    table: pa.Table

    def __len__(self) -> int:
        return len(self.table)

    def take(self, rows: npt.NDArray[np.int64]) -> "LiveRows":
        """Return some rows, in the order asked."""
        return LiveRows(self.store, self.fingerprint, self.dim, self.table.take(pa.array(rows)))

    def without(self, rows: "LiveRows") -> "LiveRows":
        """Return all rows but those, which are told by their uris."""
        kept = pc.invert(pc.is_in(self.table["uri"], value_set=rows.table["uri"].combine_chunks()))
        return LiveRows(self.store, self.fingerprint, self.dim, self.table.filter(kept))

    def column(self, name: str) -> list[str | None]:
        """Return a column as Python values."""
        values: list[str | None] = self.table[name].to_pylist()
        return values

    def vectors(self, seen: Callable[[int], None] | None = None) -> npt.NDArray[np.float32]:
        """Read the rows' raw vectors, float32 `[N, dim]`; `seen` is told how many there are so far."""
        vectors = np.empty((len(self), self.dim), np.float32)
        done = 0
        for places, found in self.chunks():
            vectors[places] = found
            done += len(places)
            if seen is not None:
                seen(done)
        return vectors

    def chunks(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """Stream the vectors row group by row group: places in this table, and their vectors."""
        parts = self.table["part"].combine_chunks().dictionary_encode()
        codes, rows = parts.indices.to_numpy(), self.table["row"].to_numpy()
        order = np.lexsort((rows, codes))
        bounds = np.searchsorted(codes[order], np.arange(len(parts.dictionary) + 1))
        for code, name in enumerate(parts.dictionary.to_pylist()):
            places = order[bounds[code] : bounds[code + 1]]
            uri = storage.join(self.store, part_name(self.fingerprint, name))
            yield from _part_chunks(uri, places, rows[places], self.dim)


def live_rows(store: str, run: RunManifest, columns: Sequence[str] = ("uri", "label", "part", "row")) -> LiveRows:
    """Read the embedded rows of a run's catalog."""
    tables = []
    for uri in catalog_files(store, run):
        with open_parquet(uri) as file:
            table = file.read(columns=[*columns, "status"])
        tables.append(table.filter(pc.equal(table["status"], EMBEDDED)).drop(["status"]))
    return LiveRows(store, run.embedder.fingerprint, run.dim, pa.concat_tables(tables))


def sample(rows: LiveRows, size: int, salt: int) -> LiveRows:
    """Take the `size` rows whose salted uri hashes are smallest: the same ones however units were cut."""
    mixed = _mix(rows.table["uri_hash"].to_numpy() ^ np.uint64(salt))
    chosen = np.argsort(mixed, kind="stable")[:size]
    return rows.take(chosen.astype(np.int64))


def sample_stream(store: str, run: RunManifest, rows: Iterable[CatalogRow], size: int, salt: int) -> LiveRows:
    """Take from embedded rows of a run's catalog those that `sample` would, holding no more than `size` of them."""

    def place(row: CatalogRow) -> int:
        return int(_mix(np.array([row.uri_hash ^ salt], np.uint64))[0])

    chosen = heapq.nsmallest(size, rows, key=place)
    return LiveRows(store, run.embedder.fingerprint, run.dim, to_table(chosen, CATALOG))


def embeddings(column: pa.ChunkedArray | pa.Array, dim: int, uri: str) -> npt.NDArray[np.float32]:
    """Turn an embedding column of the part `uri`, without nulls, into float32 `[N, dim]`."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat: npt.NDArray[np.float32] = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    if flat.size != len(array) * dim:
        raise FormatError(f"{uri} lacks vectors, or they are not of {dim} dimensions; restore it")
    return flat.reshape(-1, dim)


def _part_chunks(
    uri: str, places: npt.NDArray[np.int64], rows: npt.NDArray[np.int32], dim: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Read the row groups of a part that hold any of `rows` (sorted)."""
    with open_parquet(uri) as file:
        first = 0
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            inside = slice(*np.searchsorted(rows, [first, last]))
            if inside.start < inside.stop:
                column = file.read_row_group(group, columns=["embedding"])["embedding"]
                wanted = column.take(pa.array(rows[inside] - first))
                yield places[inside], embeddings(wanted, dim, uri)
            first = last
    if len(rows) and rows[-1] >= first:
        raise FormatError(f"{uri} has {first} rows, the catalog names row {rows[-1]}; restore it")


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit values one to one (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
