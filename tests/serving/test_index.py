"""Searching an index: right answers, the same ones however it is cut and opened, and clear refusals."""

import dataclasses
import gc
import itertools
import resource
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import faiss
import indexes
import numpy as np
import pictures
import pytest
import signed
import stores
from indexes import Built, assert_best, assert_same, queries_for, recall, scores_of, uris_of

from pipelines.index import IndexRequest, run
from pipelines.runner import Runner
from serving import Index, embedder, storage
from serving.errors import (
    ChecksumMismatch,
    EmbedderMismatch,
    FormatError,
    ImageRejected,
    NotFound,
    UnsupportedVersion,
    UsageError,
)
from serving.index import Hit
from serving.manifest import FileEntry, SearchSettings, move_current, read_current

RAW, DIM, ROWS = 48, 24, 1200
LABELS = ("cat", "dög", None)
MODES = ("memory", "mmap")


def request(root: Path, dim: int, shards: int) -> IndexRequest:
    return IndexRequest(str(root / "store"), str(root / "index"), dim=dim, shards=shards)


def merged(answers: list[list[list[Hit]]], k: int) -> list[list[Hit]]:
    """What a front before several processes does."""
    return [sorted(itertools.chain(*hits), key=lambda hit: -hit.score)[:k] for hits in zip(*answers, strict=True)]


# --- Answers --------------------------------------------------------------------------------------------------------


def test_hits_say_what_they_are(built):
    answers = built.whole.search(built.vectors, 5, settings=built.exhaustive)
    assert len(built.whole) == len(built.vectors) == built.whole.info.rows
    label_of = dict(zip(built.uris, itertools.cycle(LABELS), strict=False))
    for uri, hits in zip(built.uris, answers, strict=True):
        assert len(hits) == 5
        assert hits[0].uri == uri
        # Vectors left out of training may reach beyond what 8-bit codes stand for.
        assert hits[0].score == pytest.approx(1, abs=0.15)
        assert all(hit.label == label_of[hit.uri] and -1 <= hit.score <= 1 for hit in hits)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert all(type(hit.row) is int and type(hit.score) is float for hit in hits)
    assert np.median([hits[0].score for hits in answers]) == pytest.approx(1, abs=5e-3)


def test_an_exact_index_is_brute_force(exact):
    queries = queries_for(exact)
    unit = exact.vectors / np.linalg.norm(exact.vectors, axis=1, keepdims=True)
    cosines = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ unit.T
    order = np.argsort(-cosines, axis=1)[:, :10]
    answers = exact.whole.search(queries, 10)
    assert uris_of(answers) == [[exact.uris[place] for place in places] for places in order]
    np.testing.assert_allclose(scores_of(answers), np.take_along_axis(cosines, order, axis=1), atol=1e-5)


def test_visiting_all_lists_finds_the_neighbours(pq):
    """Codes of 8 bits blur a score by some thousandths: rows nearer to the tenth than that may change places."""
    queries = queries_for(pq, 300)
    answers = pq.whole.search(queries, 10, settings=pq.exhaustive)
    cosines = pq.cosines(queries)
    place = {uri: number for number, uri in enumerate(pq.uris)}
    truth = np.array([[cosines[row, place[hit.uri]] for hit in hits] for row, hits in enumerate(answers)])
    tenth = -np.sort(-cosines, axis=1)[:, 9:10]
    assert np.mean(truth >= tenth - 5e-3) >= 0.99
    assert recall(uris_of(answers), pq.nearest(queries, 10)) >= 0.97
    error = np.abs(scores_of(answers) - truth)
    assert np.mean(error <= 8e-3) >= 0.99
    assert np.sqrt(np.square(error).mean()) <= 4e-3


