"""A store's embeddings → a published index version: train, encode, merge, measure, publish."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import apache_beam as beam

from pipelines.lease import Guard, unguarded
from pipelines.lineage import Origin, lineage
from pipelines.runner import Progress, Runner, shown
from pipelines.training import IndexRequest, TrainedDocument, choose_designs, train_quantizer
from serving import storage
from serving.embedder import copy_artifact
from serving.errors import Conflict, EmbedderMismatch, TargetMissed
from serving.index import Index
from serving.manifest import (
    FileEntry,
    IndexManifest,
    RunManifest,
    SearchSettings,
    built_with,
    load_index_manifest,
    load_run_manifest,
    move_current,
    now,
    read_current,
)
from transforms.designing import Design
from transforms.encoding import TRAINED, EncodeParts, EncodeSettings, load_quantizer, partial_uri, read_trained
from transforms.measuring import TARGET, measure, tune
from transforms.merging import MergeSettings, MergeShards
from transforms.probing import make_probe
from transforms.sampling import live_rows
from transforms.schema import BUCKETS
from transforms.shards import ShardDocument, shard_document

_ROWS_PER_SHARD = 250_000


def build_version(
    request: IndexRequest, run: RunManifest, trained: TrainedDocument, runner: Runner, origin: Origin | None = None
) -> IndexManifest:
    """Encode what is not encoded yet, merge shards, measure, and write the version's manifest; publish nothing.

    `origin` is what its lineage is to say of where it comes from.
    """
    if trained.embedder != run.embedder.fingerprint:
        raise EmbedderMismatch(
            f"the quantizer {trained.quantizer} was trained on vectors of the embedder {trained.embedder}, the store "
            f"holds those of {run.embedder.fingerprint}; train one on this store"
        )
    request = trained.fill(request)
    shards = request.shards or max(1, min(BUCKETS, round(run.live / _ROWS_PER_SHARD)))
    version = version_name(run, trained.quantizer, shards, _promise(request))
    folder = storage.join(request.index, "versions", version)
    if storage.exists(storage.join(folder, "manifest.json")):
        return IndexManifest.load(storage.join(folder, "manifest.json"))
    embedder = storage.join(request.store, "embedders", run.embedder.fingerprint)
    copy_artifact(embedder, storage.join(request.index, "embedders"))
    _encode(request, run, trained.quantizer, runner)
    _merge(request, run, trained.quantizer, version, shards, runner)
    manifest = _describe(request, run, trained, version, shards, origin or Origin())
    manifest = _measured(request, run, trained.design, manifest, runner.progress)
    _refuse_broken_promises(request, manifest)
    if not storage.create(storage.join(folder, "manifest.json"), manifest.to_json()):
        return IndexManifest.load(storage.join(folder, "manifest.json"))  # another run finished the same version
    return manifest


def publish(index: str, version: str, token: str | None, guard: Guard = unguarded) -> None:
    """Move `CURRENT` to a finished version, unless it moved elsewhere since `token` was read, or `guard` objects."""
    guard()
    try:
        move_current(index, "version", version, token)
    except Conflict:
        current = read_current(index, "version")
        if current is not None and current[0] == version:
            return  # an equal run was quicker
        raise Conflict(
            f"{index} was published by another run meanwhile; version {version} is finished and not current, "
            "run again to look at both"
        ) from None


def run(request: IndexRequest, runner: Runner, guard: Guard = unguarded) -> tuple[IndexManifest, bool]:
    """Index a store and publish, if `guard` lets us; return the current manifest and whether it is a new version."""
    current = read_current(request.index, "version")
    source = load_run_manifest(request.store)
    published = load_index_manifest(request.index, current[0]) if current else None
    if published is not None and is_made_of(published, source, request):
        return published, False
    manifest = train_and_build(request, source, runner, Origin(published))
    publish(request.index, manifest.version, current[1] if current else None, guard)
    return manifest, True


def is_made_of(manifest: IndexManifest, run: RunManifest, request: IndexRequest) -> bool:
    """Tell whether a version is what `request` would make of a run."""
    return manifest.lineage.get("inputs") == _inputs(run, request)


def train_and_build(
    request: IndexRequest, run: RunManifest, runner: Runner, origin: Origin | None = None
) -> IndexManifest:
    """Build a version of the first shape that keeps the promise; `TargetMissed`, and none finished, if none does."""
    shapes = choose_designs(request, run)
    missed: list[TargetMissed] = []
    for shape in shapes:
        try:
            trained = train_quantizer(request, run, shape, runner.progress)
            return build_version(request, run, trained, runner, origin)
        except TargetMissed as error:
            missed.append(error)
    nearest = min(missed, key=lambda error: error.shortfall)
    raise TargetMissed(f"{nearest} ({len(shapes)} shapes were tried)" if len(shapes) > 1 else str(nearest))


def _refuse_broken_promises(request: IndexRequest, manifest: IndexManifest) -> None:
    """Raise when what was measured is not what was asked for; the version is never finished then."""
    measured = manifest.measured
    reached = measured["recall_at_10_raw" if request.recall_against == "raw" else "recall_at_10"]
    what = (
        f"recall@10 {reached} against the {request.recall_against} vectors, {measured['bytes_per_vector']} bytes a "
        f"vector, {measured['p50_us']:.0f} µs a lookup, at {manifest.reduced_dim} dimensions"
    )
    if request.target_recall is not None and reached < request.target_recall:
        raise TargetMissed(
            f"--target-recall {request.target_recall:g} cannot be met; the best that can is {what}. Nothing was "
            "published; lower the target, allow more bytes, or choose other dimensions (--dim)",
            1 - reached / request.target_recall,
        )
    if request.max_latency_us is not None and measured["p50_us"] > request.max_latency_us:
        raise TargetMissed(
            f"--max-latency-us {request.max_latency_us:g} cannot be met; the best that can is {what}. Nothing was "
            "published; allow more time, a lower recall, or choose fewer dimensions (--dim)",
            measured["p50_us"] / request.max_latency_us - 1,
        )


def _promise(request: IndexRequest) -> list[Any]:
    return [request.target_recall, request.recall_against, request.max_bytes_per_vector, request.max_latency_us]


def _inputs(run: RunManifest, request: IndexRequest) -> str:
    """Hash what a version is made from before anything is trained."""
    asked = [request.dim, request.nlist, request.shards, request.index_factory, *_promise(request)]
    made_from = [[file.sha256 for file in run.catalog], *asked]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]


def version_name(run: RunManifest, quantizer: str, shards: int, promise: Sequence[Any] = ()) -> str:
    """Name a version by what it is made of and tuned to, so that building it again finds it."""
    made_of = [quantizer, shards, [file.sha256 for file in run.catalog], list(promise)]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def _encode(request: IndexRequest, run: RunManifest, quantizer: str, runner: Runner) -> None:
    missing = [part.name for part in run.parts if not storage.exists(partial_uri(request.index, quantizer, part.name))]
    with runner.heartbeats() as heartbeats:
        settings = EncodeSettings(request.store, request.index, quantizer, heartbeats)
        _run_stage(runner, "encode", "part", missing, EncodeParts(settings), heartbeats)


def _merge(request: IndexRequest, run: RunManifest, quantizer: str, version: str, shards: int, runner: Runner) -> None:
    catalog = tuple(storage.join(request.store, file.name) for file in run.catalog)
    with runner.heartbeats() as heartbeats:
        settings = MergeSettings(request.index, version, quantizer, shards, catalog, heartbeats)
        _run_stage(runner, "merge", "shard", range(shards), MergeShards(settings), heartbeats)


def _run_stage(
    runner: Runner, stage: str, unit: str, names: Sequence[Any], step: beam.PTransform, heartbeats: str | None
) -> None:
    def build(pipeline: beam.Pipeline) -> None:
        _ = pipeline | f"Name{unit.title()}s" >> beam.Create(list(names)) | step

    if names:
        runner.run(stage, len(names), unit, build, heartbeats)


def _describe(
    request: IndexRequest, run: RunManifest, trained: TrainedDocument, version: str, shards: int, origin: Origin
) -> IndexManifest:
    folder = storage.join(request.index, "versions", version)
    data = read_trained(request.index, trained.quantizer)
    storage.create(storage.join(folder, TRAINED), data)
    shape = trained.design
    built = tuple(ShardDocument.load(shard_document(folder, number, shards)).shard for number in range(shards))
    return IndexManifest(
        version=version,
        kind=shape.kind,
        metric="cosine",
        rows=sum(shard.rows for shard in built),
        dim=run.dim,
        reduced_dim=shape.dim,
        embedder=run.embedder,
        quantizer=trained.quantizer,
        trained=FileEntry.of(TRAINED, data),
        shards=built,
        parameters={
            "nlist": shape.nlist,
            "code_bytes": shape.code_bytes,
            "refine_bytes": shape.refine_bytes,
            "raw_bytes": shape.raw_bytes,
            "trained_on": shape.sample,
            "factory": shape.factory or None,
            "target_recall": request.target_recall or TARGET,
            "recall_against": request.recall_against,
        },
        search=SearchSettings(shape.nlist, 0),
        measured={},
        lineage=lineage(request.store, run, origin) | {"inputs": _inputs(run, request)},
        created=now(),
        built_with=built_with(),
    )


def _measured(
    request: IndexRequest, run: RunManifest, shape: Design, manifest: IndexManifest, progress: Progress
) -> IndexManifest:
    """Open the version as a reader would, tune it, and record what was measured."""
    index = Index(request.index, manifest)
    quantizer = load_quantizer(request.index, manifest.quantizer)
    live = live_rows(request.store, run, ("uri", "label", "part", "row", "uri_hash"))
    with shown(progress, "search exactly", len(live), "vector") as seen:
        probe = make_probe(live, quantizer, seen=seen)
    tuned = tune(index, shape, probe, request.target_recall or TARGET, request.recall_against)
    measured = measure(index, shape, probe, tuned.settings, quantizer)
    return dataclasses.replace(manifest, search=tuned.settings, measured=measured)
