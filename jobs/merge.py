"""Encode what a quantizer has not seen yet, merge shards, measure, and publish unless told not to.

lookalike merge --store store/ --index index/ --quantizer 3f2a… --no-publish
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs import cli, console
from jobs.index import report
from jobs.options import option, parse
from pipelines.index import IndexRequest, build_version, load_trained, publish
from pipelines.runner import Runner
from serving import storage
from serving.manifest import load_run_manifest, read_current


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `lookalike merge`."""

    store: str = option("the embedding store")
    index: str = option("the index")
    quantizer: str = option("id of the trained quantizer, as `lookalike train` prints it")
    shards: int = option("index shards; 0 chooses by the number of images", 0)
    no_publish: bool = option("leave the version unpublished", False)


def main(argv: Sequence[str]) -> int:
    """Run the job."""
    options, beam_arguments = parse(Options, argv, "merge", __doc__ or "", beam=True)
    request = IndexRequest(storage.normalize(options.store), storage.normalize(options.index), shards=options.shards)
    current = read_current(request.index, "version")
    trained = load_trained(request.index, options.quantizer)
    run = load_run_manifest(request.store)
    manifest = build_version(request, run, trained, Runner(beam_arguments, console.Bar()))
    if not options.no_publish and (current is None or current[0] != manifest.version):
        publish(request.index, manifest.version, current[1] if current else None)
    print(report(manifest))
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["merge", *sys.argv[1:]]))
