"""Find what is new or changed, and cut it into work units.

A first run, a nightly one and the resumption of a crashed one are the same merge-join of two sorted streams: what is
listed and what the catalog holds. A unit is named by the hash of its references and of what they are embedded with;
units are cut where the uris' own hashes say so, so that an image more or less changes one unit and not all behind it.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from serving import storage
from serving.manifest import Document, FileEntry
from transforms.schema import (
    CATALOG,
    EMBEDDED,
    UNIT,
    UNREAD,
    CatalogRow,
    ImageRef,
    iter_rows,
    to_parquet,
    to_table,
    uri_hash,
)

_KEPT_ROWS = 50_000
_ROW_GROUP = 8192


Listed = TypeVar("Listed", ImageRef, CatalogRow)


class Joined(NamedTuple, Generic[Listed]):
    """One uri of the merge-join: what the listing (or a later catalog) says of it, and what the catalog does."""

    listed: Listed | None
    known: CatalogRow | None


@dataclass(frozen=True, slots=True)
class Plan(Document):
    """What a run sets out to do, `STORE/runs/<run_id>/plan/plan.json`; written after the files it names."""

    units: tuple[str, ...]
    """Names of the units, in the order of their uris; a unit's part has the same name."""
    unit_files: tuple[FileEntry, ...]
    kept_files: tuple[FileEntry, ...]
    """Catalog rows carried over, with the labels of the new listing."""
    new: int
    kept: int
    kept_rejects: int
    """Of the kept, those without an embedding."""
    retried: int
    """Of the new, those that were known without an embedding and have not changed."""
    relabelled: int
    gone: int
    listing_digest: str

    @property
    def listed(self) -> int:
        """Return how many images were listed."""
        return self.new + self.kept

    @property
    def changes_nothing(self) -> bool:
        """Tell whether the catalog would come out as it is."""
        return not (self.new or self.relabelled or self.gone)

    @property
    def changes_nothing_but_retries(self) -> bool:
        """Tell whether only images are tried again that failed before."""
        return not (self.new - self.retried or self.relabelled or self.gone)


