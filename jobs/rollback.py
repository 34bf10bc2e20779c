"""Make the version that was current before the current one again; once more, and it is the one before that.

lookalike rollback --index index/
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs import cli
from jobs.options import option, parse
from pipelines.versions import rollback
from serving import storage


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `lookalike rollback`."""

    index: str = option("the index: a folder, or a gs:// or s3:// prefix")


def main(argv: Sequence[str]) -> int:
    """Run the job."""
    options, _ = parse(Options, argv, "rollback", __doc__ or "")
    moved = rollback(storage.normalize(options.index))
    for skipped in moved.passed_over:
        print(f"passed over version {skipped}")
    print(f"rolled back from version {moved.before} to {moved.now}; `lookalike publish {moved.before}` undoes it")
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["rollback", *sys.argv[1:]]))
