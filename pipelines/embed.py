"""Images → embeddings in a store: plan, embed, commit."""

import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

import apache_beam as beam

from pipelines.lease import Guard, unguarded
from pipelines.runner import Runner
from serving import storage
from serving.embedder import EmbedderDocument, read_description
from serving.errors import RunFailed, UsageError
from serving.images import Limits
from serving.manifest import FileEntry, RunManifest, built_with, load_run_manifest, move_current, now, read_current
from transforms.catalog import commit, count_outcomes, is_spoiled, part_name, read_catalog
from transforms.engines import AUTO, ENGINES
from transforms.listing import Listing
from transforms.planning import Plan, Planner, discard
from transforms.reading import Ahead
from transforms.schema import EMBEDDED, CatalogRow, VectorType
from transforms.units import EmbedSettings, EmbedUnits


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """What to embed, with what, into which store. URIs are normalized."""

    images: tuple[str, ...]
    store: str
    embedder: str
    """URI of the artifact; it is below the store."""
    labels: str = "parent"
    all_files: bool = False
    limits: Limits = field(default_factory=Limits)
    unit_size: int = 512
    threads: int = 0
    """Threads a worker; 0: its share of this machine's cores, or one where a worker is a process for each core."""
    ahead: Ahead = field(default_factory=Ahead)
    engine: str = AUTO
    vector_type: VectorType = "float16"
    max_reject_ratio: float = 0.5
    retry_rejects: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.unit_size <= 65_536:
            raise UsageError(f"--unit-size is {self.unit_size}; take 1 to 65,536 images a unit")
        if not 0 <= self.max_reject_ratio <= 1:
            raise UsageError(f"--max-reject-ratio is {self.max_reject_ratio}; take 0 to 1")
        if self.threads < 0:
            raise UsageError(f"--threads is {self.threads}; take 1 or more, or 0 to share the cores")
        if self.engine not in ENGINES:
            raise UsageError(f"--engine {self.engine} is not known; there are {', '.join(ENGINES)}")
        if self.ahead.images < 1:
            raise UsageError(f"--read-ahead is {self.ahead.images}; take 1 image or more")


@dataclass(frozen=True, slots=True)
class EmbedResult:
    """What a run did: the manifest now current, and whether this run made it."""

    manifest: RunManifest
    changed: bool
    skipped: int
    """Files passed over by a folder listing because their names are no image's."""
    counters: dict[str, int]


def run(request: EmbedRequest, runner: Runner, guard: Guard = unguarded) -> EmbedResult:
    """Bring a store up to date with its images; a run that was cut short goes on where it stopped.

    `guard` is called right before the store's pointer moves, and raises when it must not.
    """
    current = read_current(request.store, "run")
    parent = load_run_manifest(request.store, current[0]) if current else None
    embedder = read_description(request.embedder)
    listing = Listing(request.images, request.labels, request.all_files)
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    folder = storage.join(request.store, "runs", run_id, "plan")
    plan = _plan(request, embedder, listing, parent, folder, run_id)
    if parent is not None and plan.changes_nothing and parent.embedder.fingerprint == embedder.fingerprint:
        discard(folder, plan)
        return EmbedResult(parent, False, listing.skipped, {})
    if not plan.listed:
        discard(folder, plan)
        require_images(listing)
    counted = _embed(request, embedder, plan, run_id, runner)
    outcomes = count_outcomes(request.store, embedder.fingerprint, plan)
    _check_rejects(request, plan, outcomes)
    if parent is not None and plan.changes_nothing_but_retries and not outcomes[EMBEDDED]:
        return EmbedResult(parent, False, listing.skipped, counted)
    manifest = _commit(request, embedder, plan, run_id, parent)
    guard()
    move_current(request.store, "run", run_id, current[1] if current else None)
    return EmbedResult(manifest, True, listing.skipped, counted)


