"""What the image of a generated vector is called; apart, so that a process that searches loads nothing of embedding."""

import numpy as np
import numpy.typing as npt

from transforms.schema import uri_hash


def uri_of(number: int) -> str:
    """Name the image of a vector; names sort as numbers do."""
    return f"photos/{number:09}.jpg"


def number_of(uri: str) -> int:
    """Return the number of the vector whose image has a name."""
    return int(uri[7:-4])


def numbering(count: int) -> npt.NDArray[np.int64]:
    """Return the number of the vector in each row of an index of `count`: rows are sorted by their uri's hash."""
    return np.argsort(np.array([uri_hash(uri_of(number)) for number in range(count)], np.uint64))
