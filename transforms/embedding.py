"""A work unit becomes a part: read, decode, embed, write."""

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from serving import storage
from serving.embedder import Embedder
from serving.errors import Changed, ImageRejected, NotFound, StorageError, TimedOut
from serving.images import Limits, load
from transforms.catalog import part_uri
from transforms.engines import AUTO, open_cached
from transforms.metrics import StageMetrics
from transforms.planning import read_unit
from transforms.progress import Heartbeat
from transforms.reading import Ahead, Read, Reading
from transforms.schema import EMBEDDED, REJECTED, UNREAD, ImageRef, VectorType, part_schema, to_parquet

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
    ahead: Ahead = field(default_factory=Ahead)
    engine: str = AUTO
    vector_type: VectorType = "float16"
    heartbeat: str | None = None


@dataclass(slots=True)
class Outcome:
    """What became of one image: its vector, or why there is none."""

    vector: npt.NDArray[np.float32] | None = None
    reason: str | None = None
    message: str | None = None
    width: int | None = None
    height: int | None = None
    size: int | None = None
    content_hash: bytes | None = None
    unread: bool = False
    """The store did not give the bytes, for a reason that may pass."""

    @property
    def status(self) -> str:
        """Return `embedded`, `rejected` or `unread`."""
        if self.reason is None:
            return EMBEDDED
        return UNREAD if self.unread else REJECTED


def prepare(read: Read, size: tuple[int, int], limits: Limits) -> tuple[Outcome, npt.NDArray[np.uint8] | None]:
    """Decode an image that was read; what is wrong with it ends up in the outcome, beside no pixels."""
    outcome = Outcome()
    try:
        if read.error is not None:
            raise read.error
        assert read.data is not None  # or there is an error
        outcome.size, outcome.content_hash = len(read.data), hashlib.sha256(read.data).digest()
        picture = load(read.data, size, limits)
        outcome.width, outcome.height = picture.width, picture.height
        return outcome, picture.pixels
    except ImageRejected as error:
        outcome.reason, outcome.message = error.reason, error.message
    except StorageError as error:
        outcome.reason, outcome.message = "timeout" if isinstance(error, TimedOut) else "unreadable", str(error)
        outcome.unread = not isinstance(error, NotFound | Changed)  # those have another etag next time, or none
    except MemoryError:
        outcome.reason, outcome.message = "too_large", "there is not the memory to read it"
    return outcome, None


def fill(outcome: Outcome, vector: npt.NDArray[np.float32], vector_type: VectorType) -> None:
    """Put its vector into an outcome, unless it says nothing or cannot be kept."""
    range_ = np.finfo(vector_type)
    if range_.tiny <= np.abs(vector).max() <= range_.max:  # NaN fails every comparison
        outcome.vector = vector
    else:
        outcome.reason = "unreadable"
        outcome.message = f"the embedder gave a vector of zeros, or one {vector_type} cannot hold"


class Clock:
    """How often a thread did something, and the seconds it took."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.laps: Counter[str] = Counter()
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self.laps[name] += 1
        self._last = now


def embed_some(
    reads: Sequence[Read], embedder: Embedder, limits: Limits, vector_type: VectorType, clock: Clock
) -> list[Outcome]:
    """Decode some images and embed them at once."""
    prepared = [prepare(read, embedder.spec.input_size, limits) for read in reads]
    clock.lap("decode")
    pixels = [pixels for _, pixels in prepared if pixels is not None]
    if pixels:
        vectors = embedder.embed(pixels[0][np.newaxis] if len(pixels) == 1 else np.stack(pixels))
        good = [outcome for outcome, pixels in prepared if pixels is not None]
        for outcome, vector in zip(good, vectors, strict=True):
            fill(outcome, vector, vector_type)
    clock.lap("infer")
    return [outcome for outcome, _ in prepared]


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
        self._embedder = open_cached(storage.join(settings.store, "embedders", settings.fingerprint), settings.engine)
        self._schema = part_schema(settings.vector_type)
        self._readers = ThreadPoolExecutor(settings.ahead.images, thread_name_prefix="read")
        # Each thread goes from bytes to vector by itself: no pixels change hands.
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
            outcomes = self._embed(refs)
            check_store(outcomes)
            started = time.perf_counter()
            table = part_table(refs, outcomes, self._schema)
            dim = str(self._embedder.spec.dim)
            metadata = {"lookalike.embedder": settings.fingerprint, "lookalike.unit": unit, "lookalike.dim": dim}
            storage.create(target, to_parquet(table, row_group=_ROW_GROUP, metadata=metadata))
            self._count_ms("write", time.perf_counter() - started)
            self._count(outcomes)
            yield unit, len(refs), sum(outcome.reason is not None for outcome in outcomes)
        self._heartbeat.flush()

    def teardown(self) -> None:
        """End the threads; none of them works unless the run was interrupted, and then nobody waits for it."""
        for pool in (self._readers, self._pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def _embed(self, refs: Sequence[ImageRef]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(refs)
        reading = Reading(refs, self._settings.limits, self._readers, self._settings.ahead)
        try:
            threads = [self._pool.submit(self._work, reading, outcomes) for _ in range(self._settings.threads)]
            wait(threads, return_when=FIRST_EXCEPTION)
        finally:
            reading.stop()
        clocks = [thread.result() for thread in threads]
        self._metrics.count("batches", sum(clock.laps["infer"] for clock in clocks))
        self._count_ms("read", reading.seconds)
        for step in ("wait", "decode", "infer"):
            self._count_ms(step, sum(clock.seconds[step] for clock in clocks))
        return [outcome for outcome in outcomes if outcome is not None]

    def _work(self, reading: Reading, outcomes: list[Outcome | None]) -> Clock:
        """Embed images until none is left; tell where this thread's time went."""
        settings, clock = self._settings, Clock()
        while reads := self._take(reading):
            clock.lap("wait")
            done = embed_some(reads, self._embedder, settings.limits, settings.vector_type, clock)
            for read, outcome in zip(reads, done, strict=True):
                outcomes[read.place] = outcome
            self._heartbeat.add(len(done), sum(outcome.reason is not None for outcome in done))
        clock.lap("wait")
        return clock

    def _take(self, reading: Reading) -> list[Read]:
        reads: list[Read] = []
        while len(reads) < self._embedder.batch and (read := reading.take()) is not None:
            reads.append(read)
        return reads

    def _count(self, outcomes: list[Outcome]) -> None:
        self._metrics.count("images", len(outcomes))
        self._metrics.count(f"images_by_{self._embedder.engine}", len(outcomes))
        self._metrics.count("bytes_read", sum(outcome.size or 0 for outcome in outcomes))
        for name, amount in Counter(outcome.reason or EMBEDDED for outcome in outcomes).items():
            self._metrics.count(name if name == EMBEDDED else f"rejected_{name}", amount)
        self._metrics.observe("unit_images", len(outcomes))

    def _count_ms(self, step: str, seconds: float) -> None:
        self._metrics.count(f"{step}_ms", round(1000 * seconds))


@dataclass
class EmbedUnits(beam.PTransform):
    """Names of units → one record a unit embedded: name, images, rejects."""

    settings: EmbedSettings

    def expand(self, units: beam.PCollection) -> beam.PCollection:
        """Spread the names over the workers, then do everything heavy inside one call."""
        return units | "SpreadUnits" >> beam.Reshuffle() | "EmbedUnit" >> beam.ParDo(EmbedUnit(self.settings))
