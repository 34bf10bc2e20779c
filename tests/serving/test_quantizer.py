"""A vector's place and codes depend on that vector and the trained quantizer alone."""

import itertools
from collections.abc import Callable

import faiss
import numpy as np
import pytest
import stores

from serving import storage
from serving.errors import FormatError
from serving.quantizer import BATCH, Quantizer
from transforms.designing import Design, Wishes, designs
from transforms.training import train

RAW, DIM, ROWS = 48, 24, 2 * BATCH + 500
KINDS = ("ivf-pq", "exact", "faithful")


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    found = stores.clustered(ROWS, RAW)
    found[7] = 0
    return found


@pytest.fixture(scope="module")
def trained(vectors: np.ndarray) -> dict[str, bytes]:
    shapes: dict[str, Design] = {
        "ivf-pq": designs(ROWS, RAW, Wishes(dim=DIM, nlist=16))[0],
        "exact": designs(10, RAW, Wishes())[0],
        "faithful": designs(ROWS, RAW, Wishes(dim=DIM, nlist=16, faithful=True))[0],
    }
    return {kind: train(shape, RAW, vectors) for kind, shape in shapes.items()}


@pytest.fixture(scope="module", params=KINDS)
def quantizer(request: pytest.FixtureRequest, trained: dict[str, bytes]) -> Quantizer:
    return Quantizer(trained[request.param])


@pytest.fixture(scope="module")
def pq(trained: dict[str, bytes]) -> Quantizer:
    return Quantizer(trained["ivf-pq"])


def unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def assert_encoded(quantizer: Quantizer, vectors: np.ndarray, like: np.ndarray, order: np.ndarray) -> None:
    found, expected = quantizer.encode(vectors), quantizer.encode(like)
    np.testing.assert_array_equal(found.codes, expected.codes[order])
    for stores_of in ("refine", "raw"):
        if getattr(expected, stores_of) is not None:
            np.testing.assert_array_equal(getattr(found, stores_of), getattr(expected, stores_of)[order])


def test_the_kinds_say_what_they_are(trained):
    pq, exact, faithful = (Quantizer(trained[kind]) for kind in KINDS)
    assert (pq.exact, pq.dim, pq.reduced_dim, pq.refine_size) == (False, RAW, DIM, DIM)
    assert pq.code_size == 1 + DIM // 2 // 2  # a list number below 16, and half a byte for every two dimensions
    assert (exact.exact, exact.dim, exact.reduced_dim, exact.refine_size) == (True, RAW, RAW, 0)
    assert exact.code_size == 4 * RAW
    assert exact.empty_refine() is None
    assert (faithful.exact, faithful.dim, faithful.reduced_dim, faithful.refine_size) == (False, RAW, DIM, DIM)
    assert [kind.raw_size for kind in (pq, exact, faithful)] == [0, 0, RAW]
    assert pq.empty_raw() is None
    assert faithful.empty_raw().ntotal == 0


def test_the_id_is_the_hash_of_the_bytes(trained):
    for data in trained.values():
        assert Quantizer(data).id == storage.sha256(data)[:16]
    assert len({Quantizer(data).id for data in trained.values()}) == 3


def test_reduced_vectors_have_length_one(quantizer, vectors):
    reduced = quantizer.reduce(np.delete(vectors, 7, axis=0))
    assert reduced.dtype == np.float32
    assert reduced.shape == (ROWS - 1, quantizer.reduced_dim)
    np.testing.assert_allclose(np.linalg.norm(reduced, axis=1), 1, atol=1e-6)


def test_the_exact_kind_keeps_vectors_but_for_their_length(trained, vectors):
    exact = Quantizer(trained["exact"])
    np.testing.assert_allclose(exact.reduce(vectors), unit(vectors), atol=1e-7)
    codes = exact.encode(vectors)
    assert codes.refine is None
    np.testing.assert_array_equal(codes.codes.view(np.float32), exact.reduce(vectors))


def test_reducing_is_what_faiss_does_to_a_query(quantizer, vectors):
    """FAISS works in float32, hence the tolerance."""
    wanted = vectors
    for transform in quantizer.chain:
        wanted = transform.apply(wanted)
    np.testing.assert_allclose(quantizer.reduce(vectors), wanted, atol=2e-6)


