"""What became of a catalog: two of them, sorted by uri, joined as they stream by."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transforms.planning import merge_join
from transforms.schema import EMBEDDED, CatalogRow


@dataclass(frozen=True, slots=True)
class Changes:
    """How the rows of an index came out of those of an earlier one.

    `added + changed + reused` are its rows, `changed + reused + removed` those of the earlier one.
    """

    added: int = 0
    changed: int = 0
    """Of the same uri, but of other bytes or embedded by another embedder."""
    removed: int = 0
    reused: int = 0
    relabelled: int = 0
    """Of the reused, those whose label changed."""
    rejected: int = 0
    """Listed, but without an embedding."""


def compare(rows: Iterable[CatalogRow], earlier: Iterable[CatalogRow], same_embedder: bool = True) -> Changes:
    """Count what became of the rows of an `earlier` catalog; holds one row of each."""
    counts: Counter[str] = Counter()
    for row, known in merge_join(rows, earlier):
        if row is not None and row.status != EMBEDDED:
            counts["rejected"] += 1
            row = None
        if known is not None and known.status != EMBEDDED:
            known = None
        if row is None or known is None:
            counts["added" if row else "removed"] += bool(row or known)
        elif row.etag != known.etag or not same_embedder:
            counts["changed"] += 1
        else:
            counts["reused"] += 1
            counts["relabelled"] += row.label != known.label
    return Changes(**counts)


def fresh(rows: Iterable[CatalogRow], earlier: Iterable[CatalogRow]) -> Iterator[CatalogRow]:
    """Yield the embedded rows that an `earlier` catalog does not hold, or not embedded of these bytes."""
    for row, known in merge_join(rows, earlier):
        if row is None or row.status != EMBEDDED:
            continue
        if known is None or (known.status, known.etag) != (EMBEDDED, row.etag):
            yield row
