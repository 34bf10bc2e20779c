import contextlib

import faiss
import numpy as np
import pytest
import stores

from serving.errors import UsageError
from serving.quantizer import Quantizer
from transforms import designing
from transforms.designing import Design, Wishes, designs
from transforms.training import train


@contextlib.contextmanager
def threads(count):
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


pytestmark = pytest.mark.usefixtures("one_faiss_thread")


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def trained(vectors, **wishes):
    shape = designs(len(vectors), vectors.shape[1], Wishes(**wishes))[0]
    return shape, Quantizer(train(shape, vectors.shape[1], vectors))


def by_key(key, vectors):
    return Quantizer(train(Design("custom", 0, 0, 0, len(vectors), factory=key), vectors.shape[1], vectors))


def decoded(quantizer, vectors):
    """Return what the lists' codes of vectors stand for, and the number of the list of each."""
    codes = quantizer.encode(vectors).codes
    found = np.zeros((len(codes), quantizer.reduced_dim), np.float32)
    quantizer.ivf.sa_decode_c(len(codes), faiss.swig_ptr(codes), faiss.swig_ptr(found))
    return found, codes[:, 0] + 256 * (codes[:, 1] if quantizer.code_size > quantizer.ivf.code_size + 1 else 0)


def spans(store, dim):
    """Return the least value of each dimension that 8-bit codes stand for, and the width above it."""
    low, width = faiss.vector_to_array(store.sq.trained).reshape(2, dim)
    return low, width


def loss(vectors, stand_ins):
    return np.square(vectors.astype(np.float64) - stand_ins).sum(axis=1).mean()


