"""A store's embeddings → a published index version: train, encode, merge, measure, publish."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import apache_beam as beam

from pipelines.runner import Progress, Runner, Silent
from serving import storage
from serving.embedder import copy_artifact
from serving.errors import Conflict, EmbedderMismatch, NotFound, TargetMissed, UsageError
from serving.index import Index
from serving.manifest import (
    Document,
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
from serving.quantizer import Quantizer
from transforms.designing import Design, Wishes, designs
from transforms.encoding import (
    TRAINED,
    EncodeParts,
    EncodeSettings,
    load_quantizer,
    partial_uri,
    quantizer_folder,
    read_trained,
)
from transforms.measuring import TARGET, Against, measure, tune
from transforms.merging import MergeSettings, MergeShards
from transforms.probing import make_probe, without_queries
from transforms.sampling import live_rows, sample
from transforms.schema import BUCKETS
from transforms.shards import ShardDocument, shard_document
from transforms.training import SALT, stamp, train

_ROWS_PER_SHARD = 250_000


@dataclass(frozen=True, slots=True)
class IndexRequest:
    """Which store to index where, and how. URIs are normalized."""

    store: str
    index: str
    dim: int | None = None
    nlist: int | None = None
    shards: int = 0
    """0 chooses by the number of rows."""
    target_recall: float | None = None
    """Recall@10 that the index must reach; None looks for `TARGET` and takes the best there is."""
    recall_against: Against = "reduced"
    max_bytes_per_vector: float | None = None
    max_latency_us: float | None = None
    index_factory: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.shards <= BUCKETS:
            raise UsageError(f"--shards is {self.shards}; take 1 to {BUCKETS}, or 0 to choose by the number of rows")
        if self.target_recall is not None and not 0 < self.target_recall <= 1:
            raise UsageError(f"--target-recall is {self.target_recall:g}; take more than 0, at most 1")
        if self.recall_against not in ("reduced", "raw"):
            raise UsageError(f"--recall-against is {self.recall_against}; take reduced or raw")
        if self.max_latency_us is not None and not self.max_latency_us > 0:  # NaN neither
            raise UsageError(f"--max-latency-us is {self.max_latency_us:g}; take more than 0 microseconds")
        _ = self.wishes  # checks what is said of the shape

    @property
    def wishes(self) -> Wishes:
        """Return what is asked of the index's shape."""
        faithful = self.recall_against == "raw" and not self.index_factory
        return Wishes(self.dim, self.nlist, faithful, self.max_bytes_per_vector, self.index_factory)


@dataclass(frozen=True, slots=True)
class TrainedDocument(Document):
    """What a quantizer was trained on, `encoded/<quantizer>/trained.json`."""

    quantizer: str
    embedder: str
    design: Design
    rows: int
    store: str
    run: str
    created: str
    dim: int | None = None
    """As asked for, before it was fitted to the collection; so are those that follow."""
    nlist: int | None = None
    recall_against: Against = "reduced"
    max_bytes_per_vector: float | None = None
    index_factory: str | None = None

    def fill(self, request: IndexRequest) -> IndexRequest:
        """Return `request` with what this was trained for: that is settled, whoever merges later."""
        return dataclasses.replace(request, **{name: getattr(self, name) for name in _TRAINED_FOR})


_TRAINED_FOR = ("dim", "nlist", "recall_against", "max_bytes_per_vector", "index_factory")


def choose_designs(request: IndexRequest, run: RunManifest) -> list[Design]:
    """Return the shapes to try, the first one first."""
    if not run.live:
        raise UsageError(f"{request.store} holds no embedded image to index; its {run.rows} images were all rejected")
    return designs(run.live, run.dim, request.wishes)


