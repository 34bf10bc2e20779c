"""Remove what neither a published version of an index, nor its store's runs in use, nor a job at work needs.

    lookalike gc --index index/ --dry-run
    lookalike gc --index index/ --store store/ --keep 3

The current version and those published right before it stay, with all they were made from. Without --store nothing of a
store is removed. What is younger than --min-age may be a job's at work, and stays.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jobs import cli, console
from jobs.options import option, parse
from pipelines.garbage import Collected, GcRequest, run
from pipelines.sorting import Pile
from serving import storage

_NAMED = 3
"""Names told of each kind."""
_COUNTED = ("part", "partial", "temporary file")
"""Kinds whose names say nothing to anybody."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `lookalike gc`."""

    index: str = option("the index: a folder, or a gs:// or s3:// prefix")
    store: str | None = option("the embedding store to clean up too", None)
    keep: int = option("published versions to keep, the current one included; runs of the store likewise", 2)
    min_age: float = option("hours for which what may be a job's at work is spared", 24.0, metavar="HOURS")
    dry_run: bool = option("say what would be removed, and remove nothing", False)
    wait: float = option("seconds to wait for a job at work on the index or the store to end", 0.0, metavar="SECONDS")


def main(argv: Sequence[str]) -> int:
    """Run the job."""
    options, _ = parse(Options, argv, "gc", __doc__ or "")
    store = None if options.store is None else storage.normalize(options.store)
    index = storage.normalize(options.index)
    print(report(run(GcRequest(index, store, options.keep, options.min_age, options.dry_run, options.wait))))
    if options.dry_run:
        print("dry run: nothing was removed")
    return 0


def report(collected: Collected) -> str:
    """Say what was removed, what stays and why, and what had to be left."""
    lines = []
    if collected.removed:
        removed = _rows(collected.removed)
        total = ("total", *(sum(int(row[column]) for row in removed) for column in (1, 2)), "")
        lines.append(console.table([*removed, total], ("removed", "files", "bytes", "which")))
    else:
        lines.append("nothing to remove")
    lines.append(console.table(_rows(collected.kept), ("kept", "files", "bytes", "which")))
    return "\n".join(["\n\n".join(lines), *collected.left])


def _rows(piles: Iterable[Pile]) -> list[tuple[str, int, int, str]]:
    """Sum piles up by kind and by why they stay."""
    files: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    names: dict[tuple[str, str], list[str]] = {}
    for pile in piles:
        what = pile.kind, pile.why
        files[what] += len(pile.files)
        sizes[what] += pile.size
        names.setdefault(what, []).append(pile.name)
    return [(kind, files[kind, why], sizes[kind, why], _which(kind, why, names[kind, why])) for kind, why in names]


def _which(kind: str, why: str, names: Iterable[str]) -> str:
    distinct = [] if kind in _COUNTED else list(dict.fromkeys(names))
    told = ", ".join(distinct[:_NAMED])
    more = f"and {len(distinct) - _NAMED:,} more" if len(distinct) > _NAMED else ""
    return " ".join(word for word in (told, more, f"({why})" if why else "") if word)


if __name__ == "__main__":
    sys.exit(cli.main(["gc", *sys.argv[1:]]))