@pytest.mark.parametrize("mode", MODES)
def test_visiting_all_lists_is_brute_force_over_the_codes(built, mode):
    """What the last codes can tell apart is found whole: nothing is lost on the way to them."""
    queries = queries_for(built, 200)
    scores = built.code_scores(queries)
    index, settings = built.opened(mode), built.exhaustive
    assert_best(built, index.search(queries, 10, settings=settings), scores, 10)
    assert_best(built, [index.search(query, 10, settings=settings)[0] for query in queries], scores, 10)


def test_the_measured_settings_are_the_default(pq):
    queries, settings = queries_for(pq), pq.manifest.search
    explicit = pq.whole.search(queries, 10, nprobe=settings.nprobe, rerank=settings.rerank)
    assert pq.whole.search(queries, 10) == pq.whole.search(queries, 10, settings=settings) == explicit
    assert recall(uris_of(explicit), pq.nearest(queries, 10)) >= 0.9


def test_one_neighbour_is_found_as_well_as_ten(pq):
    """`rerank` counts candidates, not a multiple of k."""
    queries = queries_for(pq, 300)
    truth = [hits[0] for hits in pq.nearest(queries, 1)]
    one, ten = (uris_of(pq.whole.search(queries, k)) for k in (1, 10))
    found_in = [np.mean([uri in hits for uri, hits in zip(truth, answers, strict=True)]) for answers in (one, ten)]
    assert found_in[0] >= found_in[1] - 0.02


@pytest.mark.parametrize("k", [1, 7, 50, ROWS - 1, ROWS, ROWS + 1000])
@pytest.mark.parametrize("options", [{}, {"nprobe": 1}, {"nprobe": 1, "rerank": 0}, {"rerank": 0}, {"nprobe": 10**9}])
def test_no_hit_is_missing_where_rows_suffice(pq, k, options):
    queries = queries_for(pq, 5)
    for index in (pq.whole, pq.mapped):
        for hits in index.search(queries, k, **options) + index.search(queries[0], k, **options):
            assert len(hits) == len({hit.row for hit in hits}) == min(k, ROWS)


@pytest.mark.parametrize("mode", MODES)
def test_asking_for_more_than_all_gives_all(built, mode):
    [hits] = built.opened(mode).search(built.vectors[0], 10**6)
    assert sorted(hit.uri for hit in hits) == built.uris
    assert sorted(hit.row for hit in hits) == list(range(len(built.vectors)))


def test_a_batch_answers_like_its_queries_alone(built):
    queries = queries_for(built, 40)
    together = built.whole.search(queries)
    assert_same([built.whole.search(query)[0] for query in queries], together)
    assert_same(built.whole.search(queries[:13]) + built.whole.search(queries[13:]), together)


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "lists": np.ndarray.tolist,
    "float64": lambda queries: queries.astype(np.float64),
    "float16": lambda queries: queries.astype(np.float16),
    "columns first": np.asfortranarray,
    "every other": lambda queries: np.repeat(queries, 2, axis=0)[::2],
    "read-only": lambda queries: np.frombuffer(queries.tobytes(), np.float32).reshape(queries.shape),
    "rows": list,
}


@pytest.mark.parametrize("form", FORMS)
def test_queries_come_in_many_forms(pq, form):
    queries = pq.vectors[:20]  # float16 holds them without loss
    before = queries.copy()
    given = FORMS[form](queries)
    assert_same(pq.whole.search(given), pq.whole.search(queries))
    assert_same(pq.whole.search(given[3]), pq.whole.search(queries[3]))
    np.testing.assert_array_equal(queries, before)


@pytest.mark.parametrize("length", [1e-42, 1e-30, 1e-12, 1e12, 1e36])
def test_only_the_direction_of_a_query_counts(built, length):
    """In float32 the squares of such numbers vanish or overflow."""
    queries = queries_for(built, 20)
    scaled = (queries.astype(np.float64) * length).astype(np.float32)
    found = built.whole.search(scaled)
    tolerance = 1e-5 if length > 1e-38 else 0.05  # below, float32 has few digits left
    np.testing.assert_allclose(scores_of(found), scores_of(built.whole.search(queries)), atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["pq", "exact", "plain", "faithful"])
