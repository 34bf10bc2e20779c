"""Live rows and partials become one index shard: inverted lists, re-rank codes, records."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from serving import records, storage
from serving.errors import FormatError
from serving.manifest import FileEntry, Shard
from serving.quantizer import Codes, Quantizer
from transforms.encoding import ENCODED_BY, load_quantizer, partial_uri
from transforms.metrics import StageMetrics
from transforms.progress import Heartbeat
from transforms.schema import EMBEDDED, hash_range, open_parquet, shard_buckets
from transforms.shards import ShardDocument, shard_document, shard_name


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """What a worker needs to know; `catalog` holds the URIs of the catalog's files."""

    index: str
    version: str
    quantizer: str
    shards: int
    catalog: tuple[str, ...]
    heartbeat: str | None = None

    @property
    def folder(self) -> str:
        """Return where the version's files go."""
        return storage.join(self.index, "versions", self.version)


def live_in(catalog: tuple[str, ...], low: int, high: int) -> pa.Table:
    """Read the embedded rows whose uri hash is in [low, high], sorted by that hash.

    Shards are ranges of hashes, so one row after the other over all shards is the same order however many there are:
    a row's number, and the order of every inverted list, do not depend on the number of shards.
    """
    tables = []
    for uri in catalog:
        with open_parquet(uri) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(
                    group, columns=["uri", "label", "etag", "part", "row", "status", "uri_hash"]
                )
                hashes = table["uri_hash"]
                inside = pc.and_(
                    pc.greater_equal(hashes, pa.scalar(low, pa.uint64())),
                    pc.less_equal(hashes, pa.scalar(high, pa.uint64())),
                )
                tables.append(table.filter(pc.and_(inside, pc.equal(table["status"], EMBEDDED))))
    return pa.concat_tables(tables).sort_by([("uri_hash", "ascending"), ("uri", "ascending")])


def gather_codes(live: pa.Table, settings: MergeSettings, quantizer: Quantizer, low: int, high: int) -> Codes:
    """Fetch the codes of live rows from the partials of their parts, in the order of the rows."""
    sizes = {"code": quantizer.code_size, "refine": quantizer.refine_size, "raw": quantizer.raw_size}
    gathered = {name: np.zeros((len(live), size), np.uint8) for name, size in sizes.items() if size}
    parts = live["part"].combine_chunks().dictionary_encode()
    indices, rows = parts.indices.to_numpy(), live["row"].to_numpy()
    order = np.lexsort((rows, indices))
    bounds = np.searchsorted(indices[order], np.arange(len(parts.dictionary) + 1))
    for number, part in enumerate(parts.dictionary.to_pylist()):
        places = order[bounds[number] : bounds[number + 1]]
        uri = partial_uri(settings.index, settings.quantizer, f"{part}.parquet")
        partial = _read_range(uri, quantizer.id, low, high)
        found = _positions(partial["row"].to_numpy(), rows[places], uri)
        for name, codes in gathered.items():
            codes[places] = _fixed(partial[name], sizes[name])[found]
    return Codes(gathered["code"], gathered.get("refine"), gathered.get("raw"))


def _positions(have: npt.NDArray[Any], want: npt.NDArray[Any], uri: str) -> npt.NDArray[np.int64]:
    order = np.argsort(have)
    found = np.searchsorted(have[order], want)
    if len(want) and (not len(have) or (have[order][np.minimum(found, len(have) - 1)] != want).any()):
        raise FormatError(f"{uri} lacks rows that the catalog names; delete it and build again")
    return order[found]


def _read_range(uri: str, quantizer: str, low: int, high: int) -> pa.Table:
    """Read the row groups of a partial (sorted by uri hash) that reach into [low, high]."""
    with open_parquet(uri) as file:
        told = (file.schema_arrow.metadata or {}).get(ENCODED_BY.encode(), quantizer.encode())  # early ones do not tell
        if told != quantizer.encode():
            raise FormatError(
                f"{uri} holds codes of the quantizer {told.decode(errors='replace')}, not {quantizer}; "
                "delete it and build again"
            )
        wanted = []
        for group in range(file.num_row_groups):
            statistics = file.metadata.row_group(group).column(0).statistics
            if statistics is None or not statistics.has_min_max or (statistics.max >= low and statistics.min <= high):
                wanted.append(group)
        return file.read_row_groups(wanted)


