"""Encode what a quantizer has not seen yet, merge shards, measure, and publish unless told not to.

lookalike merge --store store/ --index index/ --quantizer 3f2a… --no-publish
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs import cli, console
from jobs.embed import WAIT
from jobs.index import report
from jobs.options import option, parse
from pipelines.index import build_version, publish
from pipelines.lease import leased
from pipelines.lineage import Origin
from pipelines.runner import Runner
from pipelines.training import IndexRequest, load_trained
from serving import storage
from serving.manifest import load_index_manifest, load_run_manifest, read_current


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `lookalike merge`."""

    store: str = option("the embedding store")
    index: str = option("the index")
    quantizer: str = option("id of the trained quantizer, as `lookalike train` prints it")
    shards: int = option("index shards; 0 chooses by the number of images", 0)
    no_publish: bool = option("leave the version unpublished", False)
    wait: float = option(WAIT, 0.0, metavar="SECONDS")


def main(argv: Sequence[str]) -> int:
    """Run the job."""
    options, beam_arguments = parse(Options, argv, "merge", __doc__ or "", beam=True)
    request = IndexRequest(storage.normalize(options.store), storage.normalize(options.index), shards=options.shards)
    trained, run = load_trained(request.index, options.quantizer), load_run_manifest(request.store)
    runner = Runner(beam_arguments, console.Bar())
    with leased(request.index, "merge", wait=options.wait) as lease:
        current = read_current(request.index, "version")
        parent = load_index_manifest(request.index, current[0]) if current else None
        manifest = build_version(request, run, trained, runner, Origin(parent, reused=True, why="it was asked for"))
        if not options.no_publish and (current is None or current[0] != manifest.version):
            publish(request.index, manifest.version, current[1] if current else None, lease.check)
    print(report(manifest))
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["merge", *sys.argv[1:]]))