def test_a_query_of_zeros_is_answered(request, kind, mode):
    index = request.getfixturevalue(kind).opened(mode)
    [hits] = index.search(np.zeros(RAW), 3)
    assert len(hits) == 3
    assert np.isfinite([hit.score for hit in hits]).all()
    assert_same(index.search(np.zeros((2, RAW)), 3), [hits, hits])


def test_no_query_no_answer(built):
    assert built.whole.search(np.empty((0, RAW))) == []


def test_numpy_integers_are_integers(pq):
    numbers = np.array([3, 8, 100])
    found = pq.whole.search(pq.vectors[0], numbers[0], nprobe=numbers[1], rerank=numbers[2])
    assert found == pq.whole.search(pq.vectors[0], 3, nprobe=8, rerank=100)


def test_answers_repeat(built):
    queries = queries_for(built)
    first = built.whole.search(queries)
    assert built.whole.search(queries) == first
    assert Index.open(built.index).search(queries) == first


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["labelled", "faithful"])
def test_threads_get_what_one_gets(request, kind, mode):
    """Each with settings of its own, one query or some, among all rows or some, on one shared index."""
    built = request.getfixturevalue(kind)
    index, queries = built.opened(mode), queries_for(built, 40)
    kinds = (None, {"some/1", "half/2", "rest/3"}, {f"half/{number}" for number in range(20)})
    work = [
        (
            queries[start : start + (1 if start % 2 else 7)],
            1 + start % 12,
            {
                "labels": kinds[start % 3],
                "settings": SearchSettings(1 + start % 5, 10 * (start % 4), 0, 10 + start) if start % 4 else None,
            },
        )
        for start in range(32)
    ]

    def answer(item: tuple[np.ndarray, int, dict[str, Any]]) -> list[list[Hit]]:
        asked, k, options = item
        return index.search(asked, k, **options)

    serial = [answer(item) for item in work]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, work * 4)) == serial * 4


@pytest.mark.parametrize("kind", ["pq", "exact", "faithful"])
@pytest.mark.parametrize("mode", MODES)
def test_a_search_leaves_the_number_of_threads_alone(request, kind, mode):
    index = request.getfixturevalue(kind).opened(mode)
    threads = faiss.omp_get_max_threads()
    try:
        for count in (1, 3):
            faiss.omp_set_num_threads(count)
            for options in ({}, {"labels": {"cat", "rest/1"}}, {"settings": SearchSettings(1, 0)}):
                index.search(np.ones(RAW), **options)
                index.search(np.ones((3, RAW)), **options)
                assert faiss.omp_get_max_threads() == count
    finally:
        faiss.omp_set_num_threads(threads)


# --- Versions and shards --------------------------------------------------------------------------------------------


def test_the_current_version_is_opened_unless_another_is_named(pq):
    queries = queries_for(pq, 20)
    named = Index.open(f"file://{pq.index}/", version=pq.manifest.version)
    assert named.info == pq.whole.info == pq.manifest
    assert named.search(queries) == pq.whole.search(queries)


@pytest.mark.parametrize("shards", [[0], [2], [1, 2], [2, 0], [1, 1], (0, 1, 2), range(2)])
def test_rows_keep_their_numbers_in_every_subset(built, shards):
    [everything] = built.whole.search(built.vectors[0], len(built.vectors))
    row_of = {hit.uri: hit.row for hit in everything}
    opened = Index.open(built.index, shards=shards)
    [hits] = opened.search(built.vectors[0], len(built.vectors))
    assert len(hits) == len(opened) == sum(built.manifest.shards[number].rows for number in set(shards))
    assert {hit.uri: hit.row for hit in hits} == {hit.uri: row_of[hit.uri] for hit in hits}


def hashed(uri: str) -> int:
    return int.from_bytes(blake2b(uri.encode(), digest_size=8).digest(), "big")


