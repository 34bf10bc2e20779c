"""Check again, from the files, everything that manifests claim; each fault becomes one sentence."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from serving import records, storage
from serving.embedder import read_description
from serving.errors import FormatError, LookalikeError, NotFound
from serving.manifest import Document, EmbedderRef, FileEntry, IndexManifest, RunManifest, Shard
from serving.quantizer import Quantizer
from transforms.catalog import part_name, read_catalog
from transforms.planning import ListingDigest, Plan
from transforms.schema import (
    CATALOG,
    EMBEDDED,
    UNIT,
    CatalogRow,
    ImageRef,
    hash_range,
    iter_rows,
    read_parquet,
    uri_hash,
)
from transforms.shards import ShardDocument, shard_document


@dataclass(frozen=True, slots=True)
class Origin(Document):
    """What is to be known of a quantizer's `trained.json`."""

    embedder: str


def check_files(folder: str, entries: Iterable[FileEntry]) -> Iterator[str]:
    """Compare files with their entries; a file holding what another should is called by that other's name."""
    listed = list(entries)
    by_hash = {entry.sha256: entry.name for entry in listed}
    for entry in listed:
        uri = storage.join(folder, entry.name)
        try:
            data = storage.read(uri)
        except NotFound:
            yield f"{uri} is missing"
            continue
        found = storage.sha256(data)
        if found == entry.sha256:
            continue
        if found in by_hash:
            yield f"{uri} is swapped: it holds what {by_hash[found]} should"
        elif len(data) != entry.size:
            yield f"{uri} is damaged: {len(data):,} bytes instead of {entry.size:,}"
        else:
            yield f"{uri} is damaged: its bytes are not those that were written"


def check_embedder(root: str, ref: EmbedderRef) -> Iterator[str]:
    """Check that the artifact of `ref` is there, whole, and the one it is called."""
    uri = storage.join(root, "embedders", ref.fingerprint)
    try:
        document = read_description(uri)
        yield from check_files(uri, [document.model])
        if document.spec.ref != ref:
            yield f"{uri} is another embedder ({document.spec.ref}) than the manifest names ({ref})"
    except LookalikeError as error:
        yield str(error)


def shard_files(manifest: IndexManifest) -> list[FileEntry]:
    """Return all files that a version's manifest names."""
    return [manifest.trained, *(entry for shard in manifest.shards for entry in shard.files)]


def check_version(root: str, manifest: IndexManifest) -> Iterator[str]:
    """Check one index version: files, embedder, the shards' own documents, and what is inside the shards."""
    folder = storage.join(root, "versions", manifest.version)
    faults = [*check_files(folder, shard_files(manifest)), *check_embedder(root, manifest.embedder)]
    yield from faults
    yield from _check_shard_documents(folder, manifest.shards)
    if faults:
        return  # what is inside damaged files tells nothing more
    try:
        yield from _check_content(root, folder, manifest)
    except LookalikeError as error:
        yield str(error)


def _check_shard_documents(folder: str, shards: Sequence[Shard]) -> Iterator[str]:
    """Compare what every shard says of itself with what the manifest says of it."""
    for shard in shards:
        uri = shard_document(folder, shard.number, len(shards))
        try:
            if ShardDocument.load(uri).shard != shard:
                yield f"{uri} and the manifest say different things of shard {shard.number}"
        except LookalikeError as error:
            yield str(error)


def _check_content(root: str, folder: str, manifest: IndexManifest) -> Iterator[str]:
    quantizer = Quantizer(manifest.trained.read(folder))
    if quantizer.id != manifest.quantizer:
        yield f"{folder}: {manifest.trained.name} is the quantizer {quantizer.id}, not {manifest.quantizer}"
    spec = read_description(storage.join(root, "embedders", manifest.embedder.fingerprint)).spec
    yield from _check_origin(root, folder, manifest)
    if not spec.dim == manifest.dim == quantizer.dim:
        yield (
            f"{folder} is an index of another embedder: its vectors have {quantizer.dim} dimensions, the manifest "
            f"says {manifest.dim}, the embedder {spec.fingerprint} gives {spec.dim}"
        )
    for shard in manifest.shards:
        yield from _check_shard(folder, shard, quantizer)
    if sum(shard.rows for shard in manifest.shards) != manifest.rows:
        yield f"{folder}: the shards' rows do not add up to the {manifest.rows:,} of the manifest"


def _check_origin(root: str, folder: str, manifest: IndexManifest) -> Iterator[str]:
    """Ask the quantizer's own document which embedder it was trained for."""
    try:
        origin = Origin.load(storage.join(root, "encoded", manifest.quantizer, "trained.json"))
    except NotFound:
        return  # an index may be copied without what it was built from
    if origin.embedder != manifest.embedder.fingerprint:
        yield (
            f"{folder} is an index of another embedder: its quantizer was trained on vectors of {origin.embedder}, "
            f"the manifest names {manifest.embedder.fingerprint}"
        )


def _read_faiss(folder: str, entry: FileEntry) -> Any:
    try:
        return faiss.deserialize_index(np.frombuffer(entry.read(folder), np.uint8))
    except RuntimeError as error:
        raise FormatError(f"{folder}/{entry.name} cannot be read: {str(error).splitlines()[-1]}") from None


