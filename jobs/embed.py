"""Embed images into a store, touching only what is new or changed.

    lookalike embed --images photos/ --store store/
    lookalike embed --images gs://bucket/photos --store gs://bucket/store --runner=DataflowRunner …

Run it again: nothing is embedded twice. Interrupt it: the next run goes on where it stopped.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from jobs import backbones, cli, console
from jobs.options import option, parse
from pipelines.embed import EmbedRequest, EmbedResult, require_images, run
from pipelines.runner import Runner
from serving import storage
from serving.embedder import copy_artifact
from serving.images import Limits
from transforms.engines import AUTO, ENGINES
from transforms.listing import Listing
from transforms.reading import Ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedderOptions:
    """Which embedder."""

    backbone: str = option(
        "what turns pictures into vectors", backbones.DEFAULT, choices=lambda: [*backbones.BACKBONES]
    )
    weights: str = option(
        "`imagenet` (downloaded by Keras, hash-checked), a weights file or URI, or `untrained`", "imagenet"
    )
    seed: int = option("seed of untrained weights", 0)
    embedder: str | None = option("an exported artifact to use as it is, instead of backbone and weights", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(EmbedderOptions):
    """Options of `lookalike embed`."""

    images: tuple[str, ...] = option("folders, globs, gs:// or s3:// prefixes, or manifests", metavar="URI")
    store: str = option("the embedding store: a folder, or a gs:// or s3:// prefix")
    labels: str = option(
        "`parent` (the name of an image's folder below the one listed), `none`, or a manifest with uri and label",
        "parent",
    )
    all_files: bool = option("list files whose names are no image's, too", False)
    unit_size: int = option("images a work unit at most; more of them for collections of many millions", 512)
    threads: int = option("threads a worker; 0: its share of this machine's cores, or one on other machines", 0)
    engine: str = option(
        "what runs the network; `auto` takes TensorFlow on a GPU and LiteRT elsewhere", AUTO, choices=ENGINES
    )
    read_ahead: int = option("images read at once, ahead of those being embedded; more for slow stores", Ahead().images)
    vector_type: str = option("how vectors are kept", "float16", choices=["float16", "float32"])
    max_pixels: int = option("refuse larger images by their header", Limits().max_pixels)
    max_bytes: int = option("refuse larger files", Limits().max_bytes)
    min_side: int = option("refuse images smaller than this, in pixels", Limits().min_side)
    max_reject_ratio: float = option("fail a run that rejects a larger share of its images", 0.5)
    retry_rejects: bool = option("try images again that were rejected before", False)


def main(argv: Sequence[str]) -> int:
    """Run the job."""
    options, beam_arguments = parse(Options, argv, "embed", __doc__ or "", beam=True)
    runner = Runner(beam_arguments, console.Bar())
    started = time.monotonic()
    result = run(request(options), runner)
    print(report(result, time.monotonic() - started))
    return 0


def request(options: Options) -> EmbedRequest:
    """Check the options and export or find the embedder."""
    store, images = storage.normalize(options.store), tuple(storage.normalize(uri) for uri in options.images)
    require_images(Listing(images, options.labels, options.all_files))  # before an export that takes its time
    return EmbedRequest(
        images=images,
        store=store,
        embedder=find_embedder(options, store),
        labels=options.labels,
        all_files=options.all_files,
        limits=Limits(options.max_pixels, options.max_bytes, options.min_side),
        unit_size=options.unit_size,
        threads=options.threads,
        ahead=Ahead(options.read_ahead),
        engine=options.engine,
        vector_type=options.vector_type,  # type: ignore[arg-type]
        max_reject_ratio=options.max_reject_ratio,
        retry_rejects=options.retry_rejects,
    )


def find_embedder(options: EmbedderOptions, store: str) -> str:
    """Return the URI of the artifact in the store, put there if need be."""
    folder = storage.join(store, "embedders")
    if options.embedder is not None:
        return copy_artifact(storage.normalize(options.embedder), folder)
    return backbones.ensure_exported(folder, options.backbone, options.weights, options.seed)


def report(result: EmbedResult, seconds: float) -> str:
    """Say what a run did."""
    manifest = result.manifest
    if not result.changed:
        return f"nothing to do: all {manifest.rows:,} images are as run {manifest.run_id} left them"
    counts = manifest.accounting
    rows: list[tuple[str, object]] = [
        ("run", manifest.run_id),
        ("embedder", f"{manifest.embedder.backbone}, {manifest.embedder.weights}, {manifest.dim} dimensions"),
        ("listed", counts.listed),
        ("embedded", counts.embedded),
        ("reused", counts.reused),
        ("  relabelled", counts.relabelled),
        ("rejected", counts.rejects),
        *((f"  {reason}", count) for reason, count in counts.rejected.items()),
        ("gone", counts.gone),
        ("other files", result.skipped),
        ("seconds", f"{seconds:.1f}"),
    ]
    lines = [console.table([row for row in rows if row[1] != 0 or row[0] in ("listed", "embedded", "rejected")])]
    if manifest.embedder.untrained:
        lines.append(UNTRAINED)
    return "\n".join(lines)


UNTRAINED = "the weights are untrained (random): neighbours share colours and textures, not meaning"


if __name__ == "__main__":
    sys.exit(cli.main(["embed", *sys.argv[1:]]))