def test_codes_are_those_of_faiss(quantizer, vectors):
    reduced = quantizer.reduce(vectors)
    found = quantizer.encode(vectors)
    # In float32 a row between two lists may fall to the other.
    same = (found.codes == quantizer.ivf.sa_encode(reduced)).all(axis=1)
    assert same.mean() >= 0.999
    if found.refine is not None:
        np.testing.assert_array_equal(found.refine, quantizer.refine.sa_encode(reduced))


def test_rows_fall_to_the_nearest_list(pq, vectors):
    centroids = pq.ivf.quantizer.reconstruct_n(0, pq.ivf.nlist)
    closeness = pq.reduce(vectors) @ centroids.T
    lists = pq.encode(vectors).codes[:, 0]
    assert len(np.unique(lists)) > 8
    chosen = np.take_along_axis(closeness, lists[:, np.newaxis].astype(int), axis=1)[:, 0]
    np.testing.assert_allclose(chosen, closeness.max(axis=1), atol=1e-6)


def test_re_rank_codes_are_near_the_vectors(pq, vectors):
    decoded = pq.empty_refine().sa_decode(pq.encode(vectors).refine)
    assert np.sqrt(np.square(decoded - pq.reduce(vectors)).mean()) <= 2e-3


def test_raw_codes_are_near_the_whole_vectors(trained, vectors):
    faithful = Quantizer(trained["faithful"])
    raw = faithful.encode(vectors).raw
    assert raw.shape == (ROWS, RAW)
    assert np.sqrt(np.square(faithful.empty_raw().sa_decode(raw) - unit(vectors)).mean()) <= 2e-3
    for kind in ("ivf-pq", "exact"):
        assert Quantizer(trained[kind]).encode(vectors[:3]).raw is None


def test_distortion_is_what_the_lists_lose(quantizer, vectors):
    """As FAISS gives vectors back out of lists that hold them."""
    vectors = np.delete(vectors, 7, axis=0)
    lists = quantizer.empty_lists()
    lists.add_sa_codes(quantizer.encode(vectors).codes, np.arange(len(vectors)))
    lists.make_direct_map()
    reduced = quantizer.reduce(vectors)
    lost = np.square(reduced - lists.reconstruct_n(0, len(vectors))).sum(axis=1).mean()
    assert quantizer.distortion(vectors) == pytest.approx(lost, rel=1e-4, abs=1e-12)
    assert (lost == 0) == quantizer.exact
    assert lost < 0.1
    assert quantizer.distortion(vectors[:0]) == 0


def test_order_changes_no_code(quantizer, vectors):
    order = np.random.default_rng(1).permutation(ROWS)
    assert_encoded(quantizer, vectors[order], vectors, order)


@pytest.mark.parametrize("size", [1, 3, 17, BATCH - 1, BATCH, BATCH + 1, ROWS])
def test_batches_change_no_code(quantizer, vectors, size):
    few = ROWS if size > 17 else 200
    whole = quantizer.encode(vectors[:few])
    pieces = [quantizer.encode(vectors[start : min(start + size, few)]) for start in range(0, few, size)]
    np.testing.assert_array_equal(np.concatenate([piece.codes for piece in pieces]), whole.codes)
    if whole.refine is not None:
        np.testing.assert_array_equal(np.concatenate([piece.refine for piece in pieces]), whole.refine)


def test_threads_change_no_code(quantizer, vectors):
    threads = faiss.omp_get_max_threads()
    expected = quantizer.encode(vectors)
    try:
        faiss.omp_set_num_threads(1)
        found = quantizer.encode(vectors)
    finally:
        faiss.omp_set_num_threads(threads)
    np.testing.assert_array_equal(found.codes, expected.codes)


@pytest.mark.parametrize(
    "form",
    [
        lambda vectors: vectors.astype(np.float16),
        lambda vectors: vectors.astype(np.float64),
        np.asfortranarray,
        lambda vectors: np.repeat(vectors, 2, axis=1)[:, ::2],
    ],
    ids=["float16", "float64", "columns first", "strided"],
)
def test_the_layout_of_vectors_changes_no_code(quantizer, vectors, form):
    some = vectors[:300]  # float16 holds them without loss
    assert_encoded(quantizer, form(some), some, np.arange(300))