@pytest.mark.parametrize("mode", MODES)
def test_rows_count_through_the_shards_by_the_hash_of_the_uri(built, mode):
    expected = {uri: row for row, uri in enumerate(sorted(built.uris, key=hashed))}
    [hits] = built.opened(mode).search(built.vectors[0], len(built.vectors))
    assert {hit.uri: hit.row for hit in hits} == expected
    _, [rows] = built.opened(mode).search_rows(built.vectors[0], len(built.vectors))
    assert rows.tolist() == [hit.row for hit in hits]
    for uri, row in expected.items():
        label = built.labels[built.uris.index(uri)]
        assert built.opened(mode).record(row) == (uri, label, "etag")


@pytest.mark.parametrize("mode", MODES)
def test_a_subset_of_shards_has_records_of_its_own_rows_only(built, mode):
    opened = Index.open(built.index, shards=[0, 2], mode=mode)
    _, [rows] = opened.search_rows(built.vectors[0], len(opened))
    start = built.manifest.shards[0].rows
    inside = range(start, start + built.manifest.shards[1].rows)
    assert sorted(rows) == [row for row in range(len(built.vectors)) if row not in inside]
    assert [opened.record(row) for row in rows] == [built.whole.record(row) for row in rows]
    for row in (-1, inside[0], inside[-1], len(built.vectors)):
        with pytest.raises(IndexError, match=f"row {row} is not in the opened shards"):
            opened.record(row)


