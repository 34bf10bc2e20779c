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
from serving.quantizer import Quantizer
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
    """Read the embedded rows whose uri hash is in [low, high], in the catalog's order: sorted by uri."""
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
    return pa.concat_tables(tables)


def gather_codes(
    live: pa.Table, settings: MergeSettings, quantizer: Quantizer, low: int, high: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Fetch the codes of live rows from the partials of their parts, in the order of the rows."""
    codes = np.zeros((len(live), quantizer.code_size), np.uint8)
    refine = np.zeros((len(live), quantizer.refine_size), np.uint8)
    parts = live["part"].combine_chunks().dictionary_encode()
    indices, rows = parts.indices.to_numpy(), live["row"].to_numpy()
    order = np.lexsort((rows, indices))
    bounds = np.searchsorted(indices[order], np.arange(len(parts.dictionary) + 1))
    for number, part in enumerate(parts.dictionary.to_pylist()):
        places = order[bounds[number] : bounds[number + 1]]
        uri = partial_uri(settings.index, settings.quantizer, f"{part}.parquet")
        partial = _read_range(uri, quantizer.id, low, high)
        found = _positions(partial["row"].to_numpy(), rows[places], uri)
        codes[places] = _fixed(partial["code"], quantizer.code_size)[found]
        if quantizer.refine_size:
            refine[places] = _fixed(partial["refine"], quantizer.refine_size)[found]
    return codes, refine


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


def build_refine(quantizer: Quantizer, refine: npt.NDArray[np.uint8]) -> bytes:
    """Store re-rank codes in row order."""
    store = quantizer.empty_refine()
    if len(refine):
        store.add_sa_codes(refine)
    return bytes(faiss.serialize_index(store))


def merge_shard(number: int, settings: MergeSettings, quantizer: Quantizer) -> Shard:
    """Build and write one shard; its bytes depend on the live rows and the quantizer alone."""
    buckets = shard_buckets(number, settings.shards)
    low, high = hash_range(buckets)
    live = live_in(settings.catalog, low, high)
    codes, refine = gather_codes(live, settings, quantizer, low, high)

    def write(kind: str, ending: str, data: bytes) -> FileEntry:
        name = shard_name(kind, number, settings.shards, ending)
        uri = storage.join(settings.folder, name)
        if not storage.create(uri, data):
            data = storage.read(uri)  # an attempt cut short left it, maybe with other versions of the libraries
        return FileEntry.of(name, data)

    shard = Shard(
        number=number,
        buckets=buckets,
        rows=len(live),
        lists=write("shard", "faiss", build_lists(quantizer, codes)),
        refine=write("refine", "faiss", build_refine(quantizer, refine)) if quantizer.refine_size else None,
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
