import dataclasses
import itertools

import numpy as np
import pytest
import stores

from pipelines import index as indexing
from pipelines.index import IndexRequest
from pipelines.runner import Runner
from serving.index import Hit, Index
from serving.manifest import SearchSettings
from transforms import measuring
from transforms.measuring import _LATENCY_QUERIES, QUERIES, SALT, Probe, ask, make_probe, measure, recall, tune
from transforms.sampling import live_rows, sample

COLUMNS = ("uri", "label", "part", "row", "uri_hash")


@pytest.fixture(scope="module")
def live(made):
    return live_rows(made.root, made.run, COLUMNS)


@pytest.fixture(scope="module")
def index(built):
    return Index.open(str(built))


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


def test_recall_wants_an_answer_for_each_query():
    with pytest.raises(ValueError, match="zip"):
        recall([["a"]], [frozenset("a"), frozenset("b")])


# The probe


def test_a_probe_asks_with_a_sample_of_live_rows(made, live, probe):
    assert len(probe.rows) == len(probe.vectors) == len(probe.raw) == len(probe.reduced) == 200
    assert probe.rows.column("uri") == sample(live, 200, SALT).column("uri")
    places = [made.uris.index(uri) for uri in probe.rows.column("uri")]
    np.testing.assert_array_equal(probe.vectors, made.vectors[places])
    assert probe.rows.column("label") == [made.labels[place] for place in places]


def test_the_truth_is_brute_force_in_both_spaces(made, quantizer, probe):
    asked = probe.rows.column("uri")
    reduced = quantizer.reduce(made.vectors)
    agreeing = {"raw": 0, "reduced": 0}
    for space, vectors in (("raw", made.vectors), ("reduced", reduced)):
        for uri, found, exact in zip(asked, getattr(probe, space), neighbours(vectors, made.uris, asked), strict=True):
            assert uri not in found
            assert len(found) >= 10
            agreeing[space] += found == exact
    # In float32 a score may fall on the other side of the tie's 2e-6.
    assert min(agreeing.values()) >= 198
    assert probe.raw != probe.reduced


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_truth_counts_as_many_neighbours_as_asked(made, live, quantizer, k):
    probe = make_probe(live, quantizer, queries=20, k=k)
    assert probe.raw == neighbours(made.vectors, made.uris, probe.rows.column("uri"), k)


def store_of(path, vectors):
    run = stores.write_store(path, vectors)
    return live_rows(str(path), run, COLUMNS)


def test_twins_are_equally_near(tmp_path, quantizer):
    """Of 16 copies of each vector any ten are the ten nearest to one of them."""
    vectors = np.repeat(stores.clustered(20, 32), 16, axis=0)
    probe = make_probe(store_of(tmp_path, vectors), quantizer, queries=50)
    for uri, raw, reduced in zip(probe.rows.column("uri"), probe.raw, probe.reduced, strict=True):
        group = int(uri[-10:-4]) // 16
        twins = {f"/made/{number:06}.jpg" for number in range(16 * group, 16 * group + 16)} - {uri}
        assert raw == reduced == twins


def test_more_twins_than_can_be_told_apart_are_not_judged(tmp_path, quantizer):
    """Of a hundred copies, no thirty are the truth: finding ten others is no fault."""
    vectors = np.concatenate([np.repeat(stores.clustered(1, 32), 100, axis=0), stores.clustered(60, 32, seed=1)])
    live = store_of(tmp_path, vectors)
    probe = make_probe(live, quantizer, queries=len(live))
    judged = [truth for uri, truth in zip(probe.rows.column("uri"), probe.raw, strict=True) if int(uri[-10:-4]) >= 100]
    assert sum(len(truth) >= 10 for truth in judged) > 30, "the others are, save where the copies come tenth"
    copies = [f"/made/{number:06}.jpg" for number in range(100)]
    for seed in range(5):
        some = np.random.default_rng(seed).permutation(copies)[:11]
        found = [[uri for uri in some if uri != own][:10] for own in probe.rows.column("uri")]
        alike = [n for n, uri in enumerate(probe.rows.column("uri")) if uri in copies]
        assert recall([found[n] for n in alike], [probe.raw[n] for n in alike]) == 1.0


@pytest.mark.parametrize("count", [1, 2, 5, 31])
def test_small_collections_have_small_truths(tmp_path, count):
    vectors = stores.clustered(count, 8) + np.float32(0.25)  # none of zeros
    stores.write_store(tmp_path / "store", vectors)
    manifest, _ = indexing.run(IndexRequest(f"{tmp_path}/store", f"{tmp_path}/index"), Runner())
    live = live_rows(
        f"{tmp_path}/store", stores.RunManifest.load(f"{tmp_path}/store/runs/run-1/manifest.json"), COLUMNS
    )
    quantizer = indexing.load_quantizer(f"{tmp_path}/index", manifest.quantizer)
    probe = make_probe(live, quantizer)
    uris = live.column("uri")
    assert len(probe.rows) == count
    if count > 1:
        assert probe.raw == probe.reduced == neighbours(vectors, uris, probe.rows.column("uri"))
    else:
        assert probe.raw == probe.reduced == [frozenset()]
    assert manifest.measured["recall_at_10"] == manifest.measured["recall_at_10_raw"] == 1.0
    assert manifest.measured["queries"] == count


# Asking, tuning, measuring


def test_asking_leaves_out_whoever_asks(index, probe):
    answers = ask(index, probe, settings=SearchSettings(16, 640))
    for uri, hits in zip(probe.rows.column("uri"), answers, strict=True):
        assert len(hits) == 10
        assert uri not in {hit.uri for hit in hits}
    shorter = ask(index, probe, 3, SearchSettings(16, 640))
    assert [hits[:3] for hits in answers] == shorter


