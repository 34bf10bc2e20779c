"""Train a quantizer on a store, and print its id.

lookalike train --store store/ --index index/
"""

import sys
from collections.abc import Sequence

from jobs import cli, console
from jobs.index import TrainOptions, request
from jobs.options import parse
from pipelines.training import train_quantizer
from serving.manifest import load_run_manifest


def main(argv: Sequence[str]) -> int:
    """Run the job."""
    options, _ = parse(TrainOptions, argv, "train", __doc__ or "")
    wanted = request(options)
    trained = train_quantizer(wanted, load_run_manifest(wanted.store), progress=console.Bar())
    shape = trained.design
    rows = [
        ("quantizer", trained.quantizer),
        ("kind", shape.kind),
        ("dimensions", shape.dim),
        ("lists", shape.nlist),
        ("trained on", f"{shape.sample:,} of {trained.rows:,} vectors"),
    ]
    print(console.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