def _fixed(column: pa.ChunkedArray, width: int) -> npt.NDArray[np.uint8]:
    array = column.combine_chunks()
    data = np.frombuffer(array.buffers()[1] or b"", np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


def build_lists(quantizer: Quantizer, codes: npt.NDArray[np.uint8]) -> bytes:
    """Put codes into inverted lists, row after row, under ids from 0; the coarse quantizer stays out of the file."""
    lists = quantizer.empty_lists()
    if len(codes):
        lists.add_sa_codes(codes, np.arange(len(codes), dtype=np.int64))
    coarse, nothing = lists.quantizer, faiss.IndexFlatIP(lists.d)
    lists.own_fields, lists.quantizer = False, nothing
    data = bytes(faiss.serialize_index(lists))
    lists.quantizer, lists.own_fields = coarse, True
    return data


def build_store(empty: Any, codes: npt.NDArray[np.uint8]) -> bytes:
    """Store codes in row order in a FAISS index that has none, such as `Quantizer.empty_refine`."""
    if len(codes):
        empty.add_sa_codes(codes)
    return bytes(faiss.serialize_index(empty))


def merge_shard(number: int, settings: MergeSettings, quantizer: Quantizer) -> Shard:
    """Build and write one shard; its bytes depend on the live rows and the quantizer alone."""
    buckets = shard_buckets(number, settings.shards)
    low, high = hash_range(buckets)
    live = live_in(settings.catalog, low, high)
    codes = gather_codes(live, settings, quantizer, low, high)

    def write(kind: str, ending: str, data: bytes) -> FileEntry:
        name = shard_name(kind, number, settings.shards, ending)
        uri = storage.join(settings.folder, name)
        if not storage.create(uri, data):
            data = storage.read(uri)  # an attempt cut short left it, maybe with other versions of the libraries
        return FileEntry.of(name, data)

    def write_store(kind: str, empty: Any, stored: npt.NDArray[np.uint8] | None) -> FileEntry | None:
        return None if stored is None else write(kind, "faiss", build_store(empty, stored))

    shard = Shard(
        number=number,
        buckets=buckets,
        rows=len(live),
        lists=write("shard", "faiss", build_lists(quantizer, codes.codes)),
        refine=write_store("refine", quantizer.empty_refine(), codes.refine),
        raw=write_store("raw", quantizer.empty_raw(), codes.raw),
        records=write("records", "arrow", records.to_bytes(live.select(records.SCHEMA.names))),
    )
    storage.create(shard_document(settings.folder, number, settings.shards), ShardDocument(shard).to_json())
    return shard


class MergeShard(beam.DoFn):
    """Build the shard of a number; one that says it is finished is done."""

    def __init__(self, settings: MergeSettings) -> None:
        self._settings = settings

    def setup(self) -> None:
        """Load the quantizer."""
        self._metrics = StageMetrics("merge")
        self._heartbeat = Heartbeat(self._settings.heartbeat)
        self._quantizer = load_quantizer(self._settings.index, self._settings.quantizer)

    def process(self, number: int) -> Iterator[tuple[int, int]]:
        """Yield the shard's number and rows."""
        settings = self._settings
        if not storage.exists(shard_document(settings.folder, number, settings.shards)):
            shard = merge_shard(number, settings, self._quantizer)
            self._metrics.count("rows", shard.rows)
            yield number, shard.rows
        self._heartbeat.add(1)
        self._heartbeat.flush()


@dataclass
class MergeShards(beam.PTransform):
    """Numbers of shards → one record a shard built: number, rows."""

    settings: MergeSettings

    def expand(self, numbers: beam.PCollection) -> beam.PCollection:
        """Spread the numbers over the workers, one task a shard."""
        return numbers | "SpreadShards" >> beam.Reshuffle() | "MergeShard" >> beam.ParDo(MergeShard(self.settings))