def test_asking_goes_by_the_settings_of_the_index_unless_told(index, probe):
    assert ask(index, probe) == ask(index, probe, settings=index.info.search)


def reached(index, probe, settings):
    return recall([[hit.uri for hit in hits] for hits in ask(index, probe, settings=settings)], probe.reduced)


@pytest.fixture(scope="module")
def grid(index, probe):
    """Recall of every setting that tuning may choose, cheapest first."""
    info = index.info
    bytes_a_list = info.rows / info.parameters["nlist"] * info.parameters["code_bytes"]
    settings = [SearchSettings(nprobe, rerank) for nprobe in (1, 2, 4, 8, 16) for rerank in (20, 40, 80, 160, 320, 640)]
    settings.sort(key=lambda one: one.nprobe * bytes_a_list + one.rerank * info.reduced_dim)
    return [(one, reached(index, probe, one)) for one in settings]


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 0.95, 0.98])
def test_tuning_takes_the_cheapest_that_reaches_the_target(index, probe, grid, target):
    assert max(recall for _, recall in grid) >= target
    assert tune(index, probe, target) == next(one for one, recall in grid if recall >= target)


def test_tuning_takes_the_best_when_none_reaches_the_target(index, probe, grid):
    best = max(recall for _, recall in grid)
    assert tune(index, probe, 1.01) == next(one for one, recall in grid if recall == best)


@dataclasses.dataclass
class FakeIndex:
    """Finds everything from `enough` lists on, nothing below; remembers what was tried."""

    nlist: int
    enough: int
    kind: str = "ivf-pq"

    def __post_init__(self):
        self.tried = set()

    @property
    def info(self):
        parameters = {"nlist": self.nlist, "code_bytes": 8}
        return dataclasses.make_dataclass("Info", ["kind", "rows", "reduced_dim", "parameters"])(
            self.kind, 10**6, 1, parameters
        )

    def search(self, vectors, k, nprobe, rerank):  # noqa: ARG002
        self.tried.add(nprobe)
        return [[Hit("a", None, 1.0, 0)] if nprobe >= self.enough else [] for _ in vectors]


@pytest.mark.parametrize(
    ("nlist", "enough", "expected"),
    [(1, 1, 1), (2, 2, 2), (16, 3, 4), (16, 16, 16), (1000, 300, 512), (1000, 513, 1000), (10, 5, 8), (3, 2, 2)],
)
def test_tuning_tries_all_powers_of_two_and_then_all_lists(probe, nlist, enough, expected):
    one = Probe(probe.rows.take(np.arange(1)), probe.vectors[:1], [frozenset("a")], [frozenset("a")])
    fake = FakeIndex(nlist, enough)
    assert tune(fake, one).nprobe == expected
    assert fake.tried <= {2**power for power in range(20)} | {nlist}
    assert max(fake.tried) <= nlist


def test_an_exact_index_needs_no_tuning(probe):
    fake = FakeIndex(1, 1, "exact")
    assert tune(fake, probe) == SearchSettings(1, 0)
    assert not fake.tried


def test_what_is_measured(index, probe, made, built):
    settings = SearchSettings(8, 160)
    measured = measure(index, probe, settings)
    answers = ask(index, probe, settings=settings)
    label_of = dict(zip(made.uris, made.labels, strict=True))
    right = [
        label_of[hits[0].uri] == label_of[uri] for hits, uri in zip(answers, probe.rows.column("uri"), strict=True)
    ]
    folder = built / "versions" / index.info.version
    stored = sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith(("shard", "refine", "rec")))
    documents = sum(path.stat().st_size for path in folder.glob("shard-*.json"))
    uris = [[hit.uri for hit in hits] for hits in answers]
    assert measured["queries"] == 200
    assert measured["recall_at_10"] == round(recall(uris, probe.reduced), 4) >= 0.9
    assert measured["recall_at_10_raw"] == round(recall(uris, probe.raw), 4)
    assert measured["precision_at_1"] == round(sum(right) / 200, 4)
    assert measured["bytes_per_vector"] == round((stored - documents) / len(made.vectors), 1)
    assert 0 < measured["p50_us"] <= measured["p99_us"]


@pytest.mark.parametrize("noisy", [0, 1, 2])
def test_one_noisy_moment_is_not_promised(index, probe, monkeypatch, noisy):
    def clock():
        for query in itertools.count():
            yield query
            yield query + (5e-3 if query // _LATENCY_QUERIES == noisy else (40 + query % 2) * 1e-6)

    ticks = clock()
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(ticks))
    measured = measure(index, probe, SearchSettings(4, 40))
    assert (measured["p50_us"], measured["p99_us"]) == (40.5, 41.0)


def test_precision_is_told_of_labelled_rows_only(index, probe):
    unlabelled = dataclasses.replace(
        probe.rows, table=probe.rows.table.set_column(1, "label", [[None] * len(probe.rows)])
    )
    assert probe.rows.table.column_names[1] == "label"
    measured = measure(index, dataclasses.replace(probe, rows=unlabelled), SearchSettings(4, 40))
    assert measured["precision_at_1"] is None


def test_the_manifest_promises_what_was_measured(index, live, quantizer, made):
    manifest = index.info
    probe = make_probe(live, quantizer)
    assert len(probe.rows) == min(QUERIES, len(made.vectors))
    assert manifest.search == tune(index, probe)
    again = measure(index, probe, manifest.search)
    stable = ("queries", "recall_at_10", "recall_at_10_raw", "precision_at_1", "bytes_per_vector")
    assert {name: again[name] for name in stable} == {name: manifest.measured[name] for name in stable}
    assert manifest.measured["recall_at_10"] >= measuring.TARGET
