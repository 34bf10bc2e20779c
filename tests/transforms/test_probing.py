import numpy as np
import pytest
import stores

from pipelines import index, training
from pipelines.runner import Runner
from pipelines.training import IndexRequest
from transforms import probing
from transforms.encoding import load_quantizer
from transforms.probing import SALT, Neighbours, make_probe, queries_of, recall, shares_found, without_queries
from transforms.sampling import live_rows, sample
from transforms.training import train

COLUMNS = ("uri", "label", "part", "row", "uri_hash")


@pytest.fixture(scope="module")
def live(made):
    return live_rows(made.root, made.run, COLUMNS)


@pytest.fixture(scope="module")
def probe(live, quantizer):
    return make_probe(live, quantizer, queries=200)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def neighbours(vectors, uris, asked, k=10, tie=2e-6):
    """Exact neighbours of some uris by brute force in float64, each without itself, ties at the end included."""
    number = {uri: place for place, uri in enumerate(uris)}
    scores = unit(vectors.astype(np.float64))
    found = []
    for uri in asked:
        to_all = scores @ scores[number[uri]]
        to_all[number[uri]] = -np.inf
        least = np.sort(to_all)[::-1][min(k, len(uris) - 1) - 1]
        found.append(frozenset(uris[place] for place in np.flatnonzero(to_all >= least - tie)))
    return found


def store_of(path, vectors, uris=None, **options):
    run = stores.write_store(path, vectors, uris, **options)
    return live_rows(str(path), run, COLUMNS)


# Recall


@pytest.mark.parametrize(
    ("found", "truth", "k", "expected"),
    [
        (["abc"], ["abc"], 3, 1.0),
        (["cab"], ["abc"], 3, 1.0),
        (["abx"], ["abc"], 3, 2 / 3),
        (["xyz"], ["abc"], 3, 0.0),
        ([""], ["abc"], 3, 0.0),
        (["abcd"], ["abc"], 2, 1.0),  # only the first k count, and k of them are enough
        (["xab"], ["ab"], 2, 0.5),
        (["ab"], ["a"], 1, 1.0),
        (["ba"], ["a"], 1, 0.0),
        (["abx"], ["abcd"], 3, 2 / 3),  # c and d are equally near: either will do
        (["abd"], ["abcd"], 3, 1.0),
        (["bcd"], ["abcd"], 3, 1.0),
        (["ab"], ["ab"], 10, 1.0),  # a collection of three
        (["ax"], ["ab"], 10, 0.5),
        (["abc", "xyz"], ["abc", "abc"], 3, 0.5),
        (["abc", "xyz"], ["abc", ""], 3, 1.0),  # what has no neighbour says nothing
        ([], [], 10, 1.0),
        (["a"], [""], 10, 1.0),
    ],
)
def test_recall_by_hand(found, truth, k, expected):
    assert recall([list(uris) for uris in found], [frozenset(uris) for uris in truth], k) == pytest.approx(expected)


def test_shares_of_the_queries_that_can_be_judged():
    found, truth = [["a", "x"], ["y"], ["b", "a"]], [frozenset("ab"), frozenset(), frozenset("abc")]
    assert shares_found(found, truth, 2).tolist() == [0.5, 1.0]


def test_recall_wants_an_answer_for_each_query():
    with pytest.raises(ValueError, match="zip"):
        recall([["a"]], [frozenset("a"), frozenset("b")])


# The truth


@pytest.mark.parametrize(
    ("k", "expected"), [(1, "a"), (2, "abc"), (3, "abc"), (4, "abcd"), (5, "abcde"), (6, "abcde"), (100, "abcde")]
)
def test_the_truth_by_hand(k, expected):
    """Scores fall; b and c are equally near, within what float32 can tell; there are five neighbours in all."""
    scores = np.array([[0.9, 0.8, 0.8 - 1e-6, 0.7, 0.1, -np.inf, -np.inf]], np.float32)
    assert Neighbours(scores, [list("abcde??")]).truth(k) == [frozenset(expected)]