def coded_alone(vectors, dim):
    """Return what codes of as many bytes stand for, trained on the vectors as they are."""
    codes = faiss.ProductQuantizer(dim, dim // 2, 4)
    codes.train(vectors)
    return codes.decode(codes.compute_codes(vectors))


@pytest.fixture(scope="module")
def vectors():
    return stores.clustered(1500, 48)


@pytest.fixture(scope="module")
def ivf_pq(vectors):
    """16 dimensions, 16 lists."""
    return trained(vectors, dim=16)[1]


@pytest.fixture(scope="module")
def faithful(vectors):
    """16 dimensions, and 8-bit codes of whole vectors."""
    return trained(vectors, dim=16, faithful=True)[1]


@pytest.fixture(scope="module")
def reduced_by_numpy(vectors):
    """L2-normalise, centre, SVD: the mean, the top 16 directions in rows and the variances along all."""
    data = unit(vectors.astype(np.float64))
    mean = data.mean(axis=0)
    _, sizes, directions = np.linalg.svd(data - mean, full_matrices=False)
    return mean, directions[:16], sizes**2 / len(data)


# What is deterministic


@pytest.mark.parametrize("wishes", [{}, {"faithful": True}, {"factory": "OPQ2_8,IVF8,PQ2x4,Refine(SQ8)"}])
def test_training_does_not_depend_on_threads(vectors, wishes):
    shape = designs(len(vectors), 48, Wishes(**wishes if "factory" in wishes else {"dim": 16, **wishes}))[0]
    alone = train(shape, 48, vectors)
    for count in (2, 3):
        with threads(count):
            assert train(shape, 48, vectors) == alone


def test_training_through_a_graph_does_not_depend_on_threads(vectors, monkeypatch):
    monkeypatch.setattr(designing, "GRAPH_FROM", 16)
    shape = designs(len(vectors), 48, Wishes(dim=16))[0]
    assert shape.graph
    alone = train(shape, 48, vectors)
    with threads(2):
        assert train(shape, 48, vectors) == alone


def test_training_depends_on_the_vectors_alone(vectors):
    shape = designs(len(vectors), 48, Wishes(dim=8))[0]
    np.random.seed(1)
    first = train(shape, 48, vectors)
    np.random.seed(2)
    assert train(shape, 48, vectors.copy()) == first
    assert train(shape, 48, vectors[::-1].copy()) != first


def test_training_is_quiet(vectors, capfd):
    trained(vectors, dim=8, nlist=1)
    assert capfd.readouterr() == ("", "")


# What the design says


@pytest.mark.parametrize("dim", [2, 6, 16, 48])
def test_the_design_says_how_many_bytes_a_code_takes(vectors, dim):
    shape, quantizer = trained(vectors, dim=dim)
    assert shape.code_bytes == quantizer.ivf.code_size == quantizer.ivf.pq.code_size
    assert quantizer.reduced_dim == shape.dim == dim
    assert quantizer.refine_size == shape.refine_bytes == dim
    assert quantizer.raw_size == shape.raw_bytes == 0
    assert quantizer.code_size == shape.code_bytes + 1, "a byte names a list of up to 256"


def test_a_design_without_codes_to_rank_again_by_has_none(vectors):
    shape, quantizer = trained(vectors, dim=16, max_bytes=12)
    assert (shape.refine_bytes, quantizer.refine_size, quantizer.refine) == (0, 0, None)
    assert quantizer.encode(vectors[:5]).refine is None
    assert quantizer.encode(vectors[:5]).codes.shape == (5, 1 + 4)


def test_an_exact_index_keeps_whole_vectors():
    shape, quantizer = trained(stores.clustered(50, 12))
    assert (quantizer.exact, quantizer.refine_size, quantizer.ivf.nlist) == (True, 0, 1)
    assert shape.code_bytes == quantizer.ivf.code_size == 4 * 12


# The space


def test_the_transform_is_one_linear_map_between_two_normalisations(vectors, ivf_pq, faithful, reduced_by_numpy):
    mean, directions, variances = reduced_by_numpy
    for quantizer in (ivf_pq, faithful):
        first, linear, second = quantizer.chain
        assert isinstance(first, faiss.NormalizationTransform)
        assert isinstance(second, faiss.NormalizationTransform)
        found = faiss.vector_to_array(linear.A).reshape(16, 48).astype(np.float64)
        np.testing.assert_allclose(found @ found.T, np.eye(16), atol=1e-4)
        # The same subspace as the PCA's: all principal angles are nought.
        np.testing.assert_allclose(np.linalg.svd(found @ directions.T)[1], 1, atol=1e-3)
        centred = unit(vectors.astype(np.float64)) - mean
        assert np.square(centred @ found.T).sum() == pytest.approx(len(vectors) * variances[:16].sum(), rel=1e-3)
        np.testing.assert_allclose(faiss.vector_to_array(linear.b), -found @ mean, atol=1e-4)


def test_the_space_is_the_pca_turned(vectors, ivf_pq, reduced_by_numpy):
    """Directions are not the PCA's own; angles between vectors are."""
    mean, directions, variances = reduced_by_numpy
    reduced = ivf_pq.reduce(vectors)
    projected = (unit(vectors.astype(np.float64)) - mean) @ directions.T
    expected = unit(projected)
    assert reduced.shape == expected.shape
    np.testing.assert_allclose(reduced @ reduced.T, expected @ expected.T, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(reduced, axis=1), 1, atol=1e-6)
    (_, linear, _) = ivf_pq.chain
    along = np.square((unit(vectors.astype(np.float64)) - mean) @ faiss.vector_to_array(linear.A).reshape(16, 48).T)
    assert np.abs(along.mean(axis=0) - variances[:16]).max() > 0.1 * variances[0], "turned indeed"


def test_reducing_equals_what_faiss_does_with_queries(vectors, ivf_pq):
    by_faiss = np.ascontiguousarray(vectors)
    for transform in ivf_pq.chain:
        by_faiss = transform.apply(by_faiss)
    np.testing.assert_allclose(ivf_pq.reduce(vectors), by_faiss, atol=1e-5)


def test_an_index_of_wide_vectors_from_few_rows_is_finite():
    vectors = stores.clustered(640, 650)
    shape, quantizer = trained(vectors, dim=650)
    assert shape.dim == 640
    reduced = quantizer.reduce(vectors)
    assert np.isfinite(reduced).all()
    np.testing.assert_allclose(np.linalg.norm(reduced, axis=1), 1, atol=1e-5)


# The codes


def test_a_rotation_makes_codes_of_skewed_vectors_better():
    """Along the PCA's own directions the first codes would have much to say and the last little."""
    rng = np.random.default_rng(0)
    skewed = (rng.standard_normal((2000, 16)) * 0.6 ** np.arange(16)).astype(np.float32)
    _, quantizer = trained(skewed, dim=16, nlist=1)
    found, _ = decoded(quantizer, skewed)
    turned = loss(quantizer.reduce(skewed), found)
    data = unit(skewed.astype(np.float64))
    _, _, directions = np.linalg.svd(data - data.mean(axis=0), full_matrices=False)
    straight = unit((data - data.mean(axis=0)) @ directions.T).astype(np.float32)
    # One list's centroid is nearly nought, so that both code about the same; lengths are one on both sides.
    assert turned < 0.8 * loss(straight, coded_alone(straight, 16))
    assert quantizer.distortion(skewed) == pytest.approx(turned, rel=1e-6)


def test_codes_are_of_what_centroids_leave_over(vectors, ivf_pq):
    assert ivf_pq.ivf.by_residual
    assert ivf_pq.ivf.metric_type == faiss.METRIC_INNER_PRODUCT
    reduced = ivf_pq.reduce(vectors)
    found, lists = decoded(ivf_pq, vectors)
    centroids = ivf_pq.centroids
    np.testing.assert_array_equal(lists, (reduced.astype(np.float64) @ centroids.T).argmax(axis=1))
    over = (reduced - centroids[lists]).astype(np.float32)
    codes = ivf_pq.ivf.pq.compute_codes(over)
    assert (codes == ivf_pq.encode(vectors).codes[:, 1:]).all(axis=1).mean() >= 0.999
    np.testing.assert_allclose(found, centroids[lists] + ivf_pq.ivf.pq.decode(codes), atol=0.05)
    # In the very same space, codes of the vectors themselves say less.
    assert loss(reduced, found) < 0.6 * loss(reduced, coded_alone(reduced, 16))


def test_distortion_is_the_mean_squared_distance_from_what_codes_stand_for(vectors, ivf_pq):
    asked = stores.clustered(300, 48, seed=8)
    found, _ = decoded(ivf_pq, asked)
    assert ivf_pq.distortion(asked) == pytest.approx(loss(ivf_pq.reduce(asked), found), rel=1e-6)
    assert 0.001 < ivf_pq.distortion(vectors) < ivf_pq.distortion(asked), "trained on the former"


def test_re_rank_codes_span_the_reduced_vectors(vectors, ivf_pq):
    reduced = ivf_pq.reduce(vectors)
    low, width = spans(ivf_pq.refine, 16)
    least, span = reduced.min(axis=0), np.ptp(reduced, axis=0)
    np.testing.assert_allclose([low, width], [least - 0.1 * span, 1.2 * span], atol=1e-5)
    codes = ivf_pq.encode(vectors).refine
    np.testing.assert_allclose(low + (codes + 0.5) / 255 * width, reduced, atol=1.01 * width.max() / 255)


def test_a_faithful_quantizer_keeps_a_byte_a_raw_dimension_beside_what_others_keep(vectors, ivf_pq, faithful):
    assert faithful.raw_size == 48
    assert (faithful.dim, faithful.reduced_dim, faithful.refine_size) == (48, 16, 16)
    codes, others = faithful.encode(vectors), ivf_pq.encode(vectors)
    np.testing.assert_array_equal(codes.codes, others.codes)
    np.testing.assert_array_equal(codes.refine, others.refine)
    assert others.raw is None
    assert codes.raw.shape == (1500, 48)
    whole = unit(vectors.astype(np.float64))
    low, width = spans(faithful.raw, 48)
    least, span = whole.min(axis=0), np.ptp(whole, axis=0)
    np.testing.assert_allclose([low, width], [least - 0.1 * span, 1.2 * span], atol=1e-6)
    np.testing.assert_allclose(low + (codes.raw + 0.5) / 255 * width, whole, atol=1.01 * width.max() / 255)


# The lists


def test_centroids_are_of_length_one_and_lists_are_the_nearest(vectors, ivf_pq):
    np.testing.assert_allclose(np.linalg.norm(ivf_pq.centroids, axis=1), 1, atol=1e-5)
    _, lists = decoded(ivf_pq, vectors)
    assert len(set(lists.tolist())) == ivf_pq.ivf.nlist == 16, "none is left empty"


def test_a_graph_of_centroids_gives_the_same_lists(vectors, ivf_pq, monkeypatch):
    monkeypatch.setattr(designing, "GRAPH_FROM", 16)
    shape, quantizer = trained(vectors, dim=16)
    coarse = faiss.downcast_index(quantizer.ivf.quantizer)
    assert shape.graph
    assert isinstance(coarse, faiss.IndexHNSWFlat)
    assert isinstance(faiss.downcast_index(ivf_pq.ivf.quantizer), faiss.IndexFlatIP)
    np.testing.assert_array_equal(quantizer.centroids, ivf_pq.centroids)
    np.testing.assert_array_equal(quantizer.encode(vectors).codes, ivf_pq.encode(vectors).codes)
    reduced = quantizer.reduce(stores.clustered(200, 48, seed=5))
    coarse.hnsw.efSearch = 16
    closeness, lists = coarse.search(reduced, 8)
    exact = reduced.astype(np.float64) @ quantizer.centroids.T
    np.testing.assert_array_equal(lists, np.argsort(-exact, axis=1)[:, :8])
    np.testing.assert_allclose(closeness, -np.sort(-exact, axis=1)[:, :8], atol=1e-5)


def test_below_so_many_lists_centroids_are_compared_one_by_one(vectors, monkeypatch):
    monkeypatch.setattr(designing, "GRAPH_FROM", 17)
    _, quantizer = trained(vectors, dim=8)
    assert isinstance(faiss.downcast_index(quantizer.ivf.quantizer), faiss.IndexFlatIP)


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


def test_the_lists_hold_every_vector_near_its_own(vectors, ivf_pq):
    """A trained index finds most vectors by themselves."""
    lists = ivf_pq.empty_lists()
    reduced = ivf_pq.reduce(vectors)
    lists.add(reduced)
    assert lists.ntotal == len(vectors)
    assert not ivf_pq.ivf.ntotal, "the trained index itself stays empty"
    lists.nprobe = lists.nlist
    _, found = lists.search(reduced, 10)
    assert np.mean((found == np.arange(len(vectors))[:, np.newaxis]).any(axis=1)) > 0.9


# FAISS's own key


@pytest.mark.parametrize(
    ("key", "kind", "reduced", "code", "refine", "raw"),
    [
        ("IVF16,PQ8x4,RFlat", faiss.IndexIVFPQ, 16, 4, 4 * 16, 0),
        ("IVF16,PQ8x4fs,Refine(SQ8)", faiss.IndexIVFPQ, 16, 4, 16, 0),
        ("IVF8,PQ8x4fsr,Refine(SQfp16)", faiss.IndexIVFPQ, 16, 4, 2 * 16, 0),
        ("PCA8,IVF16,PQ4x4fs,Refine(SQ8)", faiss.IndexIVFPQ, 8, 2, 0, 16),  # which ranks by whole vectors
        ("OPQ2_8,IVF8,PQ2x4", faiss.IndexIVFPQ, 8, 1, 0, 0),
        ("PCA8,L2norm,IVF8,SQ8", faiss.IndexIVFScalarQuantizer, 8, 8, 0, 0),
        ("PCA8,IVF8_HNSW32,Flat", faiss.IndexIVFFlat, 8, 32, 0, 0),
    ],
)
def test_a_key_makes_what_it_says(key, kind, reduced, code, refine, raw):
    vectors = stores.clustered(700, 16)
    quantizer = by_key(key, vectors)
    assert type(quantizer.ivf) is kind
    assert isinstance(quantizer.chain[0], faiss.NormalizationTransform), "vectors are compared by their cosine"
    assert quantizer.ivf.metric_type == faiss.METRIC_INNER_PRODUCT
    assert (quantizer.dim, quantizer.reduced_dim) == (16, reduced)
    assert (quantizer.ivf.code_size, quantizer.refine_size, quantizer.raw_size) == (code, refine, raw)
    np.testing.assert_array_equal(quantizer.encode(3 * vectors[:50]).codes, quantizer.encode(vectors[:50]).codes)
    found, _ = decoded(quantizer, vectors)
    assert loss(quantizer.reduce(vectors), found) < 0.2


def test_a_key_of_eight_bit_codes():
    vectors = stores.clustered(700, 2)
    quantizer = by_key("IVF4,PQ1", vectors)
    assert (quantizer.ivf.pq.M, quantizer.ivf.pq.nbits, quantizer.ivf.code_size) == (1, 8, 1)
    found, _ = decoded(quantizer, vectors)
    assert loss(quantizer.reduce(vectors), found) < 0.02


def test_a_key_that_ranks_again_by_whole_vectors_keeps_them_as_they_are(vectors):
    quantizer = by_key("IVF4,PQ4x4,RFlat", vectors)
    kept = quantizer.encode(vectors).refine.view(np.float32)
    np.testing.assert_allclose(kept, unit(vectors.astype(np.float64)), atol=1e-6)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("HNSW32", "take inverted lists"),
        ("Flat", "take inverted lists"),
        ("PCA16,PQ2x4", "take inverted lists"),
        ("IDMap,IVF8,Flat", "take inverted lists"),
        ("IVF8,FlatDedup", "take inverted lists"),
        ("IVF8,PQ2x4,Refine(SQ4)", "re-rank by Refine"),
        ("ITQ32,IVF8,Flat", "transform by PCA, OPQ, RR or L2norm"),
        ("nonsense", "FAISS cannot build it"),
        ("IVF8,PQ7x4", "FAISS cannot build it"),  # 48 dimensions are not seven equal ones
        ("IVF5000,PQ12x4", "FAISS cannot build it"),  # of 1,500 vectors
    ],
)
def test_a_key_that_cannot_be_searched_is_refused_in_a_sentence(vectors, key, said):
    with pytest.raises(UsageError) as caught:
        by_key(key, vectors)
    assert str(caught.value).startswith(f"--index-factory {key}: {said}")
    assert "\n" not in str(caught.value)
