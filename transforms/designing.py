"""Choose the shape of an index from the size of the collection and what a vector may cost."""

import math
from dataclasses import dataclass

from serving.errors import UsageError

BITS = 4
SUBVECTOR = 2
"""Dimensions a 4-bit code stands for: 64 codes of 4 bits for 128 dimensions."""
DIM = 128
POINTS_PER_CENTROID = 39
"""Fewer training points per centroid than this and FAISS, rightly, complains."""
SMALLEST = POINTS_PER_CENTROID * (1 << BITS)
"""Collections below this size get an exact index: too little to train 16 centroids on."""
SAMPLE_BYTES = 1 << 30
"""What the training sample may take in memory; training holds some copies of it, reduced and not."""
QUERIES = 1000
"""Rows left out of training to measure with; a fifth of a small collection, none where too few would be left."""
GRAPH_FROM = 4096
"""From so many lists on a graph of the centroids (HNSW) finds the nearest faster than looking at them all."""

_ID_BYTES = 8
_POINTS_WANTED = 100
_SMALLEST_DIM = 16


@dataclass(frozen=True, slots=True)
class Design:
    """The shape of an index: `kind` is `ivf-pq`, `exact` or `custom`; `dim` counts the reduced dimensions."""

    kind: str
    dim: int
    nlist: int
    code_bytes: int
    """Of a vector's codes in the lists, without its list number."""
    sample: int
    """Vectors to train on."""
    refine_bytes: int = 0
    """Of the codes that candidates are ranked again by; 0 for none."""
    raw_bytes: int = 0
    """Of the codes of whole vectors, mapped from disk; 0 for none."""
    factory: str = ""
    """FAISS's own key, where the user gave one."""

    @property
    def resident_bytes(self) -> int:
        """Return the bytes a vector takes in memory: row number, codes, re-rank codes."""
        return _ID_BYTES + self.code_bytes + self.refine_bytes

    @property
    def graph(self) -> bool:
        """Tell whether the coarse quantizer is a graph."""
        return self.kind == "ivf-pq" and self.nlist >= GRAPH_FROM


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asks of an index's shape; None leaves the choice to `designs`."""

    dim: int | None = None
    nlist: int | None = None
    faithful: bool = False
    """Rank at last by codes of the whole vectors, for the order of the raw space."""
    max_bytes: float | None = None
    """Of memory a vector."""
    factory: str | None = None

    def __post_init__(self) -> None:
        if self.dim is not None and self.dim < SUBVECTOR:
            raise UsageError(f"--dim is {self.dim}; take at least {SUBVECTOR}")
        if self.dim is not None and self.dim % SUBVECTOR:
            raise UsageError(f"--dim {self.dim} is odd; codes stand for {SUBVECTOR} dimensions each, take an even one")
        if self.nlist is not None and self.nlist < 1:
            raise UsageError(f"--nlist is {self.nlist}; take at least 1")
        if self.max_bytes is not None and not self.max_bytes > 0:  # NaN neither
            raise UsageError(f"--max-bytes-per-vector is {self.max_bytes:g}; take more than 0")
        if self.factory and (self.dim or self.nlist or self.faithful or self.max_bytes):
            raise UsageError(
                "--index-factory says everything about the index's shape; leave out --dim, --nlist and "
                "--max-bytes-per-vector"
            )


def held_out(rows: int) -> int:
    """Return how many of `rows` are left out of training, to be asked with."""
    spared = min(QUERIES, rows // 5)
    return spared if rows - spared >= SMALLEST else 0  # a query or two would measure nothing


def designs(rows: int, raw_dim: int, wishes: Wishes) -> list[Design]:
    """Return shapes for `rows` vectors of `raw_dim` dimensions, the one to try first before those for want of it.

    In the reduced space fewer dimensions are faster; in the raw one more come nearer to it.
    """
    if rows < SMALLEST:
        return [_checked(Design("exact", raw_dim, 1, 4 * raw_dim, 0), wishes)]
    trained_on = rows - held_out(rows)
    if wishes.factory:
        return [Design("custom", 0, 0, 0, min(trained_on, _affordable(raw_dim)), factory=wishes.factory)]
    lists = _lists_for(trained_on, raw_dim) if wishes.nlist is None else wishes.nlist
    if lists > trained_on // POINTS_PER_CENTROID:
        most = trained_on // POINTS_PER_CENTROID
        raise UsageError(f"--nlist is {lists}; {trained_on} vectors can train 1 to {most} lists")
    if wishes.dim is not None:
        dims = [wishes.dim]
    elif wishes.faithful:
        dims = [DIM, 2 * DIM]
    else:
        dims = [DIM, DIM // 2, DIM // 4, _SMALLEST_DIM]
    dims = list(dict.fromkeys(min(dim, min(raw_dim, trained_on) // SUBVECTOR * SUBVECTOR) for dim in dims))
    shapes = [
        _ivf_pq(trained_on, raw_dim, dim, lists, refine, wishes.faithful) for dim in dims for refine in (True, False)
    ]
    if wishes.max_bytes is None:
        return [shape for shape in shapes if shape.refine_bytes]
    fitting = [shape for shape in shapes if shape.resident_bytes <= wishes.max_bytes]
    if not fitting:
        least = min(shape.resident_bytes for shape in shapes)
        raise UsageError(f"--max-bytes-per-vector is {wishes.max_bytes:g}; the smallest index takes {least}")
    # The richest that fits, then those that are smaller.
    return sorted(fitting, key=lambda shape: -shape.resident_bytes)


def _ivf_pq(rows: int, raw_dim: int, dim: int, lists: int, refine: bool, faithful: bool) -> Design:
    needed = max(SMALLEST, dim, POINTS_PER_CENTROID * lists)  # by the codebooks, the transform, the lists
    sample = min(rows, max(needed, min(_affordable(raw_dim), _POINTS_WANTED * max(lists, 1024))))
    code_bytes = math.ceil(dim // SUBVECTOR * BITS / 8)
    return Design("ivf-pq", dim, lists, code_bytes, sample, dim if refine else 0, raw_dim if faithful else 0)


def _checked(shape: Design, wishes: Wishes) -> Design:
    if wishes.max_bytes is not None and shape.resident_bytes > wishes.max_bytes:
        raise UsageError(
            f"--max-bytes-per-vector is {wishes.max_bytes:g}; below {SMALLEST} images there is too little to train "
            f"codes on, and whole vectors take {shape.resident_bytes}"
        )
    return shape


def _affordable(raw_dim: int) -> int:
    return max(SMALLEST, SAMPLE_BYTES // (4 * raw_dim))


def _lists_for(rows: int, raw_dim: int) -> int:
    """Return the power of two nearest 2 √rows, as far as the training sample reaches for it.

    Of twice as many the nearest are found no sooner, of half as many more codes have to be looked at.
    """
    trainable = min(rows, _affordable(raw_dim)) // POINTS_PER_CENTROID
    wanted = 2 ** round(math.log2(max(1.0, 2 * rows**0.5)))
    return int(max(1, min(wanted, 2 ** int(math.log2(max(1, trainable))))))
