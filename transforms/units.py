"""A work unit becomes a part: read, decode, embed, write, all of it overlapping."""

import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import apache_beam as beam
import numpy as np
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.windowed_value import WindowedValue

from serving import storage
from serving.images import Limits
from transforms.catalog import part_uri
from transforms.embedding import Clock, Outcome, check_store, embed_some, part_table
from transforms.engines import AUTO, open_cached
from transforms.metrics import StageMetrics
from transforms.planning import read_unit
from transforms.progress import Heartbeat
from transforms.reading import Ahead, Read, Reading
from transforms.schema import EMBEDDED, ImageRef, VectorType, part_schema, to_parquet

_ROW_GROUP = 512
_GROUP = 16
"""Images that a thread decodes before it embeds them: in turns of one, each finds its data driven from the caches."""
Record = tuple[str, int, int]
"""A unit's name, its images and its rejects."""


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


@dataclass(frozen=True, slots=True)
class _Work:
    """A unit under way."""

    unit: str
    refs: list[ImageRef]
    reading: Reading
    outcomes: dict[int, Outcome]
    """By the image's place in the unit."""
    threads: list[Future[Clock]]
    written: Future[float]
    """Done when its part is; the seconds that writing it took."""


class EmbedUnit(beam.DoFn):
    """Embed the unit of a name and write its part; a part that exists is a unit that is done.

    While the last images of a unit are embedded and its part is written, the next unit is being read and begun: a
    record comes out with the unit after its own, or when the bundle ends.
    """

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
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._under_way: deque[_Work] = deque()

    def start_bundle(self) -> None:
        """Forget what a failed bundle left."""
        self._stop()

    def process(self, unit: str) -> Iterator[Record]:
        """Begin a unit, and yield the record of the one before."""
        settings = self._settings
        refs = read_unit(storage.join(settings.store, "runs", settings.run_id, "plan"), unit)
        if storage.exists(part_uri(settings.store, settings.fingerprint, unit)):
            self._metrics.count("units_found_done")
            self._heartbeat.add(len(refs))
            self._heartbeat.flush()
            return
        self._under_way.append(self._begin(unit, refs))
        if len(self._under_way) > 1:
            yield self._finish()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Yield the records of the units that are under way."""
        while self._under_way:
            yield GlobalWindows.windowed_value(self._finish())

    def teardown(self) -> None:
        """End the threads; none of them works unless the run was interrupted, and then nobody waits for it."""
        self._stop()
        for pool in (self._readers, self._pool, self._writer):
            pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, unit: str, refs: list[ImageRef]) -> _Work:
        reading = Reading(refs, self._settings.limits, self._readers, self._settings.ahead)
        outcomes: dict[int, Outcome] = {}
        # The pool is first come, first served: a thread that finds its unit's images all taken goes on to the next's.
        threads = [self._pool.submit(self._embed, reading, outcomes) for _ in range(self._settings.threads)]
        written = self._writer.submit(self._write, unit, refs, reading, outcomes, threads)
        return _Work(unit, refs, reading, outcomes, threads, written)

    def _finish(self) -> Record:
        """Wait for the oldest unit and count what it took; Beam's counters belong to its own thread."""
        work = self._under_way.popleft()
        try:
            written = work.written.result()
        except BaseException:
            work.reading.stop()
            self._stop()
            raise
        clocks = [thread.result() for thread in work.threads]
        outcomes = list(work.outcomes.values())
        self._count(outcomes)
        self._metrics.count("batches", sum(clock.laps["infer"] for clock in clocks))
        seconds = {step: sum(clock.seconds[step] for clock in clocks) for step in ("wait", "decode", "infer")}
        for step, spent in (seconds | {"read": work.reading.seconds, "write": written}).items():
            self._metrics.count(f"{step}_ms", round(1000 * spent))
        self._heartbeat.flush()
        return work.unit, len(work.refs), sum(outcome.reason is not None for outcome in outcomes)

    def _embed(self, reading: Reading, outcomes: dict[int, Outcome]) -> Clock:
        """Embed images until all are taken; tell where this thread's time went."""
        settings, clock = self._settings, Clock()
        room = np.empty((max(_GROUP, self._embedder.batch), *self._embedder.spec.input_size, 3), np.uint8)
        while reads := self._take(reading):
            clock.lap("wait")
            done = embed_some(reads, self._embedder, settings.limits, settings.vector_type, room, clock)
            for read, outcome in zip(reads, done, strict=True):
                outcomes[read.place] = outcome
            self._heartbeat.add(len(done), sum(outcome.reason is not None for outcome in done))
        clock.lap("wait")
        return clock

    def _take(self, reading: Reading) -> list[Read]:
        """Take some images, fewer of them towards the unit's end, so that all threads end together."""
        fair = reading.left // (2 * self._settings.threads)
        return reading.take(max(self._embedder.batch, min(_GROUP, fair)))

    def _write(
        self,
        unit: str,
        refs: list[ImageRef],
        reading: Reading,
        outcomes: dict[int, Outcome],
        threads: list[Future[Clock]],
    ) -> float:
        """Wait until a unit is embedded and write its part; return the seconds of writing."""
        wait(threads, return_when=FIRST_EXCEPTION)
        reading.stop()
        for thread in threads:
            thread.result()
        settings, started = self._settings, time.perf_counter()
        in_order = [outcomes[place] for place in range(len(refs))]
        check_store(in_order)
        table = part_table(refs, in_order, self._schema)
        dim = str(self._embedder.spec.dim)
        metadata = {"lookalike.embedder": settings.fingerprint, "lookalike.unit": unit, "lookalike.dim": dim}
        target = part_uri(settings.store, settings.fingerprint, unit)
        storage.create(target, to_parquet(table, row_group=_ROW_GROUP, metadata=metadata))
        return time.perf_counter() - started

    def _stop(self) -> None:
        for work in self._under_way:
            work.reading.stop()
        self._under_way.clear()

    def _count(self, outcomes: list[Outcome]) -> None:
        self._metrics.count("images", len(outcomes))
        self._metrics.count(f"images_by_{self._embedder.engine}", len(outcomes))
        self._metrics.count("bytes_read", sum(outcome.size or 0 for outcome in outcomes))
        for name, amount in Counter(outcome.reason or EMBEDDED for outcome in outcomes).items():
            self._metrics.count(name if name == EMBEDDED else f"rejected_{name}", amount)
        self._metrics.observe("unit_images", len(outcomes))


@dataclass
class EmbedUnits(beam.PTransform):
    """Names of units → one record a unit embedded: name, images, rejects."""

    settings: EmbedSettings

    def expand(self, units: beam.PCollection) -> beam.PCollection:
        """Spread the names over the workers, then do everything heavy inside one DoFn."""
        return units | "SpreadUnits" >> beam.Reshuffle() | "EmbedUnit" >> beam.ParDo(EmbedUnit(self.settings))