@pytest.mark.parametrize("alike", [100, 127, 128])
def test_the_truth_of_more_copies_than_were_kept_is_not_known(alike):
    uris = [f"/{number}" for number in range(128)]
    scores = np.where(np.arange(128) < alike, 0.5, 0.4).astype(np.float32)[np.newaxis]
    found = Neighbours(scores, [uris])
    assert found.truth(10) == [frozenset(uris[:alike] if alike < 128 else [])]
    assert found.truth(100) == [frozenset(uris[:alike] if alike < 128 else [])]


# Queries


def test_queries_are_those_of_least_hash_and_left_out_of_training(live):
    asked, spared = queries_of(live)
    assert (len(asked), spared) == (240, True)  # a fifth of 1,200
    assert asked.column("uri") == sample(live, 240, SALT).column("uri")
    left = without_queries(live).column("uri")
    assert not set(left) & set(asked.column("uri"))
    assert sorted([*left, *asked.column("uri")]) == sorted(live.column("uri"))


def test_what_is_trained_on_holds_no_query(made, tmp_path, monkeypatch, live):
    """The pipeline's own training, told by the vectors that it gets."""
    seen = []

    def spy(shape, dim, vectors):
        seen.append(vectors)
        return train(shape, dim, vectors)

    monkeypatch.setattr(training, "train", spy)
    trained = training.train_quantizer(IndexRequest(made.root, str(tmp_path), dim=8), made.run)
    (vectors,) = seen
    assert len(vectors) == trained.design.sample == 960
    trained_on = {row.tobytes() for row in vectors}
    assert not trained_on & {row.tobytes() for row in queries_of(live)[0].vectors()}
    assert trained_on == {row.tobytes() for row in without_queries(live).vectors()}


@pytest.mark.parametrize("count", [1, 2, 623, 624, 778])
def test_small_collections_are_asked_with_all_their_rows(tmp_path, count):
    live = store_of(tmp_path, stores.clustered(count, 4))
    asked, spared = queries_of(live)
    assert (sorted(asked.column("uri")), spared) == (live.column("uri"), False)
    assert without_queries(live).column("uri") == live.column("uri")


def test_a_large_collection_is_asked_with_so_many_rows_and_no_more(live, monkeypatch):
    monkeypatch.setattr(probing, "held_out", lambda rows: min(50, rows))
    assert len(queries_of(live)[0]) == 50
    assert len(without_queries(live)) == len(live) - 50


def test_a_growing_collection_keeps_its_queries(tmp_path, made):
    """Whether a row is asked with goes by its own hash: new rows come in, and old ones change places with no others."""
    small = store_of(tmp_path / "small", made.vectors[:1000], made.uris[:1000])
    large = store_of(tmp_path / "large", made.vectors, made.uris)
    before, after = (set(queries_of(rows)[0].column("uri")) for rows in (small, large))
    old = after & set(made.uris[:1000])
    assert (len(before), len(after)) == (200, 240)
    assert old <= before or before <= old
    # Of 240 queries drawn from 1,200 rows 200 are among the first 1,000, give or take 6.
    assert 170 < len(before & after) <= 200


# The probe


def test_a_probe_asks_with_a_sample_of_live_rows(made, live, probe):
    assert len(probe.rows) == len(probe.vectors) == len(probe.raw.uris) == len(probe.reduced.uris) == 200
    assert probe.held_out
    assert probe.rows.column("uri") == sample(live, 240, SALT).column("uri")[:200]
    places = [made.uris.index(uri) for uri in probe.rows.column("uri")]
    np.testing.assert_array_equal(probe.vectors, made.vectors[places])
    assert probe.rows.column("label") == [made.labels[place] for place in places]


@pytest.mark.parametrize("k", [1, 3, 10, 100])
def test_the_truth_is_brute_force_in_both_spaces(made, quantizer, probe, k):
    asked = probe.rows.column("uri")
    reduced = quantizer.reduce(made.vectors)
    truths = {}
    for space, vectors in (("raw", made.vectors), ("reduced", reduced)):
        truths[space] = getattr(probe, space).truth(k)
        exact = neighbours(vectors, made.uris, asked, k)
        assert all(uri not in found and len(found) >= k for uri, found in zip(asked, truths[space], strict=True))
        # In float32 a score may fall on the other side of the tie's 2e-6.
        agreeing = sum(found == right for found, right in zip(truths[space], exact, strict=True))
        assert agreeing >= 197
    assert truths["raw"] != truths["reduced"]