@pytest.mark.parametrize("length", [1e-30, 1e-3, 1e30])
def test_only_the_direction_counts(quantizer, vectors, length):
    scaled = vectors[:200].astype(np.float64) * length
    np.testing.assert_allclose(quantizer.reduce(scaled), quantizer.reduce(vectors[:200]), atol=1e-6)


def test_a_vector_of_zeros_is_encoded(quantizer):
    zeros = np.zeros((3, RAW), np.float32)
    reduced = quantizer.reduce(zeros)
    assert np.isfinite(reduced).all()
    assert len(np.unique(quantizer.encode(zeros).codes, axis=0)) == 1


def test_nothing_is_encoded_as_nothing(quantizer):
    codes = quantizer.encode(np.empty((0, RAW), np.float32))
    assert codes.codes.shape == (0, quantizer.code_size)
    assert codes.refine is None or codes.refine.shape == (0, quantizer.refine_size)


def test_empty_stores_share_nothing(quantizer, vectors):
    first, second = quantizer.empty_lists(), quantizer.empty_lists()
    first.add_sa_codes(quantizer.encode(vectors).codes, np.arange(ROWS))
    assert (first.ntotal, second.ntotal, quantizer.ivf.ntotal, quantizer.empty_lists().ntotal) == (ROWS, 0, 0, 0)


def test_a_quantizer_does_not_need_its_bytes(trained, vectors):
    data = bytearray(trained["ivf-pq"])
    quantizer = Quantizer(data)
    expected = quantizer.encode(vectors[:50]).codes
    data[:] = bytes(len(data))
    np.testing.assert_array_equal(quantizer.encode(vectors[:50]).codes, expected)


def chained(inner: faiss.Index, *transforms: faiss.VectorTransform) -> faiss.Index:
    index = faiss.IndexPreTransform(inner)
    for transform in transforms:
        index.prepend_transform(transform)
    return index


def test_rows_fall_to_the_nearest_list_by_distance_too(vectors):
    """Where a quantizer's metric is distance, long centroids do not draw rows to them."""
    inner = faiss.index_factory(RAW, "IVF8,Flat", faiss.METRIC_L2)
    inner.quantizer.add(unit(vectors[10:18]).astype(np.float32) * np.linspace(0.5, 3, 8, dtype=np.float32)[:, None])
    inner.is_trained = True
    quantizer = Quantizer(bytes(faiss.serialize_index(chained(inner, faiss.NormalizationTransform(RAW)))))
    _, nearest = inner.quantizer.search(quantizer.reduce(vectors), 1)
    assert (quantizer.encode(vectors).codes[:, 0] == nearest[:, 0]).mean() >= 0.999


def rotated() -> faiss.Index:
    """A transform of a class that has no float64 form here."""
    return chained(faiss.index_factory(4, "IVF1,Flat"), faiss.RemapDimensionsTransform(4, 4, True))


STRANGERS: dict[str, Callable[[], faiss.Index]] = {
    "IndexFlatIP": lambda: faiss.IndexFlatIP(4),
    "IndexIDMap": lambda: faiss.IndexIDMap(faiss.IndexFlatIP(4)),
    "IndexRefineFlat": lambda: faiss.IndexRefineFlat(faiss.IndexFlatIP(4)),
    "IndexFlatL2 in place of inverted lists": lambda: chained(faiss.IndexFlatL2(4)),
    "RemapDimensionsTransform, which this release does not read": rotated,
}


@pytest.mark.parametrize("named", STRANGERS)
def test_other_faiss_indexes_are_refused(named):
    with pytest.raises(FormatError, match=named):
        Quantizer(bytes(faiss.serialize_index(STRANGERS[named]())))


@pytest.mark.parametrize("data", [b"", b"garbage", b"IxPT", b"\0" * 5000], ids=repr)
def test_garbage_is_refused(data):
    with pytest.raises(FormatError, match="the trained quantizer cannot be read"):
        Quantizer(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_quantizer_is_refused(trained, kind):
    data = trained[kind]
    for end in itertools.chain(range(0, 100, 9), range(100, len(data), len(data) // 40), [len(data) - 1]):
        with pytest.raises(FormatError):
            Quantizer(data[:end])
