"""A query comes into the index's space as the batch side brings rows there, alone or among others."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
import stores

from serving.errors import FormatError
from serving.quantizer import Quantizer
from serving.reduction import Reduction
from transforms.designing import Design, Wishes, designs
from transforms.training import train

RAW, ROWS = 48, 1500


def custom(key: str) -> Design:
    return designs(ROWS, RAW, Wishes(factory=key))[0]


SHAPES: dict[str, Callable[[], Design]] = {
    "exact": lambda: designs(10, RAW, Wishes())[0],
    "pca": lambda: designs(ROWS, RAW, Wishes(dim=24, nlist=16))[0],
    "faithful": lambda: designs(ROWS, RAW, Wishes(dim=24, nlist=16, faithful=True))[0],
    "rotated": lambda: custom("OPQ8_16,IVF8,PQ8x4fs,Refine(SQ8)"),
    "two maps": lambda: custom("PCAR32,L2norm,PCAR16,IVF8,Flat"),
    "none": lambda: custom("IVF8,SQ8"),
}


@pytest.fixture(scope="module", params=SHAPES)
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    return Quantizer(train(SHAPES[request.param](), RAW, stores.clustered(ROWS, RAW)))


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Vectors of every length that a query may have after it was made safe; one of zeros."""
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((200, RAW)) * np.logspace(-11, 11, 200)[:, np.newaxis]
    vectors[7] = 0
    return vectors.astype(np.float32)


def length(vector: np.ndarray) -> float:
    return float(np.linalg.norm(vector.astype(np.float64)))


def alone(reduction: Reduction, vector: np.ndarray, dim: int) -> np.ndarray:
    return faiss.rev_swig_ptr(reduction.one(vector, length(vector)), dim).copy()


def test_many_are_reduced_as_rows_are(quantizer, vectors):
    before = vectors.copy()
    reduced = Reduction(quantizer.chain, RAW).many(vectors)
    assert (reduced.dtype, reduced.shape) == (np.float32, (200, quantizer.reduced_dim))
    assert reduced.flags.c_contiguous
    np.testing.assert_allclose(reduced, quantizer.reduce(vectors), atol=1e-5)
    np.testing.assert_array_equal(vectors, before)


def test_one_is_reduced_as_rows_are(quantizer, vectors):
    reduction, expected, before = Reduction(quantizer.chain, RAW), quantizer.reduce(vectors), vectors.copy()
    found = np.stack([alone(reduction, vector, quantizer.reduced_dim) for vector in vectors])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(vectors, before)


def test_no_vector_stays_none(quantizer):
    assert Reduction(quantizer.chain, RAW).many(np.empty((0, RAW), np.float32)).shape == (0, quantizer.reduced_dim)


def test_threads_share_no_buffer(quantizer, vectors):
    """All have reduced before the first looks at what it got."""
    reduction, expected = Reduction(quantizer.chain, RAW), quantizer.reduce(vectors)
    barrier = threading.Barrier(8)

    def reduce(number: int) -> np.ndarray:
        pointer = reduction.one(vectors[number], length(vectors[number]))
        barrier.wait(10)
        return faiss.rev_swig_ptr(pointer, quantizer.reduced_dim).copy()

    with ThreadPoolExecutor(8) as pool:
        for start in range(0, 80, 8):
            numbers = range(start, start + 8)
            np.testing.assert_allclose(np.stack([*pool.map(reduce, numbers)]), expected[start : start + 8], atol=1e-5)


def test_a_chain_that_ends_without_a_normalisation(vectors):
    matrix = np.random.default_rng(4).standard_normal((6, RAW)).astype(np.float32)
    linear = faiss.LinearTransform(RAW, 6, True)
    faiss.copy_array_to_vector(matrix.ravel(), linear.A)
    faiss.copy_array_to_vector(np.arange(6, dtype=np.float32), linear.b)
    some = vectors[90:110]
    expected = some.astype(np.float64) @ matrix.T + np.arange(6)
    reduction = Reduction([linear], RAW)
    np.testing.assert_allclose(reduction.many(some), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.stack([alone(reduction, one, 6) for one in some]), expected, rtol=1e-4, atol=1e-4)


def test_a_chain_of_nothing_changes_nothing(vectors):
    reduction = Reduction([], RAW)
    np.testing.assert_array_equal(reduction.many(vectors), vectors)
    np.testing.assert_array_equal(alone(reduction, vectors[3], RAW), vectors[3])


def test_a_transform_of_another_class_is_refused():
    with pytest.raises(FormatError, match="holds a RemapDimensionsTransform, which is not read here"):
        Reduction([faiss.RemapDimensionsTransform(4, 4, True)], 4)