def _plan(
    request: EmbedRequest,
    embedder: EmbedderDocument,
    listing: Listing,
    parent: RunManifest | None,
    folder: str,
    run_id: str,
) -> Plan:
    known: Iterator[CatalogRow] = iter(())
    if parent is not None and parent.embedder.fingerprint == embedder.fingerprint:
        known = read_catalog(request.store, parent)
    recipe = {"embedder": embedder.fingerprint, "vector_type": request.vector_type, **asdict(request.limits)}
    planner = Planner(
        folder,
        recipe,
        request.unit_size,
        attempt=run_id,
        retry_rejects=request.retry_rejects,
        spoiled=lambda name: is_spoiled(request.store, embedder.fingerprint, name),
    )
    return planner.plan(listing, known)


def require_images(listing: Listing) -> None:
    """Raise `UsageError` unless at least one image is listed."""
    if next(iter(listing), None) is not None:
        return
    where = ", ".join(listing.inputs)
    if listing.skipped:
        raise UsageError(
            f"no images under {where}: {listing.skipped} files there have no image's ending; list them all the same "
            "with --all-files"
        )
    raise UsageError(
        f"no images under {where}; give a folder, a glob, gs://bucket/prefix or a manifest that holds some"
    )


def _embed(
    request: EmbedRequest, embedder: EmbedderDocument, plan: Plan, run_id: str, runner: Runner
) -> dict[str, int]:
    if not plan.units:
        return {}
    with runner.heartbeats() as heartbeats:
        settings = EmbedSettings(
            store=request.store,
            run_id=run_id,
            fingerprint=embedder.fingerprint,
            limits=request.limits,
            threads=request.threads or runner.cores_per_worker,
            ahead=request.ahead,
            engine=request.engine,
            vector_type=request.vector_type,
            heartbeat=heartbeats,
        )

        def build(pipeline: beam.Pipeline) -> None:
            _ = pipeline | "NameUnits" >> beam.Create(plan.units) | "EmbedUnits" >> EmbedUnits(settings)

        return runner.run("embed", plan.new, "img", build, heartbeats)


def _check_rejects(request: EmbedRequest, plan: Plan, outcomes: Counter[str]) -> None:
    """Compare the rejects of the whole catalog to come, so that one bad image among few new ones fails nothing."""
    rejected = {reason: count for reason, count in sorted(outcomes.items()) if reason != EMBEDDED}
    bad = sum(rejected.values()) + plan.kept_rejects
    if bad > request.max_reject_ratio * plan.listed:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
        raise RunFailed(
            f"{bad} of {plan.listed} images were rejected ({reasons or 'in earlier runs'}), more than "
            f"--max-reject-ratio {request.max_reject_ratio:g} allows; what was embedded is kept: a run with a higher "
            "ratio uses it, one with --retry-rejects tries the others again"
        )


def _commit(
    request: EmbedRequest, embedder: EmbedderDocument, plan: Plan, run_id: str, parent: RunManifest | None
) -> RunManifest:
    done = commit(request.store, embedder.fingerprint, run_id, plan)
    assert done.accounting is not None  # commit fills it or raises
    known = {file.name: file for file in parent.parts} if parent else {}
    names = [part_name(embedder.fingerprint, part) for part in done.parts]
    manifest = RunManifest(
        run_id=run_id,
        embedder=embedder.spec.ref,
        dim=embedder.spec.dim,
        rows=done.rows,
        live=done.live,
        parts=tuple(known.get(name) or _describe(request.store, name) for name in names),
        catalog=tuple(done.files),
        plan=(*plan.unit_files, *plan.kept_files),
        listing_digest=plan.listing_digest,
        accounting=done.accounting,
        images=request.images,
        parent=parent.run_id if parent else None,
        created=now(),
        built_with=built_with(),
    )
    storage.create(storage.join(request.store, "runs", run_id, "manifest.json"), manifest.to_json())
    return manifest


def _describe(store: str, name: str) -> FileEntry:
    return FileEntry.of(name, storage.read(storage.join(store, name)))