class ListingDigest:
    """A running SHA-256 over uri and etag in sorted order: two sets are equal when their digests are."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, uri: str, etag: str) -> None:
        """Add the next image."""
        self._hash.update(f"{uri}\0{etag}\n".encode())

    def hex(self) -> str:
        """Return the digest so far."""
        return self._hash.hexdigest()


def merge_join(listed: Iterable[Listed], known: Iterable[CatalogRow]) -> Iterator[Joined[Listed]]:
    """Join two streams sorted by uri, holding one row of each."""
    left, right = iter(listed), iter(known)
    ref, row = next(left, None), next(right, None)
    while ref is not None or row is not None:
        if row is None or (ref is not None and ref.uri < row.uri):
            yield Joined(ref, None)
            ref = next(left, None)
        elif ref is None or row.uri < ref.uri:
            yield Joined(None, row)
            row = next(right, None)
        else:
            yield Joined(ref, row)
            ref, row = next(left, None), next(right, None)


def cut(refs: Iterable[ImageRef], unit_size: int) -> Iterator[list[ImageRef]]:
    """Cut a sorted stream into units of at most `unit_size`, at places that depend on the uris near them only."""
    unit: list[ImageRef] = []
    for ref in refs:
        unit.append(ref)
        # A uri ends a unit by chance 2 in unit_size: units come out about half as long as they may be.
        if len(unit) == unit_size or uri_hash(ref.uri) % max(1, unit_size // 2) == 0:
            yield unit
            unit = []
    if unit:
        yield unit


def unit_name(refs: Iterable[ImageRef], recipe: str) -> str:
    """Name a unit by its references and by `recipe`, everything else that its part depends on."""
    name = hashlib.blake2b(recipe.encode(), digest_size=16)
    for ref in refs:
        name.update(f"\n{ref.uri}\0{ref.etag}".encode())
    return name.hexdigest()


class Planner:
    """Write a run's plan below `folder` (`STORE/runs/<run_id>/plan`).

    `recipe` is everything besides the images that parts depend on. Images that could not be read before are planned
    again, with `retry_rejects` all that were rejected. A unit whose part is `spoiled` (it holds images that could not
    be read) gets a name of this `attempt`, and so does every unit where rejects are tried again.
    """

    def __init__(
        self,
        folder: str,
        recipe: dict[str, Any],
        unit_size: int,
        *,
        attempt: str = "",
        retry_rejects: bool = False,
        spoiled: Callable[[str], bool] = lambda _name: False,
    ) -> None:
        self._folder = folder
        self._recipe = json.dumps(recipe, sort_keys=True)
        self._unit_size = unit_size
        self._attempt = attempt
        self._retry_rejects = retry_rejects
        self._spoiled = spoiled
        self._counts: Counter[str] = Counter()
        self._kept: list[CatalogRow] = []
        self._kept_files: list[FileEntry] = []

    def plan(self, listed: Iterable[ImageRef], known: Iterable[CatalogRow]) -> Plan:
        """Join listing and catalog, and write units, kept rows and then the plan itself."""
        digest = ListingDigest()
        units, files = [], []
        for unit in cut(self._new(merge_join(listed, known), digest), self._unit_size):
            name = unit_name(unit, self._recipe)
            if self._retry_rejects or self._spoiled(name):
                name = unit_name(unit, self._recipe + self._attempt)
            units.append(name)
            files.append(self._write(f"unit-{name}.parquet", to_table(unit, UNIT)))
        self._flush_kept()
        plan = Plan(
            units=tuple(units),
            unit_files=tuple(files),
            kept_files=tuple(self._kept_files),
            new=self._counts["new"],
            kept=self._counts["kept"],
            kept_rejects=self._counts["kept_rejects"],
            retried=self._counts["retried"],
            relabelled=self._counts["relabelled"],
            gone=self._counts["gone"],
            listing_digest=digest.hex(),
        )
        storage.create(storage.join(self._folder, "plan.json"), plan.to_json())
        return plan

    def _new(self, joined: Iterable[Joined[ImageRef]], digest: ListingDigest) -> Iterator[ImageRef]:
        for ref, row in joined:
            if ref is None:
                self._counts["gone"] += 1
                continue
            digest.add(ref.uri, ref.etag)
            if row is not None and row.etag == ref.etag:
                if not self._tried_again(row):
                    self._keep(row, ref.label)
                    continue
                self._counts["retried"] += 1
            self._counts["new"] += 1
            yield ref

    def _tried_again(self, row: CatalogRow) -> bool:
        return row.status == UNREAD or (self._retry_rejects and row.status != EMBEDDED)

    def _keep(self, row: CatalogRow, label: str | None) -> None:
        self._counts["kept"] += 1
        self._counts["kept_rejects"] += row.status != EMBEDDED
        if row.label != label:
            self._counts["relabelled"] += 1
            row = row._replace(label=label)
        self._kept.append(row)
        if len(self._kept) == _KEPT_ROWS:
            self._flush_kept()

    def _flush_kept(self) -> None:
        if self._kept:
            name = f"kept-{len(self._kept_files):05}.parquet"
            self._kept_files.append(self._write(name, to_table(self._kept, CATALOG)))
            self._kept = []

    def _write(self, name: str, table: Any) -> FileEntry:
        data = to_parquet(table, row_group=_ROW_GROUP)
        storage.create(storage.join(self._folder, name), data)
        return FileEntry.of(name, data)


def unit_uri(folder: str, name: str) -> str:
    """Return where the unit `name` of the plan in `folder` stands."""
    return storage.join(folder, f"unit-{name}.parquet")


def read_unit(folder: str, name: str) -> list[ImageRef]:
    """Read a unit's references."""
    return list(iter_rows([unit_uri(folder, name)], ImageRef, UNIT))


def discard(folder: str, plan: Plan) -> None:
    """Remove a plan that changes nothing."""
    for name in itertools.chain(["plan.json"], (file.name for file in (*plan.unit_files, *plan.kept_files))):
        storage.of(folder).delete(storage.join(folder, name))
