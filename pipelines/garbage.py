"""Remove what neither a published version nor a run in use nor a job at work needs.

What that is, `pipelines.needed` tells. Removing it is idempotent, and whoever is killed amid it leaves nothing that
claims to be whole and is not: in every folder, the documents that vouch for the other files go first.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby

from pipelines.lease import LEASE, leased
from pipelines.needed import sort_index, sort_store
from pipelines.sorting import Pile, Sorted
from serving import storage
from serving.errors import Conflict, NotFound, UsageError
from serving.manifest import read_current
from serving.pointer import Current
from serving.storage import Entry

_AT_ONCE = 32
_BATCH = 1000
_HOUR = 3_600_000_000
"""In microseconds, as files' ages are."""
_FOLDERS = {"version": ("versions", "encoded", "embedders"), "run": ("runs", "catalog", "parts", "embedders")}
"""What is looked at, by what the pointer names; all else below an index or a store is let be."""


@dataclass(frozen=True, slots=True)
class GcRequest:
    """What to clean up, and what to spare. URIs are normalized."""

    index: str
    store: str | None = None
    """Cleaned up too where it is given."""
    keep: int = 2
    """Published versions that stay, the current one included; of the store's runs likewise."""
    min_age: float = 24.0
    """Hours for which what may belong to a job at work is spared."""
    dry_run: bool = False
    wait: float = 0.0
    """Seconds to wait for jobs at work to end."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UsageError(f"--keep is {self.keep}; keep 1 version, the current one, or more")
        if not 0 <= self.min_age < math.inf:  # NaN neither
            raise UsageError(f"--min-age is {self.min_age:g}; take 0 hours or more")
        if not 0 <= self.wait < math.inf:
            raise UsageError(f"--wait is {self.wait:g}; take 0 seconds or more")


@dataclass(frozen=True, slots=True)
class Collected:
    """What was removed (or would be), what stays, and what had to be left, each in a sentence."""

    removed: tuple[Pile, ...]
    kept: tuple[Pile, ...]
    left: tuple[str, ...]


def run(request: GcRequest) -> Collected:
    """Remove what is not needed, or tell what that is.

    `LeaseHeld` when a job is at work on the index or the store; `Conflict` when a pointer moves all the same.
    """
    roots = _pointers(request)  # before a lease is left where there is neither an index nor a store
    if request.dry_run:
        return _collect(request, lambda: None)
    until = time.monotonic() + request.wait
    with ExitStack() as held:
        # The store's before the index's, as `reindex` takes them.
        leases = [
            held.enter_context(leased(pointer.root, "gc", wait=max(0.0, until - time.monotonic())))
            for pointer in reversed(roots)
        ]

        def guard() -> None:
            for lease in leases:
                lease.check()

        return _collect(request, guard)


def _pointers(request: GcRequest) -> list["_Pointer"]:
    pointers = [_Pointer.read(request.index, "version")]
    if request.store is not None:
        pointers.append(_Pointer.read(request.store, "run"))
    return pointers


def _collect(request: GcRequest, guard: Callable[[], None]) -> Collected:
    pointers = _pointers(request)
    found = _sort(request, pointers)

    def check() -> None:
        guard()
        for pointer in pointers:
            pointer.check()

    if not request.dry_run:
        _remove(found.removed, check)
        for pointer in pointers:
            for folder in _FOLDERS[pointer.key]:
                storage.prune(storage.join(pointer.root, folder))
    return Collected(tuple(found.removed), tuple(found.kept), tuple(found.left))


@dataclass(frozen=True, slots=True)
class _Pointer:
    """Where a pointer stood when it was looked at."""

    root: str
    key: str
    current: Current

    @classmethod
    def read(cls, root: str, key: str) -> "_Pointer":
        current = read_current(root, key)
        if current is None:
            what = "a published index" if key == "version" else "an embedding store"
            raise NotFound(f"{root} is not {what}: it has no CURRENT, and so nothing tells what is needed")
        return cls(root, key, current)

    def check(self) -> None:
        if read_current(self.root, self.key) != self.current:
            raise Conflict(
                f"{storage.join(self.root, 'CURRENT')} was moved while gc was at work; nothing that was needed then is "
                "gone, run it again"
            )


def _sort(request: GcRequest, pointers: list[_Pointer]) -> Sorted:
    newest = math.inf if request.min_age == 0 else _now() - request.min_age * _HOUR
    found = Sorted(lambda file: file.updated <= newest, f"younger than {request.min_age:g} h")
    index, *stores = pointers
    kept = sort_index(index.root, index.current, request.keep, request.store, found)
    for store in stores:
        sort_store(store.root, store.current, request.keep, kept, found)
    for pointer in pointers:
        for name in ("CURRENT", LEASE):
            beside = storage.temporaries(storage.join(pointer.root, name))
            found.remove("temporary file", "", filter(found.is_old, beside))
    return found


def _remove(piles: list[Pile], check: Callable[[], None]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for pile in piles:
            for _, step in groupby(sorted(pile.files, key=_rank), _rank):
                files = list(step)
                for start in range(0, len(files), _BATCH):
                    check()
                    _delete(files[start : start + _BATCH], pool)


def _rank(file: Entry) -> int:
    """Order a folder's files for removal: the manifest, other documents that vouch for files, and the rest."""
    name = storage.name_of(file.uri)
    return 0 if name == "manifest.json" else 1 if name.endswith(".json") else 2


def _delete(files: list[Entry], pool: ThreadPoolExecutor) -> None:
    waiting = [pool.submit(storage.of(file.uri).delete, file.uri) for file in files]
    try:
        for one in waiting:
            one.result()
    except BaseException:
        for one in waiting:
            one.cancel()
        raise


def _now() -> int:
    """Return the time as files have it, in microseconds since 1970."""
    return time.time_ns() // 1000
