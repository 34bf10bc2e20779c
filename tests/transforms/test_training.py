import contextlib

import faiss
import numpy as np
import pytest
import stores

from serving.errors import UsageError
from serving.quantizer import Quantizer
from transforms.training import LARGEST_SAMPLE, SMALLEST, Design, _one_thread, design, train


@contextlib.contextmanager
def threads(count):
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def trained(vectors, **options):
    shape = design(len(vectors), vectors.shape[1], **options)
    return shape, Quantizer(train(shape, vectors.shape[1], vectors))


@pytest.fixture(scope="module")
def vectors():
    return stores.clustered(1500, 48)


@pytest.fixture(scope="module")
def reduced_by_numpy(vectors):
    """L2-normalise, centre, SVD: the mean, the top 16 directions in rows and the variances along all."""
    data = unit(vectors.astype(np.float64))
    mean = data.mean(axis=0)
    _, sizes, directions = np.linalg.svd(data - mean, full_matrices=False)
    return mean, directions[:16], sizes**2 / len(data)


# The design


def test_a_collection_too_small_to_train_on_gets_an_exact_index():
    assert SMALLEST == 624
    assert design(623, 48) == Design("exact", 48, 1, 4 * 48, 0)
    assert design(1, 48, 16, 7) == Design("exact", 48, 1, 4 * 48, 0)
    assert design(624, 48, 16) == Design("ivf-pq", 16, 8, 4, 624)


@pytest.mark.parametrize("rows", [624, 700, 5000, 10**5, 10**6, 10**7, 10**9])
def test_lists_grow_with_the_root_of_the_rows_and_can_be_trained(rows):
    shape = design(rows, 1280)
    assert shape.nlist & (shape.nlist - 1) == 0
    assert shape.nlist <= 4 * rows**0.5 < 2 * shape.nlist or 39 * 2 * shape.nlist > rows / 2
    assert 39 * shape.nlist <= shape.sample <= rows
    assert shape.sample <= max(LARGEST_SAMPLE, 39 * shape.nlist)
    assert shape.dim == 128


@pytest.mark.parametrize("nlist", [None, 1, 2, 3, 16, 100])
@pytest.mark.parametrize("dim", [2, 128, 1000])
def test_a_sample_is_enough_for_codebooks_and_for_the_transform(nlist, dim):
    shape = design(5000, 1280, dim, nlist)
    assert shape.sample >= max(SMALLEST, 39 * shape.nlist, shape.dim)
    assert shape.nlist == (nlist or shape.nlist)


@pytest.mark.parametrize("dim", [2, 4, 6, 10, 16, 30, 48])
def test_the_design_says_how_many_bytes_a_code_takes(vectors, dim):
    shape, quantizer = trained(vectors, dim=dim)
    assert shape.code_bytes == quantizer.ivf.code_size == quantizer.ivf.pq.code_size
    assert quantizer.reduced_dim == shape.dim == dim
    assert quantizer.refine_size == dim
    assert quantizer.code_size == shape.code_bytes + 1, "a byte names a list of up to 256"


def test_an_exact_index_keeps_whole_vectors():
    shape, quantizer = trained(stores.clustered(50, 12))
    assert (quantizer.exact, quantizer.refine_size, quantizer.ivf.nlist) == (True, 0, 1)
    assert shape.code_bytes == quantizer.ivf.code_size == 4 * 12


