"""What the worker needs of a library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Array = Any  # The environments hold different releases of NumPy, which type their arrays differently.


class Library(Protocol):
    """A library imports itself when it is made, so that memory measured later is the index's alone.

    All search with one thread.
    """

    knobs: dict[str, Sequence[int]]
    """What sets the effort of a search: the one to sweep as (least, most), then others with the values to try."""

    def build(self, vectors: Array, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Build from float32 [N, d] of unit length; return what is worth telling, such as the kind that was chosen."""

    def save(self, folder: Path) -> None:
        """Write the index."""

    def load(self, folder: Path, count: int, width: int, options: Mapping[str, Any]) -> None:
        """Open what `save` wrote: `count` vectors of `width`."""

    def set_effort(self, **knobs: int) -> None:
        """Set the knobs of the searches to come."""

    def search(self, query: Array, k: int) -> Any:
        """Return the ids nearest to one row, in whatever the library returns."""

    def search_batch(self, queries: Array, k: int) -> Array:
        """Return ids [Q, k]."""
