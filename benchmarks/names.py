"""What the image of a generated vector is called; apart, so that a process that searches loads nothing of embedding."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from serving.manifest import IndexManifest
from transforms.schema import hash_range, uri_hash


def uri_of(number: int) -> str:
    """Name the image of a vector; names sort as numbers do."""
    return f"photos/{number:09}.jpg"


def number_of(uri: str) -> int:
    """Return the number of the vector whose image has a name."""
    return int(uri[7:-4])


def numbering(info: IndexManifest) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """Return a function from an index's rows to the numbers of the vectors: a shard's rows are sorted by uri."""
    hashes = np.array([uri_hash(uri_of(number)) for number in range(info.rows)], np.uint64)
    ends = [np.uint64(hash_range(shard.buckets)[1]) for shard in info.shards]
    numbers = np.argsort(np.searchsorted(ends, hashes), kind="stable")
    return lambda rows: np.where(rows < 0, rows, numbers[rows])
