"""A part becomes a partial: the codes of its vectors under one trained quantizer, kept for every later merge."""

from collections.abc import Iterator
from dataclasses import dataclass

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from serving import storage
from serving.errors import ChecksumMismatch
from serving.quantizer import Quantizer
from transforms.metrics import StageMetrics
from transforms.progress import Heartbeat
from transforms.sampling import embeddings
from transforms.schema import EMBEDDED, open_parquet, partial_schema, to_parquet, uri_hash

TRAINED = "trained.faiss"
ENCODED_BY = "lookalike.quantizer"
_ROW_GROUP = 1024  # a shard reads those that reach into its range of hashes


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """What a worker needs to know."""

    store: str
    index: str
    quantizer: str
    heartbeat: str | None = None


def quantizer_folder(index: str, quantizer: str) -> str:
    """Return where a quantizer and its partials stand."""
    return storage.join(index, "encoded", quantizer)


def partial_uri(index: str, quantizer: str, part: str) -> str:
    """Return where the partial of the part named `part` (relative to its store) stands."""
    return storage.join(quantizer_folder(index, quantizer), storage.name_of(part))


def read_trained(index: str, quantizer: str) -> bytes:
    """Read the bytes of a trained quantizer; `ChecksumMismatch` unless they hash to its id."""
    uri = storage.join(quantizer_folder(index, quantizer), TRAINED)
    data = storage.read(uri)
    if not storage.sha256(data).startswith(quantizer):
        raise ChecksumMismatch(f"{uri} is damaged or another quantizer's; delete it and train again")
    return data


def load_quantizer(index: str, quantizer: str) -> Quantizer:
    """Load a trained quantizer by its id."""
    return Quantizer(read_trained(index, quantizer))


def encode_part(uri: str, quantizer: Quantizer) -> pa.Table:
    """Encode a part's embedded rows, one row group in memory at a time, and sort the codes by uri hash."""
    schema = partial_schema(quantizer.code_size, quantizer.refine_size, quantizer.raw_size)
    tables = []
    with open_parquet(uri) as file:
        first = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["uri", "status", "embedding"])
            tables.append(_encode_group(table, first, quantizer, uri))
            first += len(table)
    return pa.concat_tables([schema.empty_table(), *tables]).sort_by([("uri_hash", "ascending"), ("row", "ascending")])


def partial_bytes(table: pa.Table, quantizer: str) -> bytes:
    """Serialize a partial; its metadata name the quantizer that its codes are of."""
    return to_parquet(table, row_group=_ROW_GROUP, metadata={ENCODED_BY: quantizer})


def _encode_group(table: pa.Table, first: int, quantizer: Quantizer, uri: str) -> pa.Table:
    rows = np.flatnonzero(pc.equal(table["status"], EMBEDDED).to_numpy())
    table = table.take(pa.array(rows))
    codes = quantizer.encode(embeddings(table["embedding"], quantizer.dim, uri))
    columns = [
        pa.array([uri_hash(uri) for uri in table["uri"].to_pylist()], pa.uint64()),
        pa.array((rows + first).astype(np.int32)),
        *(_binary(codes_of) for codes_of in (codes.codes, codes.refine, codes.raw) if codes_of is not None),
    ]
    return pa.table(columns, partial_schema(quantizer.code_size, quantizer.refine_size, quantizer.raw_size))


def _binary(codes: np.ndarray) -> pa.Array:
    buffers = [None, pa.py_buffer(np.ascontiguousarray(codes))]
    return pa.Array.from_buffers(pa.binary(codes.shape[1]), len(codes), buffers)


class EncodePart(beam.DoFn):
    """Write the partial of the part of a name; a partial that exists is done."""

    def __init__(self, settings: EncodeSettings) -> None:
        self._settings = settings

    def setup(self) -> None:
        """Load the quantizer."""
        self._metrics = StageMetrics("encode")
        self._heartbeat = Heartbeat(self._settings.heartbeat)
        self._quantizer = load_quantizer(self._settings.index, self._settings.quantizer)

    def process(self, part: str) -> Iterator[tuple[str, int]]:
        """Yield the part's name and how many rows were encoded."""
        settings = self._settings
        target = partial_uri(settings.index, settings.quantizer, part)
        if not storage.exists(target):
            table = encode_part(storage.join(settings.store, part), self._quantizer)
            storage.create(target, partial_bytes(table, settings.quantizer))
            self._metrics.count("vectors", len(table))
            yield part, len(table)
        self._heartbeat.add(1)
        self._heartbeat.flush()


@dataclass
class EncodeParts(beam.PTransform):
    """Names of parts → one record a part encoded: name, vectors."""

    settings: EncodeSettings

    def expand(self, parts: beam.PCollection) -> beam.PCollection:
        """Spread the names over the workers."""
        return parts | "SpreadParts" >> beam.Reshuffle() | "EncodePart" >> beam.ParDo(EncodePart(self.settings))
