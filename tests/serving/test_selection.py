"""Searching among the images of some labels: the best of these, however few they are and wherever they lie."""

import itertools
from collections.abc import Iterator
from typing import Any

import indexes
import numpy as np
import pytest
from indexes import Built, assert_best, assert_same, queries_for, recall, unit, uris_of

from serving import Index, selection
from serving.errors import UsageError
from serving.index import Hit
from serving.lists import Lists
from serving.manifest import SearchSettings
from serving.selection import Selection

MODES = ("memory", "mmap")
KINDS = ("rare", "few", "some", "half", "rest")
CHOICES = {
    "0.1 %": {"rare"},
    "1 %": {"few"},
    "10 %": {"some"},
    "50 %": {"half"},
    "100 %": {*KINDS},
}


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("this way was not to be taken")


@pytest.fixture(params=["scan", "lists"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rank each selected row, or search the lists for them, and never the other way."""
    scan = request.param == "scan"
    monkeypatch.setattr(selection, "_SMALL", 10**9 if scan else -1)
    monkeypatch.setattr(selection, "_SCANNED_FOR_ONE", 1 if scan else 10**12)
    monkeypatch.setattr(Lists, "_preassigned" if scan else "scan", refuse)
    return str(request.param)


@pytest.fixture(params=["labelled", "faithful"])
def built(request: pytest.FixtureRequest) -> Built:
    found: Built = request.getfixturevalue(request.param)
    return found


def labels_of(kinds: set[str], clusters: Any = range(20)) -> set[str]:
    return {f"{kind}/{cluster}" for kind, cluster in itertools.product(kinds, clusters)}


def places_of(built: Built, labels: set[str]) -> list[int]:
    return [place for place, label in enumerate(built.labels) if label in labels]


def both(index: Index, queries: np.ndarray, k: int, **options: Any) -> Iterator[list[list[Hit]]]:
    """Ask all at once, then one after the other."""
    yield index.search(queries, k, **options)
    yield [index.search(query, k, **options)[0] for query in queries]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", CHOICES)
@pytest.mark.usefixtures("way")
def test_visiting_all_is_brute_force_over_the_selected(built, share, mode):
    labels = labels_of(CHOICES[share])
    places = places_of(built, labels)
    assert len(places) / len(built.vectors) == pytest.approx(float(share[:-2]) / 100, rel=0.02)
    queries = queries_for(built, 40)
    scores = built.code_scores(queries)
    for answers in both(built.opened(mode), queries, 10, labels=labels, settings=built.exhaustive):
        assert_best(built, answers, scores, 10, places)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", CHOICES)
@pytest.mark.usefixtures("way")
def test_the_measured_settings_find_the_nearest_of_the_selected(built, share, mode):
    labels = labels_of(CHOICES[share])
    places, queries = places_of(built, labels), queries_for(built, 100)
    truth = nearest(built, queries, places)
    for answers in both(built.opened(mode), queries, 10, labels=labels):
        assert {hit.label for hits in answers for hit in hits} <= labels
        assert recall(uris_of(answers), truth) >= 0.95


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("way")
def test_labels_far_from_the_query_are_found(built, mode):
    """Those of another cluster, in lists that a search among all rows does not come to."""
    labels = labels_of({*KINDS}, [7])
    places = places_of(built, labels)
    queries = queries_for(built, 100)
    truth = nearest(built, queries, places)
    everywhere = built.whole.search(queries, 10)
    assert np.mean([hit.label in labels for hits in everywhere for hit in hits]) < 0.2
    for answers in both(built.opened(mode), queries, 10, labels=labels):
        assert recall(uris_of(answers), truth) >= 0.95


def nearest(built: Built, queries: np.ndarray, places: list[int]) -> list[list[str]]:
    """The nearest ten of some rows in the space that the index was tuned to."""
    faithful = built.manifest.parameters["recall_against"] == "raw"
    cosines = built.raw_cosines(queries) if faithful else built.cosines(queries)
    among = np.full(cosines.shape, -np.inf)
    among[:, places] = cosines[:, places]
    return indexes.named(built, among, min(10, len(places)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("way")
def test_fewer_than_k_are_all_there_are(built, mode):
    """Even where few lists are to be visited."""
    labels = labels_of({"rare"})
    everyone = {built.uris[place] for place in places_of(built, labels)}
    assert len(everyone) == 3
    for answers in both(
        built.opened(mode), queries_for(built, 5), 10, labels=labels, settings=SearchSettings(1, 0, 0, 10)
    ):
        assert all({hit.uri for hit in hits} == everyone and len(hits) == 3 for hits in answers)
    scores, rows = built.opened(mode).search_rows(queries_for(built, 5), 5, labels=labels)
    assert (rows[:, :3] >= 0).all()
    assert (rows[:, 3:] == -1).all()
    assert np.isneginf(scores[:, 3:]).all()
    assert np.isfinite(scores[:, :3]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shards", [[1], [2, 0]], ids=str)
@pytest.mark.usefixtures("way")
def test_shards_are_searched_for_labels_too(built, shards, mode):
    labels, queries = labels_of({"some"}), queries_for(built, 20)
    bounds = np.cumsum([0, *(shard.rows for shard in built.manifest.shards)])
    mine = {row for number in shards for row in range(bounds[number], bounds[number + 1])}
    number_of = {built.whole.record(row).uri: row for row in range(len(built.vectors))}
    places = [place for place in places_of(built, labels) if number_of[built.uris[place]] in mine]
    opened = Index.open(built.index, shards=shards, mode=mode)
    answers = opened.search(queries, 10, labels=labels, settings=built.exhaustive)
    assert_best(built, answers, built.code_scores(queries), 10, places)
    assert all(hit.row == number_of[hit.uri] for hits in answers for hit in hits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("labels", [{"none such"}, set(), {None}, ["RARE/1", "rare/"]], ids=str)
def test_labels_that_no_row_has(built, labels, mode):
    """Rows without a label are of no label that could be named."""
    assert None in built.labels
    index, queries = built.opened(mode), built.vectors[:3]
    assert index.search(queries, labels=labels) == [[], [], []]
    assert index.search(queries[0], labels=labels) == [[]]
    assert index.search(np.empty((0, queries.shape[1])), labels=labels) == []
    scores, rows = index.search_rows(queries, 4, labels=labels)
    assert np.isneginf(scores).all()
    assert (rows == -1).all()


@pytest.mark.parametrize("mode", MODES)
def test_an_exact_index_is_kept_to_labels(exact, mode):
    queries = queries_for(exact, 50)
    scores = unit(queries) @ unit(exact.vectors).T
    for labels in ({"cat"}, {"dög"}, {"cat", "dög"}):
        places = places_of(exact, labels)
        for k, answers in itertools.product((1, 10, 100), both(exact.opened(mode), queries, 10, labels=labels)):
            assert_best(exact, [hits[:k] for hits in answers], scores, min(k, 10), places)
        [hits] = exact.opened(mode).search(queries[0], 1000, labels=labels)
        assert sorted(hit.uri for hit in hits) == [exact.uris[place] for place in places]


@pytest.mark.parametrize("mode", MODES)
def test_an_index_without_re_rank_codes_is_kept_to_labels(plain, mode):
    queries = queries_for(plain, 50)
    for answers in both(plain.opened(mode), queries, 10, labels={"cat"}, nprobe=16):
        assert all(len(hits) == 10 and {hit.label for hit in hits} == {"cat"} for hits in answers)
        everything = plain.opened(mode).search(queries, len(plain.vectors), nprobe=16)
        for hits, others in zip(answers, everything, strict=True):
            expected = [hit.score for hit in others if hit.label == "cat"][:10]
            # FastScan rounds its look-up tables to 8 bits, more or less finely with what else it looks at.
            np.testing.assert_allclose([hit.score for hit in hits], expected, atol=0.02)


def test_one_text_is_not_taken_for_its_letters(labelled):
    for search in (labelled.whole.search, labelled.whole.search_rows):
        with pytest.raises(UsageError, match=r"labels is the text 'rare/1'; give a set of labels.*\{'rare/1'\}"):
            search(labelled.vectors[0], labels="rare/1")


@pytest.mark.parametrize("form", [list, tuple, set, frozenset, lambda labels: dict.fromkeys(labels)], ids=str)
def test_labels_come_in_any_collection(labelled, form):
    names = sorted(labels_of({"some"}))
    expected = labelled.whole.search(labelled.vectors[:5], labels={*names})
    assert labelled.whole.search(labelled.vectors[:5], labels=form([*names, names[0]])) == expected


def test_the_last_few_selections_are_kept(labelled, monkeypatch):
    made: list[int] = []
    of = Selection.of

    def counted(rows: Any, *others: Any) -> Selection:
        made.append(len(rows))
        return of(rows, *others)

    monkeypatch.setattr(Selection, "of", counted)
    index, query = Index.open(labelled.index), labelled.vectors[0]
    first = index.search(query, labels={"some/1", "some/2"})
    for _ in range(3):
        assert index.search(query, labels=["some/2", "some/1"]) == first
    assert len(made) == 1
    for number in range(16):
        index.search(query, labels={f"half/{number}"})
    assert len(made) == 17
    assert index.search(query, labels={"some/1", "some/2"}) == first
    assert len(made) == 18, "old ones go, so that an index asked for many labels does not grow"


@pytest.mark.parametrize("mode", MODES)
def test_both_ways_lead_to_the_same(built, mode, monkeypatch):
    queries, index = queries_for(built, 30), built.opened(mode)
    found = []
    for small in (10**9, -1):
        monkeypatch.setattr(selection, "_SMALL", small)
        monkeypatch.setattr(selection, "_SCANNED_FOR_ONE", 10**12)
        found.append(index.search(queries, 10, labels=labels_of({"half"}), settings=built.exhaustive))
    assert_same(*found)


@pytest.mark.parametrize("nprobe", [1, 4, 16])
@pytest.mark.parametrize("rows", [1, 30, 3000])
def test_as_many_rows_are_seen_as_without_a_selection(labelled, nprobe, rows):
    """Of lists that hold few of the selected, more are visited."""
    places = np.sort(np.random.default_rng(rows).choice(3000, rows, replace=False))
    lists = labelled.whole._lists
    chosen = lists.select(places)
    nlist = lists.nlist
    count = chosen.lists_to_visit(nprobe, nlist, 3000)
    assert nprobe <= count <= len(chosen.lists) or count == len(chosen.lists)
    seen = count * rows / len(chosen.lists)
    assert seen >= 0.99 * min(rows, nprobe * 3000 / nlist)


@pytest.mark.parametrize("mode", MODES)
def test_a_selection_knows_which_lists_hold_its_rows(labelled, mode):
    of_row = dict(enumerate(lists_of_rows(labelled)))
    lists = labelled.opened(mode)._lists
    for rows in (np.array([5]), np.array([0, 1000, 2999]), np.arange(0, 3000, 100), np.arange(3000)):
        assert lists.select(rows).lists.tolist() == sorted({of_row[row] for row in rows.tolist()})


def lists_of_rows(built: Built) -> list[int]:
    """The list that the codes of each row begin with, by row number."""
    codes = built.quantizer.encode(built.vectors).codes
    place_of = {uri: place for place, uri in enumerate(built.uris)}
    return [int(codes[place_of[built.whole.record(row).uri], 0]) for row in range(len(built.vectors))]