@pytest.mark.parametrize(
    ("rows", "raw_dim", "dim", "expected"),
    [(5000, 48, 128, 48), (5000, 1280, 64, 64), (5000, 49, 128, 48), (625, 1280, 1280, 624), (5000, 7, 4, 4)],
)
def test_no_more_dimensions_than_there_are_vectors_or_than_these_have(rows, raw_dim, dim, expected):
    assert design(rows, raw_dim, dim).dim == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dim": 1}, r"--dim is 1; take at least 2"),
        ({"dim": 0}, r"--dim is 0; take at least 2"),
        ({"dim": -4}, r"--dim is -4; take at least 2"),
        ({"dim": 33}, r"--dim 33 is odd; codes stand for 2 dimensions each, take an even one"),
        ({"nlist": 0}, r"--nlist is 0; take at least 1"),
        ({"nlist": -1}, r"--nlist is -1; take at least 1"),
        ({"nlist": 26}, r"--nlist is 26; 1000 vectors can train 1 to 25 lists"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(options, said):
    with pytest.raises(UsageError, match=said):
        design(1000, 48, **options)


@pytest.mark.parametrize("options", [{"dim": 1}, {"dim": 33}, {"nlist": 0}, {"nlist": -5}])
def test_wrong_values_are_refused_for_small_collections_too(options):
    with pytest.raises(UsageError, match=r"--(dim|nlist)"):
        design(50, 48, **options)


def test_as_many_lists_as_can_be_trained_are_accepted():
    assert design(1000, 48, nlist=25).nlist == 25


# Training


@pytest.mark.parametrize("count", [2, 3])
def test_training_does_not_depend_on_threads(vectors, count):
    shape = design(len(vectors), 48, 16)
    with threads(1):
        alone = train(shape, 48, vectors)
    with threads(count):
        together = train(shape, 48, vectors)
    assert alone == together


def test_training_depends_on_the_vectors_alone(vectors):
    shape = design(len(vectors), 48, 16)
    np.random.seed(1)
    first = train(shape, 48, vectors)
    np.random.seed(2)
    assert train(shape, 48, vectors.copy()) == first
    assert train(shape, 48, vectors[::-1].copy()) != first


def test_the_number_of_threads_comes_back_whatever_happens():
    with threads(2):
        with contextlib.suppress(ZeroDivisionError), _one_thread():
            assert faiss.omp_get_max_threads() == 1
            raise ZeroDivisionError
        assert faiss.omp_get_max_threads() == 2


def test_training_is_quiet(vectors, capfd):
    trained(vectors, dim=8, nlist=1)
    assert capfd.readouterr() == ("", "")


def test_the_transform_is_a_centred_pca_between_two_normalisations(vectors, reduced_by_numpy):
    mean, directions, variances = reduced_by_numpy
    _, quantizer = trained(vectors, dim=16)
    first, pca, second = quantizer.chain
    assert isinstance(first, faiss.NormalizationTransform)
    assert isinstance(second, faiss.NormalizationTransform)
    found = faiss.vector_to_array(pca.A).reshape(16, 48).astype(np.float64)
    np.testing.assert_allclose(found @ found.T, np.eye(16), atol=1e-4)
    # The same subspace: all principal angles are nought.
    np.testing.assert_allclose(np.linalg.svd(found @ directions.T)[1], 1, atol=1e-3)
    centred = unit(vectors.astype(np.float64)) - mean
    assert np.square(centred @ found.T).mean(axis=0) == pytest.approx(variances[:16], rel=1e-3)
    assert np.square(centred @ found.T).sum() == pytest.approx(len(vectors) * variances[:16].sum(), rel=1e-3)
    np.testing.assert_allclose(faiss.vector_to_array(pca.b), -found @ mean, atol=1e-4)


def test_reducing_equals_numpy(vectors, reduced_by_numpy):
    mean, directions, _ = reduced_by_numpy
    _, quantizer = trained(vectors, dim=16)
    reduced = quantizer.reduce(vectors)
    expected = unit((unit(vectors.astype(np.float64)) - mean) @ directions.T)
    assert reduced.shape == expected.shape
    # Directions may be mirrored, or turned where variances are nearly equal; angles between vectors may not.
    np.testing.assert_allclose(reduced @ reduced.T, expected @ expected.T, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(reduced, axis=1), 1, atol=1e-6)


def test_reducing_equals_what_faiss_does_with_queries(vectors):
    _, quantizer = trained(vectors, dim=16)
    by_faiss = np.ascontiguousarray(vectors)
    for transform in quantizer.chain:
        by_faiss = transform.apply(by_faiss)
    np.testing.assert_allclose(quantizer.reduce(vectors), by_faiss, atol=1e-5)


def test_codebooks_are_trained_on_reduced_vectors_and_not_on_what_lists_leave_of_them(vectors):
    _, quantizer = trained(vectors, dim=16)
    reduced = quantizer.reduce(vectors)
    refine = quantizer.empty_refine()
    ranges = faiss.vector_to_array(refine.sq.trained).reshape(2, 16)
    np.testing.assert_allclose(ranges, [reduced.min(axis=0), np.ptp(reduced, axis=0)], atol=1e-5)
    lengths = np.linalg.norm(quantizer.ivf.quantizer.reconstruct_n(0, quantizer.ivf.nlist), axis=1)
    np.testing.assert_array_less(lengths, 1 + 1e-5)
    codes = quantizer.encode(vectors).codes[:, 1:]
    assert (codes == quantizer.ivf.pq.compute_codes(reduced)).all(axis=1).mean() >= 0.999
    # Sixteen centroids a pair of dimensions leave less than a tenth of a vector of length one.
    assert np.square(quantizer.ivf.pq.decode(codes) - reduced).sum(axis=1).mean() < 0.1


def test_an_index_of_wide_vectors_from_few_rows_is_finite():
    vectors = stores.clustered(700, 800)
    shape, quantizer = trained(vectors, dim=800)
    assert shape.dim == 700
    reduced = quantizer.reduce(vectors)
    assert np.isfinite(reduced).all()
    np.testing.assert_allclose(np.linalg.norm(reduced, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 300])
def test_an_exact_index_searches_exactly(count):
    vectors = stores.clustered(count, 12)
    _, quantizer = trained(vectors)
    lists = quantizer.empty_lists()
    lists.add(quantizer.reduce(vectors))
    queries = unit(stores.clustered(40, 12, seed=9).astype(np.float64))
    scores, found = lists.search(queries.astype(np.float32), min(5, count))
    exact = queries @ unit(vectors.astype(np.float64)).T
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :5], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, found, axis=1), scores, atol=1e-6)


def test_the_lists_hold_every_vector_near_its_own(vectors):
    """A trained index finds most vectors by themselves."""
    _, quantizer = trained(vectors, dim=16)
    lists = quantizer.empty_lists()
    reduced = quantizer.reduce(vectors)
    lists.add(reduced)
    assert lists.ntotal == len(vectors)
    assert not quantizer.ivf.ntotal, "the trained index itself stays empty"
    lists.nprobe = lists.nlist
    _, found = lists.search(reduced, 10)
    assert np.mean((found == np.arange(len(vectors))[:, np.newaxis]).any(axis=1)) > 0.8
