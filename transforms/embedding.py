"""A work unit becomes a part: read, decode, embed, write."""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from serving import storage
from serving.embedder import Embedder, open_cached
from serving.errors import Changed, ImageRejected, NotFound, StorageError, TimedOut
from serving.images import Limits, load
from transforms.catalog import part_uri
from transforms.metrics import StageMetrics
from transforms.planning import read_unit
from transforms.progress import Heartbeat
from transforms.schema import EMBEDDED, REJECTED, UNREAD, ImageRef, Precision, part_schema, to_parquet

_ROW_GROUP = 512
_OUTAGE = 10
"""Fewer unread images than this are never taken for an outage."""


@dataclass(frozen=True, slots=True)
class EmbedSettings:
    """What a worker needs to know; crosses to it by pickling, so it holds names and numbers only."""

    store: str
    run_id: str
    fingerprint: str
    limits: Limits = field(default_factory=Limits)
    threads: int = 1
    precision: Precision = "float16"
    heartbeat: str | None = None


@dataclass(slots=True)
class Outcome:
    """What became of one image: its vector, or why there is none. Times in seconds."""

    vector: npt.NDArray[np.float32] | None = None
    reason: str | None = None
    message: str | None = None
    width: int | None = None
    height: int | None = None
    size: int | None = None
    content_hash: bytes | None = None
    unread: bool = False
    """The store did not give the bytes, for a reason that may pass."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """Return `embedded`, `rejected` or `unread`."""
        if self.reason is None:
            return EMBEDDED
        return UNREAD if self.unread else REJECTED


def read_image(ref: ImageRef, limits: Limits) -> bytes:
    """Read the very version that was listed, or raise `ImageRejected` or `StorageError`."""
    if ref.size > limits.max_bytes:
        raise ImageRejected("too_large", f"{ref.size:,} bytes; the limit is {limits.max_bytes:,}")
    return storage.read(ref.uri, etag=ref.etag or None)


def embed_image(ref: ImageRef, embedder: Embedder, limits: Limits, precision: Precision = "float16") -> Outcome:
    """Read, decode and embed one image; whatever is wrong with it ends up in the outcome."""
    outcome = Outcome()
    clock = _Clock(outcome.seconds)
    try:
        data = read_image(ref, limits)
        clock.lap("read")
        outcome.size, outcome.content_hash = len(data), hashlib.sha256(data).digest()
        picture = load(data, embedder.spec.input_size, limits)
        outcome.width, outcome.height = picture.width, picture.height
        clock.lap("decode")
        vector = embedder.embed(picture.pixels[np.newaxis])[0]
        clock.lap("infer")
        range_ = np.finfo(precision)
        if not range_.tiny <= np.abs(vector).max() <= range_.max:  # NaN fails every comparison
            raise ImageRejected("unreadable", f"the embedder gave a vector of zeros, or one {precision} cannot hold")
        outcome.vector = vector
    except ImageRejected as error:
        outcome.reason, outcome.message = error.reason, error.message
    except StorageError as error:
        outcome.reason, outcome.message = "timeout" if isinstance(error, TimedOut) else "unreadable", str(error)
        outcome.unread = not isinstance(error, NotFound | Changed)  # those have another etag next time, or none
    except MemoryError:
        outcome.reason, outcome.message = "too_large", "there is not the memory to read it"
    return outcome


def check_store(outcomes: list[Outcome]) -> None:
    """Raise `StorageError` when most of a unit could not be read: that is the store's trouble, not the images'."""
    unread = [outcome for outcome in outcomes if outcome.unread]
    if len(unread) >= _OUTAGE and 2 * len(unread) > len(outcomes):
        raise StorageError(
            f"{len(unread)} of {len(outcomes)} images of a unit could not be read, such as: {unread[0].message}; "
            "mend that and run again, finished units are kept"
        )


def part_table(refs: list[ImageRef], outcomes: list[Outcome], schema: pa.Schema) -> pa.Table:
    """Put a unit's outcomes into the columns of a part."""
    columns: dict[str, Any] = {name: [getattr(ref, name) for ref in refs] for name in ("uri", "etag", "updated")}
    columns["bytes"] = [outcome.size for outcome in outcomes]
    for name in ("width", "height", "content_hash", "status", "reason", "message"):
        columns[name] = [getattr(outcome, name) for outcome in outcomes]
    arrays = [pa.array(columns[field.name], field.type) for field in schema if field.name != "embedding"]
    vectors = _vector_column([outcome.vector for outcome in outcomes], schema.field("embedding").type)
    return pa.table([*arrays, vectors], schema)


