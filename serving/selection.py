"""Searching among some rows only: which lists hold them, and when it is cheaper to look at each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from serving.rescoring import Rows
from serving.shards import Segment, list_ids

_SCANNED_FOR_ONE = 50
"""Codes that FAISS scans in the lists in the time of ranking one row by its re-rank code."""
_SMALL = 1024
"""Selections of so few rows are always ranked row by row."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Some rows (sorted), FAISS's selectors of them, one a segment, and the lists that hold any."""

    rows: Rows
    selectors: list[Any]
    lists: npt.NDArray[np.int64]
    _bitmaps: list[npt.NDArray[np.uint8]]
    """What the selectors point to."""

    @classmethod
    def of(cls, rows: Rows, segments: Sequence[Segment], nlist: int) -> "Selection":
        """Select `rows` among those of `segments`."""
        holding = np.zeros(nlist, bool)
        selectors, bitmaps = [], []
        for segment in segments:
            mine = rows[slice(*np.searchsorted(rows, [segment.start, segment.start + segment.rows]))] - segment.start
            wanted = np.zeros(segment.rows, bool)
            wanted[mine] = True
            bitmaps.append(np.packbits(wanted, bitorder="little"))
            selectors.append(faiss.IDSelectorBitmap(segment.rows, faiss.swig_ptr(bitmaps[-1])))
            for number in range(nlist):
                holding[number] |= bool(wanted[list_ids(segment.lists.invlists, number)].any())
        return cls(rows, selectors, np.flatnonzero(holding), bitmaps)

    def prefers_scan(self, nprobe: int, nlist: int, rows: int) -> bool:
        """Tell whether ranking every selected row costs less than searching the lists for them."""
        scanned = self.lists_to_visit(nprobe, nlist, rows) * rows / nlist
        return len(self.rows) <= max(_SMALL, scanned / _SCANNED_FOR_ONE)

    def lists_to_visit(self, nprobe: int, nlist: int, rows: int) -> int:
        """Return how many of the lists to visit, so that as many rows are seen as without a selection."""
        seen = nprobe * rows / nlist
        held = len(self.rows) / max(1, len(self.lists))
        return max(1, min(len(self.lists), math.ceil(max(nprobe, seen / max(held, 1e-9)))))
