"""The catalog: every live image, its label and where its embedding stands, sorted by uri."""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from serving import storage
from serving.errors import FormatError
from serving.manifest import Accounting, FileEntry, RunManifest
from transforms.planning import ListingDigest, Plan, read_unit
from transforms.schema import (
    CATALOG,
    EMBEDDED,
    UNREAD,
    CatalogRow,
    iter_rows,
    read_parquet,
    to_parquet,
    to_table,
    uri_hash,
)

_FILE_ROWS = 100_000
_ROW_GROUP = 16_384


@dataclass(slots=True)
class Committed:
    """What a commit wrote and counted."""

    files: list[FileEntry] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    """Names of all parts that a live row refers to."""
    rows: int = 0
    live: int = 0
    accounting: Accounting | None = None


def part_uri(store: str, fingerprint: str, name: str) -> str:
    """Return where a part stands."""
    return storage.join(store, part_name(fingerprint, name))


def part_name(fingerprint: str, name: str) -> str:
    """Return a part's name relative to the store."""
    return f"parts/{fingerprint}/{name}.parquet"


def catalog_files(store: str, manifest: RunManifest) -> list[str]:
    """Return the URIs of a run's catalog."""
    return [storage.join(store, file.name) for file in manifest.catalog]


def read_catalog(store: str, manifest: RunManifest) -> Iterator[CatalogRow]:
    """Stream a run's catalog."""
    return iter_rows(catalog_files(store, manifest), CatalogRow, CATALOG)


def part_rows(store: str, fingerprint: str, folder: str, name: str) -> Iterator[CatalogRow]:
    """Yield the catalog rows of one finished unit, whose part must hold its references in their order."""
    unit = read_unit(folder, name)
    part = read_parquet(part_uri(store, fingerprint, name), ["uri", "etag", "status", "reason"])
    columns = [part[column].to_pylist() for column in part.column_names]
    if [(ref.uri, ref.etag) for ref in unit] != list(zip(columns[0], columns[1], strict=True)):
        raise FormatError(f"{part_uri(store, fingerprint, name)} does not hold its unit's images; delete it and rerun")
    for row, (ref, status, reason) in enumerate(zip(unit, columns[2], columns[3], strict=True)):
        yield CatalogRow(ref.uri, ref.etag, ref.label, name, row, status, reason, uri_hash(ref.uri))


def is_spoiled(store: str, fingerprint: str, name: str) -> bool:
    """Tell whether a part exists that holds images which could not be read: it is not the unit's last word."""
    uri = part_uri(store, fingerprint, name)
    return storage.exists(uri) and UNREAD in read_parquet(uri, ["status"])["status"].to_pylist()


def count_outcomes(store: str, fingerprint: str, plan: Plan) -> Counter[str]:
    """Count a plan's finished units: rejects by reason, the rest under `embedded`."""
    counts: Counter[str] = Counter()
    for name in plan.units:
        part = read_parquet(part_uri(store, fingerprint, name), ["status", "reason"])
        statuses, reasons = part["status"].to_pylist(), part["reason"].to_pylist()
        counts.update(reason or status for status, reason in zip(statuses, reasons, strict=True))
    return counts


def commit(store: str, fingerprint: str, run_id: str, plan: Plan) -> Committed:
    """Merge kept rows and finished parts into a new catalog, counting as it goes; nothing refers to it yet.

    Raises `FormatError` when the rows written are not the images listed.
    """
    folder = storage.join(store, "runs", run_id, "plan")
    kept = iter_rows((storage.join(folder, file.name) for file in plan.kept_files), CatalogRow, CATALOG)
    fresh = (row for name in plan.units for row in part_rows(store, fingerprint, folder, name))
    outcomes: Counter[str] = Counter()
    done = _write(store, run_id, heapq.merge(kept, _counted(fresh, outcomes), key=lambda row: row.uri), plan)
    embedded = outcomes.pop(EMBEDDED, 0)
    done.accounting = Accounting(
        listed=plan.listed,
        embedded=embedded,
        reused=plan.kept,
        rejected=dict(sorted(outcomes.items())),
        relabelled=plan.relabelled,
        gone=plan.gone,
    )
    if not done.accounting.closes or done.rows != plan.listed:
        raise FormatError(
            f"run {run_id}: {plan.listed} images were listed, {done.rows} rows came out: {done.accounting}"
        )
    return done


def _counted(rows: Iterable[CatalogRow], outcomes: Counter[str]) -> Iterator[CatalogRow]:
    for row in rows:
        outcomes[row.reason or row.status] += 1
        yield row


def _write(store: str, run_id: str, rows: Iterable[CatalogRow], plan: Plan) -> Committed:
    done, digest, parts = Committed(), ListingDigest(), set()
    batch: list[CatalogRow] = []
    for row in rows:
        digest.add(row.uri, row.etag)
        parts.add(row.part)
        done.live += row.status == EMBEDDED
        batch.append(row)
        if len(batch) == _FILE_ROWS:
            _write_file(store, run_id, batch, done)
            batch = []
    _write_file(store, run_id, batch, done)
    if digest.hex() != plan.listing_digest:
        raise FormatError(f"run {run_id}: the catalog does not hold the images that were listed")
    done.parts = sorted(parts)
    return done


def _write_file(store: str, run_id: str, batch: list[CatalogRow], done: Committed) -> None:
    if not batch:
        return
    data = to_parquet(to_table(batch, CATALOG), row_group=_ROW_GROUP)
    name = f"catalog/{run_id}/{len(done.files):05}.parquet"
    storage.create(storage.join(store, name), data)
    done.files.append(FileEntry.of(name, data))
    done.rows += len(batch)
