"""Train a quantizer on a store, and keep it with what it was trained for."""

import dataclasses
from dataclasses import dataclass

from pipelines.runner import Progress, Silent, shown
from serving import storage
from serving.errors import NotFound, UsageError
from serving.manifest import Document, RunManifest, now
from serving.quantizer import Quantizer
from transforms.designing import Design, Wishes, designs
from transforms.encoding import TRAINED, quantizer_folder
from transforms.measuring import Against
from transforms.probing import queries_of, without_queries
from transforms.sampling import live_rows, sample
from transforms.schema import BUCKETS
from transforms.training import SALT, stamp, train


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
    distortion: float | None = None
    """Of its codes, on rows left out of training where there are some; of later rows it tells how far they drifted."""

    def fill(self, request: IndexRequest) -> IndexRequest:
        """Return `request` with what this was trained for: that is settled, whoever merges later."""
        return dataclasses.replace(request, **{name: getattr(self, name) for name in TRAINED_FOR})


TRAINED_FOR = ("dim", "nlist", "recall_against", "max_bytes_per_vector", "index_factory")


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
    live = live_rows(request.store, run, ("uri", "part", "row", "uri_hash"))
    asked, _ = queries_of(live)
    progress = progress or Silent()
    with shown(progress, "sample", shape.sample, "vector") as seen:
        vectors = sample(without_queries(live), shape.sample, SALT).vectors(seen)
    with shown(progress, "train", 1, "quantizer"):
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
        distortion=quantizer.distortion(asked.vectors()),
        **{name: getattr(request, name) for name in TRAINED_FOR},
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
