"""Scores by scalar codes are FAISS's own, wherever the codes lie."""

import gc
import itertools
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest

from serving.errors import FormatError
from serving.rescoring import _CHUNK, Rescoring, best_of, can_rescore, code_view

DIM, ROWS = 37, 3 * _CHUNK + 5
MODELS = {
    "8 bits": lambda: faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT),
    "fp16": lambda: faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT),
    "flat": lambda: faiss.IndexFlatIP(DIM),
}
SPLITS = [[ROWS], [0, ROWS, 0], [1, 0, ROWS - 1], [_CHUNK, _CHUNK, ROWS - 2 * _CHUNK], [ROWS // 7] * 7 + [ROWS % 7]]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    made = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32) + np.linspace(-1, 2, DIM)
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, vectors: np.ndarray) -> faiss.Index:
    """Trained on a tenth of what it holds, so that some vectors reach beyond."""
    model = MODELS[request.param]()
    model.train(vectors[::10])
    model.add(vectors)
    return model


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((5, DIM)).astype(np.float32)


def by_faiss(model: faiss.Index, queries: np.ndarray) -> np.ndarray:
    """Every row's score, in the order of the rows."""
    scores, rows = model.search(queries, model.ntotal)
    return np.take_along_axis(scores, np.argsort(rows, axis=1), axis=1)


def split(codes: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    assert sum(sizes) == len(codes)
    return [codes[start:end] for start, end in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_scores_are_those_of_faiss(model, queries, sizes):
    rescoring = Rescoring(model, split(code_view(model), sizes))
    expected = by_faiss(model, queries)
    order = np.random.default_rng(2).permutation(ROWS)
    for query, scores in zip(queries, expected, strict=True):
        np.testing.assert_allclose(rescoring.scores(query, order), scores[order], atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, _CHUNK - 1, _CHUNK, _CHUNK + 1, 2 * _CHUNK, 2 * _CHUNK + 1, 5 * _CHUNK])
@pytest.mark.parametrize("sizes", SPLITS[:3], ids=str)
def test_any_number_of_rows_is_scored_in_any_order(model, queries, count, sizes):
    """The same row may be asked for again."""
    rows = np.random.default_rng(count).integers(0, ROWS, count)
    rows[:2] = (0, ROWS - 1)[: len(rows)]
    found = Rescoring(model, split(code_view(model), sizes)).scores(queries[0], rows)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_faiss(model, queries[:1])[0][rows], atol=1e-5)


def test_codes_may_lie_at_any_byte(model, queries):
    """As they do in a mapped file."""
    codes = code_view(model)
    shifted = np.frombuffer(b"x" + codes.tobytes(), np.uint8)[1:].reshape(codes.shape)
    rows = np.arange(ROWS)
    expected = Rescoring(model, [codes]).scores(queries[0], rows)
    for shards in ([shifted], [shifted[:9], shifted[9:]]):
        np.testing.assert_array_equal(Rescoring(model, shards).scores(queries[0], rows), expected)


def test_the_query_stays_as_it_is(model, queries):
    before = queries.copy()
    Rescoring(model, [code_view(model)]).scores(queries[0], np.arange(ROWS))
    np.testing.assert_array_equal(queries, before)


def test_the_best_are_those_of_a_sort(model, queries):
    rescoring, rows = Rescoring(model, [code_view(model)]), np.arange(3, ROWS, 2)
    for query, k in itertools.product(queries, (1, 10, len(rows))):
        scores, found = rescoring.best(query, rows, k)
        expected = rescoring.scores(query, rows)
        assert found.tolist() == [row for _, row in sorted(zip(-expected, rows.tolist(), strict=True))][:k]
        np.testing.assert_array_equal(scores, -np.sort(-expected)[:k])


@pytest.mark.parametrize("count", [0, 1, 3, 12, 41, 500])
@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("values", [1, 2, 7])
def test_the_lower_row_comes_first_among_equals(count, k, values):
    rng = np.random.default_rng(count + k)
    scores, rows = rng.integers(0, values, count).astype(np.float32), rng.permutation(1000)[:count]
    expected = sorted(zip(-scores, rows.tolist(), strict=True))[:k]
    best, found = best_of(scores, rows, k)
    assert [*zip(-best, found.tolist(), strict=True)] == expected


def test_threads_share_no_buffer(model, queries):
    rescoring = Rescoring(model, split(code_view(model), SPLITS[3]))
    work = [(query, np.random.default_rng(seed).permutation(ROWS)) for seed, query in enumerate([*queries] * 6)]
    serial = [rescoring.best(query, rows, 10) for query, rows in work]
    with ThreadPoolExecutor(8) as pool:
        for (scores, rows), (expected, of) in zip(
            pool.map(lambda item: rescoring.best(*item, 10), work), serial, strict=True
        ):
            np.testing.assert_array_equal(scores, expected)
            np.testing.assert_array_equal(rows, of)


def test_views_are_the_codes_themselves(model, vectors):
    view = code_view(model)
    np.testing.assert_array_equal(view, model.sa_encode(vectors))
    assert not view.flags.owndata
    empty = faiss.clone_index(model)
    empty.reset()
    assert code_view(empty).shape == (0, model.sa_code_size())


def test_the_memory_lives_as_long_as_what_reads_it(model, queries):
    store = faiss.clone_index(model)
    rescoring = Rescoring(store, [code_view(store)], store)
    expected = rescoring.scores(queries[0], np.arange(ROWS))
    del store
    gc.collect()
    others = [np.full((ROWS, DIM), 7, np.float32) for _ in range(20)]
    np.testing.assert_array_equal(rescoring.scores(queries[0], np.arange(ROWS)), expected)
    del others


STRANGERS = {
    "IndexScalarQuantizer": lambda: faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_4bit),
    "IndexPQ": lambda: faiss.IndexPQ(DIM, 1, 4),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_other_codes_are_refused(name):
    assert not can_rescore(STRANGERS[name]())
    with pytest.raises(FormatError, match=f"re-ranks by a {name}, which this release cannot read"):
        Rescoring(STRANGERS[name](), [])


def test_the_models_above_can_be_read(model):
    assert can_rescore(model)
