"""Embed images into a store, touching only what is new or changed.

    lookalike embed --images photos/ --store store/
    lookalike embed --images gs://bucket/photos --store gs://bucket/store --runner=DataflowRunner …

Run it again: nothing is embedded twice. Interrupt it: the next run goes on where it stopped.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from jobs import backbones, calibration, cli, console
from jobs.options import option, parse
from pipelines.embed import EmbedRequest, EmbedResult, require_images, run
from pipelines.lease import leased
from pipelines.runner import Runner
from serving import storage
from serving.embedder import copy_artifact, has_saved_model, read_description
from serving.errors import UsageError
from serving.images import Limits
from serving.litert import LITERT
from transforms.engines import AUTO, ENGINES, TENSORFLOW, has_gpu
from transforms.listing import Listing
from transforms.reading import Ahead

WAIT = "seconds to wait for another run on the same store or index to end; exit code 4 when it does not"


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
    precision: str = option(
        "the network's arithmetic; int8 is calibrated on some of the images once a store, and what it costs is printed",
        calibration.FLOAT32,
        choices=calibration.PRECISIONS,
    )


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
    wait: float = option(WAIT, 0.0, metavar="SECONDS")


def main(argv: Sequence[str]) -> int:
    """Run the job."""
    options, beam_arguments = parse(Options, argv, "embed", __doc__ or "", beam=True)
    runner = Runner(beam_arguments, console.Bar())
    started = time.monotonic()
    asked = request(options, runner)
    with leased(asked.store, "embed", wait=options.wait) as lease:
        result = run(asked, runner, lease.check)
    print(report(result, time.monotonic() - started, engine_that_ran(result, asked, runner)))
    return 0


def request(options: Options, runner: Runner) -> EmbedRequest:
    """Check the options and export or find the embedder."""
    store, images = storage.normalize(options.store), tuple(storage.normalize(uri) for uri in options.images)
    limits = Limits(options.max_pixels, options.max_bytes, options.min_side)
    listing = Listing(images, options.labels, options.all_files)
    require_images(listing)  # before an export that takes its time
    embedder = find_embedder(options, store, Purpose(listing, limits, options.engine, runner.is_local))
    return EmbedRequest(
        images=images,
        store=store,
        embedder=embedder,
        labels=options.labels,
        all_files=options.all_files,
        limits=limits,
        unit_size=options.unit_size,
        threads=options.threads,
        ahead=Ahead(options.read_ahead),
        engine=options.engine,
        vector_type=options.vector_type,  # type: ignore[arg-type]
        max_reject_ratio=options.max_reject_ratio,
        retry_rejects=options.retry_rejects,
    )


@dataclass(frozen=True, slots=True)
class Purpose:
    """What an embedder is for: which images, run by what and where."""

    images: Listing
    limits: Limits
    engine: str
    is_local: bool
    """Whether the workers share this machine."""

    @property
    def may_use_tensorflow(self) -> bool:
        """Tell whether a worker may run the network with TensorFlow; other machines may have GPUs."""
        return self.engine == TENSORFLOW or (self.engine == AUTO and (not self.is_local or has_gpu()))


def find_embedder(options: EmbedderOptions, store: str, purpose: Purpose) -> str:
    """Return the URI of the artifact in the store, put there if need be."""
    folder = storage.join(store, "embedders")
    if options.embedder is not None:
        return _copied(options.embedder, folder, options.precision, purpose.engine)
    if options.precision == calibration.FLOAT32:
        return backbones.ensure_exported(
            folder, options.backbone, options.weights, options.seed, purpose.may_use_tensorflow
        )
    if purpose.engine == TENSORFLOW:
        raise UsageError(_INT8_IS_FOR_LITERT)
    with backbones.opened(options.backbone, options.weights, options.seed) as network:
        found = calibration.find(store, network.spec)
        if found is not None:
            return found
        uri = calibration.export(store, network, purpose.images, purpose.limits)
    print(calibration.describe(read_description(uri)))
    return uri


_INT8_IS_FOR_LITERT = "--engine tensorflow runs no int8; take --engine litert, or --precision float32"


def _copied(embedder: str, folder: str, precision: str, engine: str) -> str:
    source = storage.normalize(embedder)
    found = read_description(source).spec.precision
    if precision != calibration.FLOAT32 and precision != found:
        raise UsageError(
            f"--embedder {embedder} is {found} already; leave out --precision {precision}, or name --backbone and "
            "--weights instead"
        )
    if engine == TENSORFLOW and found == calibration.INT8:
        raise UsageError(f"--embedder {embedder} is int8, which --engine tensorflow does not run; take --engine litert")
    uri = copy_artifact(source, folder)
    if engine == TENSORFLOW and not has_saved_model(uri):
        raise UsageError(
            f"--embedder {embedder} holds no SavedModel, which --engine tensorflow runs; take --engine litert, or name "
            "--backbone and --weights instead"
        )
    return uri


def engine_that_ran(result: EmbedResult, request: EmbedRequest, runner: Runner) -> str | None:
    """Say what ran the network, and why where that was left to us; None when it was not run."""
    ran = [name for name in (LITERT, TENSORFLOW) if result.counters.get(f"embed/images_by_{name}")]
    if not ran:
        return None
    why = _why_litert(request.embedder, runner) if request.engine == AUTO and ran == [LITERT] else ""
    return " and ".join(ran) + why


def _why_litert(embedder: str, runner: Runner) -> str:
    if read_description(embedder).spec.precision == calibration.INT8:
        return " (int8)"
    if runner.is_local and not has_gpu():
        return " (no GPU here)"
    return " (the workers have no GPU)" if has_saved_model(embedder) else " (the embedder has no SavedModel)"


def report(result: EmbedResult, seconds: float, engine: str | None) -> str:
    """Say what a run did."""
    manifest = result.manifest
    if not result.changed:
        return f"nothing to do: all {manifest.rows:,} images are as run {manifest.run_id} left them"
    counts = manifest.accounting
    rows: list[tuple[str, object]] = [
        ("run", manifest.run_id),
        ("embedder", f"{manifest.embedder.backbone}, {manifest.embedder.weights}, {manifest.dim} dimensions"),
        *([("engine", engine)] if engine else []),
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
