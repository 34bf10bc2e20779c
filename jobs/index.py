"""Index a store and publish: train, encode, merge, measure, move CURRENT.

    lookalike index --store store/ --index index/

Running it again on the same store builds nothing; vectors that are encoded are never encoded again.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs import cli, console
from jobs.embed import UNTRAINED
from jobs.options import option, parse
from pipelines.index import IndexRequest, run
from pipelines.runner import Runner
from serving import storage
from serving.manifest import IndexManifest
from transforms.measuring import TARGET


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What a quantizer is trained on, and how."""

    store: str = option("the embedding store")
    index: str = option("the index: a folder, or a gs:// or s3:// prefix")
    dim: int = option("dimensions inside the index", 128)
    nlist: int | None = option("inverted lists (default: chosen by the number of images)", None)


@dataclass(frozen=True, slots=True)
class Options(TrainOptions):
    """Options of `lookalike index`."""

    shards: int = option("index shards; 0 chooses by the number of images", 0)


def request(options: TrainOptions, shards: int = 0) -> IndexRequest:
    """Check the options."""
    return IndexRequest(
        storage.normalize(options.store), storage.normalize(options.index), options.dim, options.nlist, shards
    )


def main(argv: Sequence[str]) -> int:
    """Run the job."""
    options, beam_arguments = parse(Options, argv, "index", __doc__ or "", beam=True)
    manifest, changed = run(request(options, options.shards), Runner(beam_arguments, console.Bar()))
    print(report(manifest) if changed else f"nothing to do: version {manifest.version} is this store's, and current")
    return 0


def report(manifest: IndexManifest) -> str:
    """Say what a version is and what was measured on it."""
    measured = manifest.measured
    kind = manifest.kind if manifest.kind != "exact" else "exact (too few images to train IVF-PQ on)"
    rows: list[tuple[str, object]] = [
        ("version", manifest.version),
        ("kind", kind),
        ("images", manifest.rows),
        ("dimensions", f"{manifest.dim} → {manifest.reduced_dim}"),
        ("shards", len(manifest.shards)),
        ("lists", manifest.parameters["nlist"]),
        ("search", f"nprobe {manifest.search.nprobe}, rerank {manifest.search.rerank}"),
        ("recall@10", measured["recall_at_10"]),
        ("recall@10, raw", measured["recall_at_10_raw"]),
        ("P@1 by label", measured["precision_at_1"]),
        ("bytes a vector", measured["bytes_per_vector"]),
        ("lookup, p50", f"{measured['p50_us']:.0f} µs"),
    ]
    lines = [console.table(rows)]
    if measured["recall_at_10"] < TARGET:
        lines.append(f"recall@10 is below {TARGET}, the best that could be tuned; more dimensions (--dim) may raise it")
    if manifest.embedder.untrained:
        lines.append(UNTRAINED)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.main(["index", *sys.argv[1:]]))