def _vector_column(vectors: list[npt.NDArray[np.float32] | None], kind: pa.ListType) -> pa.Array:
    number = np.float16 if kind.value_type == pa.float16() else np.float32
    found = [vector.astype(number) for vector in vectors if vector is not None]
    flat = pa.array(np.concatenate([np.empty(0, number), *found]))
    missing = pa.array([vector is None for vector in vectors], pa.bool_())
    ends = np.cumsum([0 if vector is None else len(vector) for vector in vectors], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(np.append(np.int32(0), ends)), flat, type=kind, mask=missing)


class EmbedUnit(beam.DoFn):
    """Embed the unit of a name and write its part; a part that exists is a unit that is done."""

    def __init__(self, settings: EmbedSettings) -> None:
        self._settings = settings

    def setup(self) -> None:
        """Load the frozen embedder once a process."""
        settings = self._settings
        self._metrics = StageMetrics("embed")
        self._heartbeat = Heartbeat(settings.heartbeat)
        self._embedder = open_cached(storage.join(settings.store, "embedders", settings.fingerprint))
        self._schema = part_schema(settings.precision)
        # Each thread goes from bytes to vector by itself, with an interpreter of its own.
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="embed")

    def process(self, unit: str) -> Iterator[tuple[str, int, int]]:
        """Yield the unit's name, its images and its rejects."""
        settings = self._settings
        target = part_uri(settings.store, settings.fingerprint, unit)
        refs = read_unit(storage.join(settings.store, "runs", settings.run_id, "plan"), unit)
        if storage.exists(target):
            self._metrics.count("units_found_done")
            self._heartbeat.add(len(refs))
        else:
            outcomes = list(self._pool.map(self._embed, refs))
            check_store(outcomes)
            started = time.perf_counter()
            table = part_table(refs, outcomes, self._schema)
            dim = str(self._embedder.spec.dim)
            metadata = {"lookalike.embedder": settings.fingerprint, "lookalike.unit": unit, "lookalike.dim": dim}
            storage.create(target, to_parquet(table, row_group=_ROW_GROUP, metadata=metadata))
            self._count(outcomes, time.perf_counter() - started)
            yield unit, len(refs), sum(outcome.reason is not None for outcome in outcomes)
        self._heartbeat.flush()

    def teardown(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _embed(self, ref: ImageRef) -> Outcome:
        outcome = embed_image(ref, self._embedder, self._settings.limits, self._settings.precision)
        self._heartbeat.add(1, outcome.reason is not None)
        return outcome

    def _count(self, outcomes: list[Outcome], write_seconds: float) -> None:
        self._metrics.count("images", len(outcomes))
        self._metrics.count("bytes_read", sum(outcome.size or 0 for outcome in outcomes))
        for name, amount in Counter(outcome.reason or EMBEDDED for outcome in outcomes).items():
            self._metrics.count(name if name == EMBEDDED else f"rejected_{name}", amount)
        for step in ("read", "decode", "infer"):
            self._metrics.count(f"{step}_ms", round(1000 * sum(o.seconds.get(step, 0) for o in outcomes)))
        self._metrics.count("write_ms", round(1000 * write_seconds))
        self._metrics.observe("unit_images", len(outcomes))


@dataclass
class EmbedUnits(beam.PTransform):
    """Names of units → one record a unit embedded: name, images, rejects."""

    settings: EmbedSettings

    def expand(self, units: beam.PCollection) -> beam.PCollection:
        """Spread the names over the workers, then do everything heavy inside one call."""
        return units | "SpreadUnits" >> beam.Reshuffle() | "EmbedUnit" >> beam.ParDo(EmbedUnit(self.settings))


class _Clock:
    def __init__(self, laps: dict[str, float]) -> None:
        self._laps = laps
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now