@pytest.mark.parametrize("mode", MODES)
def test_arrays_say_what_hits_say(built, mode):
    queries, index = queries_for(built, 30), built.opened(mode)
    for options in ({}, {"labels": {"cat"}}, {"settings": SearchSettings(1, 0)}):
        answers = index.search(queries, 7, **options)
        scores, rows = index.search_rows(queries, 7, **options)
        assert (scores.dtype, rows.dtype, scores.shape, rows.shape) == (np.float32, np.int64, (30, 7), (30, 7))
        assert rows.tolist() == [[hit.row for hit in hits] for hits in answers]
        np.testing.assert_allclose(scores, scores_of(answers), atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_arrays_are_filled_up_where_rows_run_out(built, mode):
    rows = len(built.vectors)
    opened = Index.open(built.index, shards=[1, 2], mode=mode)
    scores, found = opened.search_rows(built.vectors[:2], rows)
    assert scores.shape == found.shape == (2, rows)
    there = found >= 0
    assert there.sum(axis=1).tolist() == [len(opened)] * 2
    assert (found[~there] == -1).all()
    assert np.isneginf(scores[~there]).all()
    assert np.isfinite(scores[there]).all()
    assert (np.diff(there.astype(int), axis=1) <= 0).all(), "what is missing comes last"
    nothing, none = built.opened(mode).search_rows(np.empty((0, RAW)), 4)
    assert nothing.shape == none.shape == (0, 4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["pq", "exact", "faithful"])
def test_no_shard_no_hit(request, kind, mode):
    built = request.getfixturevalue(kind)
    nothing = Index.open(built.index, shards=[], mode=mode)
    assert len(nothing) == 0
    assert nothing.search(built.vectors[:2]) == [[], []]
    assert nothing.search(built.vectors[0], labels={"cat"}) == [[]]
    scores, rows = nothing.search_rows(built.vectors[:2], 3)
    assert np.isneginf(scores).all()
    assert (rows == -1).all()
    with pytest.raises(IndexError):
        nothing.record(0)


def test_shards_searched_apart_and_merged_are_the_whole(built):
    queries = queries_for(built, 50)
    apart = [Index.open(built.index, shards=[n]).search(queries, 10, settings=built.exhaustive) for n in range(3)]
    assert_same(merged(apart, 10), built.whole.search(queries, 10, settings=built.exhaustive))


COLLECTIONS = [
    # rows, raw dimensions, reduced ones, shards, the same picture so many times
    (4, 5, None, 7, 1),
    (100, RAW, None, 3, 2),
    (623, 16, None, 5, 1),
    (640, RAW, 2, 7, 1),
    (700, 20, 20, 2, 3),
    (900, 64, 32, 4, 1),
    (1300, 33, 16, 6, 2),
]
"""Four rows in seven shards leave some empty, and from 640 on there are inverted lists."""


@pytest.mark.parametrize("seed", range(len(COLLECTIONS)))
def test_the_number_of_shards_changes_no_answer(tmp_path, seed):
    rows, raw, dim, shards, copies = COLLECTIONS[seed]
    rng = np.random.default_rng(seed)
    vectors = np.repeat(stores.clustered(-(-rows // copies), raw, seed=seed), copies, axis=0)[:rows]
    labels = rng.choice(["a", "b", None], rows).tolist()
    one = indexes.build(tmp_path, vectors, 1, dim, labels)
    cut = indexes.cut(one, shards)
    assert len(cut.info.shards) == shards
    assert len(cut) == rows
    queries = queries_for(one, 60)
    for options in ({}, {"settings": one.exhaustive}, {"nprobe": 1, "rerank": 3}, {"labels": {"a"}}):
        assert cut.search(queries, 10, **options) == one.whole.search(queries, 10, **options)
        for query in queries[:10]:
            assert cut.search(query, 3, **options) == one.whole.search(query, 3, **options)
    mapped = Index.open(one.index, version=cut.info.version, mode="mmap")
    everything = cut.search(queries[:20], rows, settings=one.exhaustive)
    assert_alike(mapped.search(queries[:20], rows, settings=one.exhaustive), everything)

    some = sorted(rng.choice(shards, rng.integers(1, shards), replace=False).tolist())
    bounds = np.cumsum([0, *(shard.rows for shard in cut.info.shards)])
    mine = {row for number in some for row in range(bounds[number], bounds[number + 1])}
    expected = [[hit for hit in hits if hit.row in mine] for hits in everything]
    for mode in MODES:
        subset = Index.open(one.index, version=cut.info.version, shards=some, mode=mode)
        assert len(subset) == len(mine)
        assert_alike(subset.search(queries[:20], rows, settings=one.exhaustive), expected)


def assert_alike(found: list[list[Hit]], expected: list[list[Hit]]) -> None:
    """The same rows with the same scores; as good ones, to float32, may have changed places."""
    for hits, others in zip(found, expected, strict=True):
        of, wanted = ({hit.row: hit.score for hit in some} for some in (hits, others))
        assert {hit[:2] for hit in hits} == {hit[:2] for hit in others}
        assert of.keys() == wanted.keys()
        np.testing.assert_allclose([of[row] for row in wanted], [*wanted.values()], atol=1e-6)
        assert (np.diff([hit.score for hit in hits]) <= 0).all()


@pytest.mark.parametrize("dim", [2, RAW])
def test_few_and_all_dimensions(tmp_path, dim):
    built = indexes.build(tmp_path, stores.clustered(640, RAW), 2, dim)
    queries = queries_for(built, 50)
    answers = built.whole.search(queries, 10, settings=built.exhaustive)
    best = -np.sort(-built.cosines(queries), axis=1)[:, :10]
    assert np.sqrt(np.square(scores_of(answers) - best).mean()) <= 1e-2
    assert_best(built, answers, built.code_scores(queries), 10)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("options", [{}, {"max_bytes_per_vector": 16}, {"recall_against": "raw"}], ids=str)
def test_vectors_that_are_all_the_same(tmp_path, value, options):
    """A dead network gives zeros; every score is then as good as another, and still there are hits."""
    labels = ["a", "b"] * 320
    built = indexes.build(tmp_path, np.full((640, RAW), value, np.float32), 2, DIM, labels, **options)
    queries = np.stack([np.full(RAW, value), np.arange(RAW)])
    for mode, wanted in itertools.product(MODES, (None, {"a"})):
        index = built.opened(mode)
        for hits in index.search(queries, 10, labels=wanted) + index.search(queries[1], 10, labels=wanted):
            assert len({hit.uri for hit in hits}) == 10
            assert np.ptp([hit.score for hit in hits]) == 0
            assert {hit.label for hit in hits} <= (wanted or {*labels})


def test_a_new_version_with_another_quantizer_is_opened_by_the_next(copied):
    queries = queries_for(copied, 30)
    before = Index.open(copied.index)
    answers = before.search(queries)
    manifest, new = run(request(copied.root, 8, 2), Runner())
    assert new
    assert manifest.quantizer != copied.manifest.quantizer
    after = Index.open(copied.index)
    assert (after.info.version, after.info.reduced_dim) == (manifest.version, 8)
    assert uris_of(after.search(copied.vectors[:50], 1)) == [[uri] for uri in copied.uris[:50]]
    assert before.search(queries) == answers
    assert Index.open(copied.index, version=copied.manifest.version).search(queries) == answers


# --- What an index holds on to --------------------------------------------------------------------------------------


def test_an_index_asked_in_many_ways_keeps_the_last_of_them(built):
    def alive() -> int:
        gc.collect()
        return sum(isinstance(thing, faiss.SearchParametersIVF) for thing in gc.get_objects())

    index, before = Index.open(built.index), alive()
    for k in range(1, 101):
        for _ in range(2):
            assert len(index.search(built.vectors[0], k, nprobe=k)[0]) == k
    assert alive() - before <= 64


def test_an_index_outlives_what_it_was_made_from(built):
    queries = queries_for(built, 20)
    search = Index.open(built.index).search
    others = [Index.open(built.index, shards=[number]) for number in range(3)]
    others.append(Index.open(built.index, mode="mmap"))
    gc.collect()
    answers = search(queries)
    del others
    gc.collect()
    assert search(queries) == answers == built.whole.search(queries)


@pytest.mark.parametrize("mode", MODES)
def test_a_dropped_index_goes_at_once(built, mode):
    """Nothing that it keeps for later searches holds on to it."""
    index = Index.open(built.index, mode=mode)
    index.search(built.vectors[:3])
    index.search(built.vectors[0], labels={"cat"})
    alive = weakref.ref(index)
    gc.disable()
    try:
        del index
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", MODES)
def test_dropped_indexes_give_their_memory_back(built, mode):
    def open_some(count: int) -> int:
        for _ in range(count):
            index = Index.open(built.index, mode=mode)
            index.search(built.vectors[0])
            index.search(built.vectors[:2], labels={"cat"})
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    warm = open_some(20)
    size = sum(path.stat().st_size for path in built.folder.iterdir()) / 1024
    assert open_some(150) - warm < max(8 * 1024, 20 * size)


# --- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "sentence"),
    [
        (np.zeros((2, RAW + 1)), rf"shape \(2, {RAW + 1}\).*takes \(N, {RAW}\).*made_up/avg"),
        (np.zeros(RAW - 1), rf"shape \({RAW - 1},\).*takes \(N, {RAW}\)"),
        (np.zeros((2, 2, RAW)), rf"shape \(2, 2, {RAW}\)"),
        (1.0, r"shape \(\)"),
        ([], r"shape \(0,\)"),
        ([[1.0] * RAW, [1.0]], "not an array of numbers"),
        (["cat.jpg"], "not an array of numbers.*cat.jpg"),
        (b"bytes", "not an array of numbers"),
        (object(), "not an array of numbers"),
        ([np.nan] * RAW, "NaN or infinity"),
        ([0.0] * (RAW - 1) + [np.inf], "NaN or infinity"),
        ([0.0] * (RAW - 1) + [-np.inf], "NaN or infinity"),
        ([1e300] * RAW, "NaN or infinity"),
    ],
    ids=str,
)
def test_wrong_vectors_are_refused(built, vectors, sentence):
    with pytest.raises(UsageError, match=sentence):
        built.whole.search(vectors)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": -3}, "k is -3"),
        ({"nprobe": 0}, "nprobe is 0"),
        ({"nprobe": -1}, "nprobe is -1"),
        ({"rerank": -1}, "rerank is -1"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(built, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        built.whole.search(built.vectors[0], **options)


@pytest.mark.parametrize("options", [{"k": 2.5}, {"nprobe": 1.5}, {"rerank": "10"}], ids=str)
def test_settings_of_a_wrong_type_are_refused(built, options):
    with pytest.raises(TypeError, match="as an integer"):
        built.whole.search(built.vectors[0], **options)


@pytest.mark.parametrize(("shards", "named"), [([3], r"\[3\]"), ([0, 7, -1], r"\[-1, 7\]")])
def test_unknown_shards_are_refused(pq, shards, named):
    with pytest.raises(UsageError, match=f"shards {named} are not in this index; it has 0 to 2"):
        Index.open(pq.index, shards=shards)


def test_vectors_of_another_embedder_are_refused(pq):
    ours = pq.manifest.embedder.fingerprint
    assert len(Index.open(pq.index, embedder=ours)) == ROWS
    with pytest.raises(EmbedderMismatch, match=rf"{ours} \(made_up/avg\), your vectors come from other"):
        Index.open(pq.index, embedder="other")


def test_what_is_no_index_is_not_found(pq, tmp_path):
    with pytest.raises(NotFound, match=rf"{tmp_path} is not a published index.*lookalike index"):
        Index.open(str(tmp_path))
    with pytest.raises(NotFound, match=r"missing/manifest.json does not exist"):
        Index.open(pq.index, version="missing")


# --- Damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = ["trained.faiss", *(f"{name}-00001-of-00003" for name in ("shard", "refine", "records"))]


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (flip, ChecksumMismatch, "is damaged: its checksum is not the manifest's"),
        (truncate, ChecksumMismatch, "bytes, its manifest names"),
        (lambda path: path.write_bytes(b""), ChecksumMismatch, "has 0 bytes"),
        (Path.unlink, NotFound, "does not exist"),
    ],
    ids=["flipped", "truncated", "emptied", "missing"],
)
@pytest.mark.parametrize("name", FILES)
def test_every_file_is_checked(copied, name, damage, error, sentence):
    [path] = (path for path in copied.folder.glob(f"{name}*") if path.suffix != ".json")
    damage(path)
    with pytest.raises(error, match=f"{path}.*{sentence}"):
        Index.open(copied.index)
    if name != "trained.faiss":  # the other shards are whole
        assert len(Index.open(copied.index, shards=[0, 2])) == ROWS - copied.manifest.shards[1].rows


@pytest.mark.parametrize(
    ("content", "error", "sentence"),
    [
        (b"", FormatError, "is not a manifest"),
        (b"{", FormatError, "is not a manifest"),
        (b"\x80\xff", FormatError, "is not a manifest"),
        (b"[1]", FormatError, "is not a manifest"),
        (b"{}", FormatError, "is not a manifest"),
        (b'{"format_version": 1}', FormatError, "is damaged: it has no checksum"),
        (b'{"format_version": 99}', UnsupportedVersion, "format version 99, this release reads 1; upgrade lookalike"),
        (b'{"format_version": 0}', UnsupportedVersion, "build it again"),
    ],
)
def test_damaged_manifests_are_refused(copied, content, error, sentence):
    path = copied.folder / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(error, match=f"{path}.*{sentence}"):
        Index.open(copied.index)


@pytest.mark.parametrize("content", [b"", b"garbage", b"[]", b"{}", b"\xff", b"null", b'{"version": null}'])
def test_a_damaged_pointer_is_refused(copied, content):
    (copied.root / "index" / "CURRENT").write_bytes(content)
    with pytest.raises(FormatError, match="CURRENT is damaged"):
        Index.open(copied.index)


def test_a_pointer_to_nothing_names_the_manifest(copied):
    move_current(copied.index, "version", "gone", read_current(copied.index, "version")[1])
    with pytest.raises(NotFound, match=r"versions/gone/manifest.json does not exist"):
        Index.open(copied.index)


def reading(built: Built, **of_shard_0: Any) -> Index:
    """Open with a manifest that says something else of shard 0, checksums in order."""
    first, *rest = built.manifest.shards
    shards = (dataclasses.replace(first, **of_shard_0), *rest)
    return Index(built.index, dataclasses.replace(built.manifest, shards=shards))


@pytest.mark.parametrize("field", ["lists", "refine", "records"])
def test_files_of_other_rows_are_refused(pq, field):
    other = getattr(pq.manifest.shards[1], field)
    with pytest.raises(FormatError, match=f"{other.name} (does not hold the|has) .*rows"):
        reading(pq, **{field: other})


@pytest.mark.parametrize(("field", "source"), [("lists", "refine"), ("refine", "lists"), ("records", "lists")])
def test_files_of_another_kind_are_refused(pq, field, source):
    with pytest.raises(FormatError):
        reading(pq, **{field: getattr(pq.manifest.shards[0], source)})


def test_re_rank_codes_cannot_be_left_out(pq):
    with pytest.raises(FormatError, match="no re-rank codes for shard 0"):
        reading(pq, refine=None)


@pytest.mark.parametrize("field", ["lists", "refine", "records"])
def test_garbage_with_the_right_checksum_is_refused(copied, field):
    (copied.folder / "garbage").write_bytes(b"garbage" * 100)
    with pytest.raises(FormatError, match="garbage"):
        reading(copied, **{field: FileEntry.of("garbage", b"garbage" * 100)})


@pytest.mark.parametrize("change", [{"quantizer": "another"}, {"dim": RAW + 1}])
def test_a_quantizer_that_is_not_the_named_one_is_refused(pq, change):
    with pytest.raises(FormatError, match=r"trained.faiss is not the quantizer that the manifest names"):
        Index(pq.index, dataclasses.replace(pq.manifest, **change))


def test_keys_of_a_later_release_are_passed_over(copied):
    path = copied.folder / "manifest.json"
    signed.edit(path, later={"key": 1})
    assert Index.open(copied.index).info == copied.manifest


# --- Pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_pictures(artifact: str, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, list[bytes]]:
    """An index of drawn pictures, and their bytes in the order of `/made/…` uris."""
    root = tmp_path_factory.mktemp("pictures")
    spec = embedder.read_description(artifact).spec
    embedder.copy_artifact(artifact, storage.join(str(root / "store"), "embedders"))
    encoded = [path.read_bytes() for path in sorted(drawn.glob("*/*"))[::6]]
    stores.write_store(root / "store", embedder.Embedder.open(artifact).embed_images(encoded), embedder=spec)
    run(request(root, DIM, 2), Runner())
    return Index.open(str(root / "index")), encoded


def test_pictures_find_themselves(of_pictures):
    index, encoded = of_pictures
    answers = index.search_images(encoded, 3)
    assert [hits[0].uri for hits in answers] == [f"/made/{number:06}.jpg" for number in range(len(encoded))]
    assert answers == index.search(index.embedder.embed_images(encoded), 3)
    assert index.search_images([]) == []


def test_the_embedder_is_loaded_once(of_pictures):
    index, _ = of_pictures
    assert index.embedder is index.embedder
    assert index.embedder.fingerprint == index.info.embedder.fingerprint


def test_a_bad_picture_is_named_by_its_place(of_pictures):
    index, encoded = of_pictures
    with pytest.raises(ImageRejected, match="not_an_image: image 2 of 2"):
        index.search_images([encoded[0], b"text of some length"])


def test_searching_pictures_needs_the_embedder(pq):
    """That of made-up vectors has no model that could run."""
    with pytest.raises(FormatError, match=f"model of the embedder {pq.manifest.embedder.fingerprint} cannot be run"):
        pq.whole.search_images([pictures.encode(pictures.scene(), "PNG")])