def train_quantizer(
    request: IndexRequest, run: RunManifest, shape: Design | None = None, progress: Progress | None = None
) -> TrainedDocument:
    """Train on a deterministic sample of a run's live rows and keep the quantizer under its id."""
    shape = shape or choose_designs(request, run)[0]
    live = without_queries(live_rows(request.store, run, ("uri", "part", "row", "uri_hash")))
    progress = progress or Silent()
    with _shown(progress, "sample", shape.sample, "vector") as seen:
        vectors = sample(live, shape.sample, SALT).vectors(seen)
    with _shown(progress, "train", 1, "quantizer"):
        data = train(shape, run.dim, vectors)
    data = stamp(data, run.embedder.fingerprint)
    quantizer = Quantizer(data)
    trained = TrainedDocument(
        quantizer=quantizer.id,
        embedder=run.embedder.fingerprint,
        design=_as_trained(shape, quantizer),
        rows=run.live,
        store=request.store,
        run=run.run_id,
        created=now(),
        **{name: getattr(request, name) for name in _TRAINED_FOR},
    )
    folder = quantizer_folder(request.index, trained.quantizer)
    storage.create(storage.join(folder, TRAINED), data)
    storage.create(storage.join(folder, "trained.json"), trained.to_json())
    return trained


def _as_trained(shape: Design, quantizer: Quantizer) -> Design:
    """Fill in what FAISS's own key said of the shape."""
    return dataclasses.replace(
        shape,
        dim=quantizer.reduced_dim,
        nlist=int(quantizer.ivf.nlist),
        code_bytes=int(quantizer.ivf.code_size),
        refine_bytes=quantizer.refine_size,
        raw_bytes=quantizer.raw_size,
    )


def load_trained(index: str, quantizer: str) -> TrainedDocument:
    """Load what is known of a trained quantizer."""
    uri = storage.join(quantizer_folder(index, quantizer), "trained.json")
    try:
        return TrainedDocument.load(uri)
    except NotFound:
        raise NotFound(f"{index} has no quantizer {quantizer}; train one with `lookalike train`") from None


def build_version(request: IndexRequest, run: RunManifest, trained: TrainedDocument, runner: Runner) -> IndexManifest:
    """Encode what is not encoded yet, merge shards, measure, and write the version's manifest; publish nothing."""
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
    manifest = _describe(request, run, trained, version, shards)
    manifest = _measured(request, run, trained.design, manifest, runner.progress)
    _refuse_broken_promises(request, manifest)
    if not storage.create(storage.join(folder, "manifest.json"), manifest.to_json()):
        return IndexManifest.load(storage.join(folder, "manifest.json"))  # another run finished the same version
    return manifest


def publish(index: str, version: str, token: str | None) -> None:
    """Move `CURRENT` to a finished version, unless it moved elsewhere since `token` was read."""
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


def run(request: IndexRequest, runner: Runner) -> tuple[IndexManifest, bool]:
    """Index a store and publish; return the current manifest and whether it is a new version."""
    current = read_current(request.index, "version")
    source = load_run_manifest(request.store)
    published = load_index_manifest(request.index, current[0]) if current else None
    if published is not None and published.lineage.get("inputs") == _inputs(source, request):
        return published, False
    manifest = _build_first_that_keeps_its_promise(request, source, runner)
    publish(request.index, manifest.version, current[1] if current else None)
    return manifest, True


def _build_first_that_keeps_its_promise(request: IndexRequest, run: RunManifest, runner: Runner) -> IndexManifest:
    shapes = choose_designs(request, run)
    missed: list[TargetMissed] = []
    for shape in shapes:
        try:
            return build_version(request, run, train_quantizer(request, run, shape, runner.progress), runner)
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
    request: IndexRequest, run: RunManifest, trained: TrainedDocument, version: str, shards: int
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
        lineage={
            "store": request.store,
            "run": run.run_id,
            "images": list(run.images),
            "inputs": _inputs(run, request),
        },
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
    with _shown(progress, "search exactly", len(live), "vector") as seen:
        probe = make_probe(live, quantizer, seen=seen)
    tuned = tune(index, shape, probe, request.target_recall or TARGET, request.recall_against)
    measured = measure(index, shape, probe, tuned.settings, quantizer)
    return dataclasses.replace(manifest, search=tuned.settings, measured=measured)


@contextmanager
def _shown(progress: Progress, stage: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a stage that the launcher does itself; give the function to tell how much of it is done."""
    progress.start(stage, total, unit)
    try:
        yield lambda done: progress.update(done, 0)
    finally:
        progress.finish()
