"""What was read becomes vectors, or reasons why there are none, and both become a part."""

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from serving.embedder import Embedder
from serving.errors import Changed, ImageRejected, NotFound, StorageError, TimedOut
from serving.images import Limits, load
from serving.litert import Pixels
from transforms.reading import Read
from transforms.schema import EMBEDDED, REJECTED, UNREAD, ImageRef, VectorType

_ROW_GROUP = 512
_OUTAGE = 10
"""Fewer unread images than this are never taken for an outage."""


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


def prepare(read: Read, size: tuple[int, int], limits: Limits) -> tuple[Outcome, Pixels | None]:
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
    reads: Sequence[Read], embedder: Embedder, limits: Limits, vector_type: VectorType, room: Pixels, clock: Clock
) -> list[Outcome]:
    """Decode some images and embed them; `room` is memory for their pixels, uint8 `[at least as many, H, W, 3]`."""
    outcomes: list[Outcome] = []
    good: list[Outcome] = []
    for read in reads:
        outcome, pixels = prepare(read, embedder.spec.input_size, limits)
        outcomes.append(outcome)
        if pixels is not None:
            room[len(good)] = pixels
            good.append(outcome)
    clock.lap("decode")
    vectors = embedder.embed(room[: len(good)]) if good else ()
    for outcome, vector in zip(good, vectors, strict=True):
        fill(outcome, vector, vector_type)
    clock.lap("infer")
    return outcomes


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
