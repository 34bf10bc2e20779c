"""List the versions of an index: what they hold, what was measured on them, and which one is current.

lookalike versions --index index/
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs import cli, console
from jobs.options import option, parse
from pipelines.versions import Version, list_versions
from serving import storage
from serving.errors import NotFound

_HEADERS = ("version", "created", "images", "dims", "recall@10", "P@1", "bytes", "")


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `lookalike versions`."""

    index: str = option("the index: a folder, or a gs:// or s3:// prefix")
    json: bool = option("print JSON, one document", False)


def main(argv: Sequence[str]) -> int:
    """Run the job."""
    options, _ = parse(Options, argv, "versions", __doc__ or "")
    index = storage.normalize(options.index)
    versions = list_versions(index)
    if not versions:
        raise NotFound(f"{index} holds no version of an index; build one with `lookalike index`")
    print(json.dumps([as_dict(version) for version in versions], indent=1) if options.json else as_text(versions))
    return 0


def as_text(versions: Sequence[Version]) -> str:
    """Lay out the finished versions in a table; tell of the others in a line."""
    finished = [version for version in versions if version.finished]
    lines = [console.table(map(_row, finished), _HEADERS)] if finished else ["no version is finished"]
    lines += [f"version {version.name} cannot be used: {version.fault}" for version in finished if version.fault]
    unfinished = [version for version in versions if not version.finished]
    if unfinished:
        names, size = ", ".join(version.name for version in unfinished), sum(version.size for version in unfinished)
        lines.append(
            f"{len(unfinished)} unfinished ({size:,} bytes): {names}; the same job run again finishes it, `lookalike "
            "gc` removes it once it is old"
        )
    return "\n".join(lines)


def as_dict(version: Version) -> dict[str, Any]:
    """Describe a version for programs; what is not known is null."""
    manifest = version.manifest
    measured = manifest.measured if manifest else {}
    return {
        "version": version.name,
        "finished": version.finished,
        "current": version.back == 0,
        "previous": version.back or None,
        "created": manifest.created if manifest else None,
        "kind": manifest.kind if manifest else None,
        "images": manifest.rows if manifest else None,
        "dim": manifest.dim if manifest else None,
        "reduced_dim": manifest.reduced_dim if manifest else None,
        "recall_at_10": measured.get("recall_at_10"),
        "precision_at_1": measured.get("precision_at_1"),
        "bytes": version.size,
        "fault": version.fault,
    }


def _row(version: Version) -> tuple[object, ...]:
    told = as_dict(version)
    dims = f"{told['dim']} → {told['reduced_dim']}" if version.manifest else None
    mark = "" if version.back is None else "current" if version.back == 0 else "previous"
    measured = told["created"], told["images"], dims, told["recall_at_10"], told["precision_at_1"]
    return version.name, *measured, version.size, mark


if __name__ == "__main__":
    sys.exit(cli.main(["versions", *sys.argv[1:]]))
