"""Index a store and publish: train, encode, merge, measure, move CURRENT.

    lookalike index --store store/ --index index/

Running it again on the same store builds nothing; vectors that are encoded are never encoded again.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs import cli, console
from jobs.embed import UNTRAINED, WAIT
from jobs.options import option, parse
from pipelines.index import run
from pipelines.lease import leased
from pipelines.runner import Runner
from pipelines.training import IndexRequest
from serving import storage
from serving.manifest import IndexManifest, load_run_manifest
from transforms.measuring import TARGET


@dataclass(frozen=True)  # without slots, so that `reindex` can inherit these and `embed`'s
class TrainOptions:
    """What a quantizer is trained on, and how."""

    store: str = option("the embedding store")
    index: str = option("the index: a folder, or a gs:// or s3:// prefix")
    dim: int | None = option("dimensions inside the index (default: 128, or what the budget allows)", None)
    nlist: int | None = option("inverted lists (default: chosen by the number of images)", None)
    recall_against: str = option(
        "rank for the order of the reduced vectors, or of the raw ones", "reduced", choices=("reduced", "raw")
    )
    max_bytes_per_vector: float | None = option("memory that a vector may take in an opened index", None, metavar="B")
    index_factory: str | None = option("FAISS's own key for the shape, for those who know better", None, metavar="KEY")


@dataclass(frozen=True)
class Options(TrainOptions):
    """Options of `lookalike index`."""

    shards: int = option("index shards; 0 chooses by the number of images", 0)
    target_recall: float | None = option(
        "recall@10 that the index must reach, or nothing is published (default: the cheapest that reaches "
        f"{TARGET}, else the best)",
        None,
        metavar="R",
    )
    max_latency_us: float | None = option("microseconds that half of the lookups may take", None, metavar="U")
    wait: float = option(WAIT, 0.0, metavar="SECONDS")


def request(options: TrainOptions) -> IndexRequest:
    """Check the options."""
    asked = {field.name for field in dataclasses.fields(IndexRequest)}
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name in asked}
    given |= {"store": storage.normalize(options.store), "index": storage.normalize(options.index)}
    return IndexRequest(**given)


def main(argv: Sequence[str]) -> int:
    """Run the job."""
    options, beam_arguments = parse(Options, argv, "index", __doc__ or "", beam=True)
    asked, runner = request(options), Runner(beam_arguments, console.Bar())
    load_run_manifest(asked.store)  # before anything is written where the index is to be
    with leased(asked.index, "index", wait=options.wait) as lease:
        manifest, changed = run(asked, runner, lease.check)
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
        ("search", _settings(manifest)),
        ("recall@10", measured["recall_at_10"]),
        ("recall@10, raw", measured["recall_at_10_raw"]),
        ("P@1 by label", measured["precision_at_1"]),
        ("bytes a vector", f"{measured['bytes_per_vector']} in memory"),
        ("lookup, p50", f"{measured['p50_us']:.0f} µs"),
    ]
    lines = [console.table(rows)]
    raw = manifest.parameters.get("recall_against") == "raw"
    reached, target = measured["recall_at_10_raw" if raw else "recall_at_10"], manifest.parameters["target_recall"]
    if reached < target:
        lines.append(
            f"recall@10 is below {target:g}, the best that could be tuned; other dimensions (--dim) may raise it"
        )
    if manifest.embedder.untrained:
        lines.append(UNTRAINED)
    return "\n".join(lines)


def _settings(manifest: IndexManifest) -> str:
    search = manifest.search
    words = [f"nprobe {search.nprobe}", f"rerank {search.rerank}"]
    words += [f"efSearch {search.ef_search}"] * bool(search.ef_search)
    words += [f"{search.rerank_raw} of them by whole vectors"] * bool(search.rerank_raw)
    return ", ".join(words)


if __name__ == "__main__":
    sys.exit(cli.main(["index", *sys.argv[1:]]))