def test_scores_are_cosines_best_first(made, quantizer, probe):
    number = {uri: place for place, uri in enumerate(made.uris)}
    for space, vectors in (("raw", made.vectors), ("reduced", quantizer.reduce(made.vectors))):
        found = getattr(probe, space)
        whole = unit(vectors.astype(np.float64))
        assert (np.diff(found.scores, axis=1) <= 0).all()
        for uri, scores, uris in zip(probe.rows.column("uri")[:20], found.scores, found.uris, strict=False):
            exact = whole[[number[other] for other in uris]] @ whole[number[uri]]
            np.testing.assert_allclose(scores, exact, atol=1e-6)
            assert len(set(uris)) == 128


def test_twins_are_equally_near(tmp_path, quantizer):
    """Of 16 copies of each vector any ten are the ten nearest to one of them."""
    vectors = np.repeat(stores.clustered(20, 32), 16, axis=0)
    probe = make_probe(store_of(tmp_path, vectors), quantizer, queries=50)
    for uri, raw, reduced in zip(probe.rows.column("uri"), probe.raw.truth(10), probe.reduced.truth(10), strict=True):
        group = int(uri[-10:-4]) // 16
        twins = {f"/made/{number:06}.jpg" for number in range(16 * group, 16 * group + 16)} - {uri}
        assert raw == reduced == twins
    for one, fifteen in zip(probe.raw.truth(1), probe.raw.truth(15), strict=True):
        assert one == fifteen


def test_more_twins_than_can_be_told_apart_are_not_judged(tmp_path, quantizer):
    """Of two hundred copies, no 128 are the truth: finding ten others is no fault."""
    vectors = np.concatenate([np.repeat(stores.clustered(1, 32), 200, axis=0), stores.clustered(60, 32, seed=1)])
    live = store_of(tmp_path, vectors)
    probe = make_probe(live, quantizer)
    asked, truth = probe.rows.column("uri"), probe.raw.truth(10)
    copies = {f"/made/{number:06}.jpg" for number in range(200)}
    assert len(asked) == 260
    assert {bool(near) for uri, near in zip(asked, truth, strict=True) if uri in copies} == {False}
    others = [near for uri, near in zip(asked, truth, strict=True) if uri not in copies]
    assert sum(len(near) >= 10 for near in others) > 30, "the others are, save where the copies come tenth"
    assert all(len(near) >= 10 or not near for near in others)
    wrong = [["nothing"]] * len(asked)
    judged = [number for number, near in enumerate(truth) if near]
    assert shares_found(wrong, truth).tolist() == [0.0] * len(judged)


@pytest.mark.parametrize("count", [1, 2, 5, 31])
def test_small_collections_have_small_truths(tmp_path, count):
    vectors = stores.clustered(count, 8) + np.float32(0.25)  # none of zeros
    run = stores.write_store(tmp_path / "store", vectors)
    manifest, _ = index.run(IndexRequest(f"{tmp_path}/store", f"{tmp_path}/index"), Runner())
    live = live_rows(f"{tmp_path}/store", run, COLUMNS)
    quantizer = load_quantizer(f"{tmp_path}/index", manifest.quantizer)
    probe = make_probe(live, quantizer)
    uris = live.column("uri")
    assert len(probe.rows) == count
    assert not probe.held_out
    for k in (1, 10, 100):
        expected = neighbours(vectors, uris, probe.rows.column("uri"), k) if count > 1 else [frozenset()]
        assert probe.raw.truth(k) == probe.reduced.truth(k) == expected
    recalls = [figure for name, figure in manifest.measured.items() if name.startswith("recall")]
    assert recalls == [1.0] * 6
    assert (manifest.measured["queries"], manifest.measured["held_out"]) == (count, False)
