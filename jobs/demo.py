"""Embed, index and search a collection drawn on the spot, or a folder of yours, and show what came of it.

    lookalike demo
    lookalike demo --images ~/Pictures --out demo-out

Weights are ImageNet's where they are at hand: a Keras file in the folder LOOKALIKE_WEIGHTS, Keras' own cache, or a
download that answers within seconds. Otherwise they are random, and the table says so.
"""

import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs import backbones, cli, console, drawings
from jobs.options import option, parse
from jobs.search import Answer, sheet
from pipelines import embed, index
from pipelines.embed import EmbedRequest, EmbedResult
from pipelines.runner import Runner
from pipelines.training import IndexRequest
from serving import Index, storage
from serving.errors import ImageRejected, UsageError
from serving.manifest import IndexManifest
from transforms.listing import Listing
from transforms.sampling import live_rows, sample

PAGE = "neighbours.html"

_ANSWER_WITHIN = 5.0  # seconds for the server of ImageNet weights
_PER_LABEL = 1
_QUERIES = 12
_NEIGHBOURS = 10


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `lookalike demo`."""

    images: tuple[str, ...] = option("your own folders, globs or manifests instead of drawings", (), metavar="URI")
    out: str = option("where everything goes", "demo-out")
    count: int = option("pictures to draw", 3000)
    shards: int = option("index shards", 4)
    backbone: str = option(
        "what turns pictures into vectors", backbones.DEFAULT, choices=lambda: [*backbones.BACKBONES]
    )
    weights: str | None = option("as in `lookalike embed` (default: the best at hand)", None)


def main(argv: Sequence[str]) -> int:
    """Run the demo."""
    options, beam_arguments = parse(Options, argv, "demo", __doc__ or "", beam=True)
    out = Path(storage.normalize(options.out))
    runner = Runner(beam_arguments, console.Bar())
    images = tuple(storage.normalize(uri) for uri in options.images)
    if images:
        embed.require_images(Listing(images))
    _make_room(out)
    store, index_root = str(out / "store"), str(out / "index")
    images = images or (_draw(out / f"drawings-{options.count}", options.count),)
    embedder = _embedder(store, options)
    started = time.monotonic()
    result = embed.run(EmbedRequest(images, store, embedder), runner)
    embedding = time.monotonic() - started
    manifest, _ = index.run(IndexRequest(store, index_root, shards=options.shards), runner)
    page = out / PAGE
    page.write_text(_contact_sheet(index_root, store, result), encoding="utf-8")
    print(_summary(result, manifest, embedding, time.monotonic() - started))
    print(f"\nneighbours  {page}")
    print(f"ask it      lookalike search --index {index_root} --image YOUR.jpg --html OUT.html")
    return 0


def _make_room(out: Path) -> None:
    """Remove what an earlier demo left here; what is not marked as a demo's is never touched."""
    marker, ours = out / ".lookalike-demo", [out / "store", out / "index", out / PAGE]
    if not marker.exists():
        taken = [str(path) for path in ours if path.exists()]
        if taken:
            raise UsageError(f"{taken[0]} exists and is no demo's; name another place with --out")
        out.mkdir(parents=True, exist_ok=True)
        marker.write_text("made by `lookalike demo`, which replaces store, index and page here\n")
    for folder in ours[:2]:
        shutil.rmtree(folder, ignore_errors=True)


def _draw(folder: Path, count: int) -> str:
    """Draw the collection, and some broken files beside it."""
    bar = console.Bar()
    bar.start("draw", count, "img")
    for done, _ in enumerate(drawings.write_collection(folder, count), 1):
        bar.update(done, 0)
    bar.finish()
    drawings.write_faults(folder / "broken")
    return str(folder)


def _embedder(store: str, options: Options) -> str:
    folder = storage.join(store, "embedders")
    if options.weights is not None:
        return backbones.ensure_exported(folder, options.backbone, options.weights)
    local = _local_weights(options.backbone)
    if local is not None:
        return backbones.ensure_exported(folder, options.backbone, local)
    try:
        with _short_timeouts():
            return backbones.ensure_exported(folder, options.backbone, "imagenet")
    except UsageError as error:
        print(f"lookalike demo: {error}; going on with untrained weights", file=sys.stderr)
        return backbones.ensure_exported(folder, options.backbone, "untrained")


def _local_weights(backbone: str) -> str | None:
    """Look for a Keras file of the backbone in the folder LOOKALIKE_WEIGHTS."""
    folder = os.environ.get("LOOKALIKE_WEIGHTS")
    if not folder:
        return None
    tops = backbones.find(backbone).include_top
    found = sorted(Path(folder).glob(f"{backbone.removesuffix('_fc2')}_*.h5"))
    return next((str(path) for path in found if ("no_top" not in path.name) == tops), None)


@contextmanager
def _short_timeouts() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_ANSWER_WITHIN)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _contact_sheet(index_root: str, store: str, result: EmbedResult) -> str:
    """Ask with a picture of each label, each one's own uri left out of its answer."""
    opened = Index.open(index_root)
    live = live_rows(store, result.manifest, ("uri", "label", "part", "row", "uri_hash"))
    labels: dict[str, str | None] = {}
    seen: dict[str | None, int] = {}
    shuffled = sample(live, len(live), salt=1)
    for uri, label in zip(shuffled.column("uri"), shuffled.column("label"), strict=True):
        if uri is not None and len(labels) < _QUERIES and (label is None or seen.get(label, 0) < _PER_LABEL):
            labels[uri] = label
            seen[label] = seen.get(label, 0) + 1
    answers = [_ask(opened, uri) for uri in sorted(labels, key=lambda uri: (labels[uri] or "", uri))]
    return sheet(opened, answers, labels)


def _ask(opened: Index, uri: str) -> Answer:
    data = storage.read(uri)
    try:
        hits = opened.search_images([data], _NEIGHBOURS + 1)[0]
    except ImageRejected as error:  # the file was changed meanwhile
        return Answer(uri, data, (), str(error))
    return Answer(uri, data, [hit for hit in hits if hit.uri != uri][:_NEIGHBOURS])


def _summary(result: EmbedResult, manifest: IndexManifest, embedding: float, seconds: float) -> str:
    counts, measured = result.manifest.accounting, manifest.measured
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.rejected.items())
    untrained = manifest.embedder.untrained
    weights = "UNTRAINED (random): neighbours share looks, not meaning" if untrained else manifest.embedder.weights
    rows: list[tuple[str, object]] = [
        ("images", counts.listed),
        ("rejected", f"{counts.rejects:,}" + (f" ({reasons})" if reasons else "")),
        ("backbone", manifest.embedder.backbone),
        ("weights", weights),
        (
            "index",
            f"{manifest.kind}, {len(manifest.shards)} shards, {manifest.dim} → {manifest.reduced_dim} dimensions",
        ),
        ("seconds", f"{seconds:.1f}, embedding {embedding:.1f}"),
        ("images/s", f"{counts.embedded / embedding:.0f}"),
        ("bytes a vector", f"{measured['bytes_per_vector']:.0f}"),
        ("recall@10", f"{measured['recall_at_10']:.3f} of exact search in {manifest.reduced_dim} dimensions"),
        ("P@1 by label", "–" if measured["precision_at_1"] is None else f"{measured['precision_at_1']:.3f}"),
        ("lookup, p50", f"{measured['p50_us']:.0f} µs"),
    ]
    return console.table(rows)


if __name__ == "__main__":
    sys.exit(cli.main(["demo", *sys.argv[1:]]))
