"""Make a finished version of an index the current one, after checking that it is there whole.

lookalike publish 1f4c09502d09de0e --index index/
lookalike publish 1f4c --index index/ --verify
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs import cli
from jobs.options import option, parse, positional
from pipelines.versions import publish
from serving import storage


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `lookalike publish`."""

    version: str = positional("the version, or the first characters of its name, 4 or more", "VERSION")
    index: str = option("the index: a folder, or a gs:// or s3:// prefix")
    verify: bool = option("read every byte again before, as `lookalike verify` does", False)


def main(argv: Sequence[str]) -> int:
    """Run the job."""
    options, _ = parse(Options, argv, "publish", __doc__ or "")
    moved = publish(storage.normalize(options.index), options.version, options.verify)
    if moved.before == moved.now:
        print(f"nothing to do: version {moved.now} is current")
    else:
        print(f"version {moved.now} is current" + (f"; before, {moved.before} was" if moved.before else ""))
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["publish", *sys.argv[1:]]))