def _check_shard(folder: str, shard: Shard, quantizer: Quantizer) -> Iterator[str]:
    lists = _read_faiss(folder, shard.lists)
    table = records.from_buffer(shard.records.read(folder), storage.join(folder, shard.records.name))
    counts = {shard.lists.name: lists.ntotal, shard.records.name: len(table)}
    for codes in (shard.refine, shard.raw):
        if codes is not None:
            counts[codes.name] = _read_faiss(folder, codes).ntotal
    for name, count in counts.items():
        if count != shard.rows:
            yield f"{folder}/{name} holds {count:,} rows, the manifest says {shard.rows:,}"
    if lists.code_size != quantizer.ivf.code_size:
        yield f"{folder}/{shard.lists.name} was encoded with another quantizer than {quantizer.id}"
    hashes = [uri_hash(uri) for uri in table["uri"].to_pylist()]
    low, high = hash_range(shard.buckets)
    if hashes != sorted(hashes) or not all(low <= value <= high for value in hashes):
        yield f"{folder}/{shard.records.name} holds rows of another shard, or out of order"


def check_run(store: str, manifest: RunManifest) -> Iterator[str]:
    """Check one run of a store: files, embedder, plan, accounting, and catalog against parts."""
    plan = storage.join(store, "runs", manifest.run_id, "plan")
    faults = [
        *check_files(store, [*manifest.parts, *manifest.catalog]),
        *check_files(plan, manifest.plan),
        *check_embedder(store, manifest.embedder),
    ]
    yield from faults
    yield from _check_plan(storage.join(plan, "plan.json"), manifest)
    if faults:
        return
    try:
        yield from _check_accounting(store, plan, manifest)
        yield from _check_rows(store, manifest)
    except LookalikeError as error:
        yield str(error)


def _check_plan(uri: str, manifest: RunManifest) -> Iterator[str]:
    """Compare the plan with what the manifest says of it."""
    try:
        plan = Plan.load(uri)
    except LookalikeError as error:
        yield str(error)
        return
    if (*plan.unit_files, *plan.kept_files) != manifest.plan:
        yield f"{uri} names other files than the manifest"
    if plan.listing_digest != manifest.listing_digest:
        yield f"{uri} is of another listing than the manifest"


def _planned(plan: str, manifest: RunManifest) -> tuple[dict[tuple[str, str], str | None], ...]:
    """Return (uri, etag) → label of the images that a run set out to embed, and of those that it kept."""

    def rows(kind: str, row: type[Any], schema: Any) -> dict[tuple[str, str], str | None]:
        names = [entry.name for entry in manifest.plan if entry.name.startswith(kind)]
        found = iter_rows((storage.join(plan, name) for name in names), row, schema)
        return {(image.uri, image.etag): image.label for image in found}

    return rows("unit-", ImageRef, UNIT), rows("kept-", CatalogRow, CATALOG)


def _check_accounting(store: str, plan: str, manifest: RunManifest) -> Iterator[str]:
    fresh, reused = _planned(plan, manifest)
    label_of = fresh | reused
    listed, live = ListingDigest(), ListingDigest()
    for uri, etag in sorted(label_of):
        listed.add(uri, etag)
    outcomes: Counter[str] = Counter()  # of this run's images
    statuses: Counter[str] = Counter()
    for row in read_catalog(store, manifest):
        image = (row.uri, row.etag)
        live.add(*image)
        statuses[row.status] += 1
        if image in fresh:
            outcomes[row.reason or row.status] += 1
        if label_of.get(image, row.label) != row.label:
            yield f"run {manifest.run_id}: {row.uri} was listed as {label_of[image]!r}, the catalog says {row.label!r}"
    if not listed.hex() == live.hex() == manifest.listing_digest:
        yield f"run {manifest.run_id}: the catalog does not hold the very images that were listed"
    told = manifest.accounting
    seen = dataclasses.replace(
        told, listed=len(label_of), embedded=outcomes.pop(EMBEDDED, 0), reused=len(reused), rejected=dict(outcomes)
    )
    if not told.closes or seen != told:
        yield f"run {manifest.run_id}: the accounting does not close: {told}, the files make it {seen}"
    if (statuses.total(), statuses[EMBEDDED]) != (manifest.rows, manifest.live):
        yield (
            f"run {manifest.run_id}: the catalog has {statuses.total():,} rows, {statuses[EMBEDDED]:,} of them "
            f"embedded, the manifest says {manifest.rows:,} and {manifest.live:,}"
        )


def _check_rows(store: str, manifest: RunManifest) -> Iterator[str]:
    """Look up every catalog row in its part."""
    by_part: dict[str, list[CatalogRow]] = {}
    for row in read_catalog(store, manifest):
        by_part.setdefault(row.part, []).append(row)
    named = {entry.name for entry in manifest.parts}
    for part, rows in by_part.items():
        name = part_name(manifest.embedder.fingerprint, part)
        uri = storage.join(store, name)
        if name not in named:
            yield f"{uri} is in the catalog, and the manifest does not name it"
            continue
        table = read_parquet(uri, ["uri", "etag", "status", "reason", "embedding"])
        have = list(zip(*(table[name].to_pylist() for name in ("uri", "etag", "status", "reason")), strict=True))
        empty = table["embedding"].is_null().to_pylist()
        for row in rows:
            told = (row.uri, row.etag, row.status, row.reason)
            found = 0 <= row.row < len(have) and have[row.row] == told and row.uri_hash == uri_hash(row.uri)
            if not found or empty[row.row] == (row.status == EMBEDDED):
                yield f"{uri}: row {row.row} is not what the catalog says of {row.uri}"
