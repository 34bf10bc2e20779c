"""The comparison's arithmetic, our own side of the peers' protocol, and a whole small run of it."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import lookup, ours, plots, rounds, stores, vectors
from benchmarks.collection import Collection, Space, save
from benchmarks.peers import worker
from benchmarks.rounds import Measured, System

COUNT, DIM = 2000, 64


pytestmark = pytest.mark.usefixtures("one_faiss_thread")


def found(**figures):
    """Of a system that was measured in three rounds."""
    whole = {
        "built": {"build_seconds": 12.34},
        "opened": {"resident_bytes": 5000, "resident_anonymous_bytes": 4000, "open_seconds": 0.25},
        "tuned": {"setting": {"ef": 20}, "reached": True, "curve": [({"ef": 20}, 0.96, 30.0)]},
        "recall": 0.9512,
        "recall_raw": 0.75,
        "p50": [30.0, 50.0, 40.0],
        "p99": [90.0, 70.0, 80.0],
        "batch": [1000.0, 3000.0, 2000.0],
    }
    return Measured(**(whole | figures))


def system(folder, title="peer", **more):
    return System(title, "faiss", folder / title, *(folder / f"{name}.npy" for name in "xqt"), **more)


def test_a_row_holds_medians_and_bytes_a_vector():
    row = lookup.row_of("peer", found(), 100)
    assert row == ("peer", "ef 20", 0.951, 0.75, 40, 80, 2000, 12.3, 40, 10, 0.25)
    assert len(row) == len(lookup.HEADERS)


def test_a_row_of_a_system_that_is_absent_and_why():
    compared = lookup.Compared("raw", {"peer": Measured(absent="it cannot be installed")}, ["remark"])
    assert lookup.row_of("peer", compared.results["peer"], 100) == ("peer", "absent", *[None] * 9)
    assert compared.lines(100)[-2:] == ["remark", "peer is absent: it cannot be installed"]
    assert compared.curves() == {}


@pytest.mark.parametrize(
    ("tuned", "words"),
    [
        ({"setting": {"nprobe": 4, "rerank": 80}, "reached": True}, "nprobe 4, rerank 80"),
        ({"setting": {"ef": 8192}, "reached": False}, "ef 8192 (the best)"),
        ({"setting": {}, "reached": True}, None),
    ],
)
def test_settings_in_words(tuned, words):
    assert lookup.setting_of(tuned) == words


def test_reducing_queries_is_added():
    its = found()
    lookup.add_reduction(its, found(p50=[9.0, 10.0, 11.0], batch=[2000.0]))
    assert (its.p50, its.p99) == ([40.0, 60.0, 50.0], [100.0, 80.0, 90.0])
    assert its.batch == pytest.approx([2000 / 3, 1200, 1000])
    assert its.tuned["curve"] == [({"ef": 20}, 0.96, 40.0)]


def test_a_ratio_is_taken_round_by_round():
    assert lookup.ratio(found(), found(p50=[15.0, 100.0, 40.0])) == 1


def test_a_curve_keeps_what_nothing_beats():
    points = [({"a": 1}, 0.5, 20.0), ({"a": 2}, 0.9, 30.0), ({"b": 1}, 0.4, 25.0), ({"b": 2}, 0.8, 22.0)]
    assert lookup.front(points) == [(20.0, 0.5), (22.0, 0.8), (30.0, 0.9)]


def test_systems_are_opened_together_while_they_fit(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((100, 10), np.float32))  # 6,000 bytes, by the guess
    several = [system(tmp_path, f"peer {number}") for number in range(5)]
    assert [len(group) for group in rounds.groups(several, 12_000)] == [2, 2, 1]
    assert [len(group) for group in rounds.groups(several, 10)] == [1] * 5
    assert list(rounds.groups([], 10)) == [[]]


def test_a_plot_puts_the_fast_left_and_the_good_up(tmp_path):
    curves = {"first": [(10.0, 0.6), (100.0, 0.99)], "second": [(20.0, 0.4), (900.0, 1.0)], "third": [(50.0, 0.3)]}
    axes = plots.Axes(list(curves.values()))
    (x, y), (right, up) = axes.place(10, 0.6), axes.place(900, 1.0)
    assert x < axes.place(95, 0.6)[0] < right
    assert up < y
    assert axes.place(95, 0.6)[0] == pytest.approx((x + right) / 2, abs=1)  # √(10 · 900) ≈ 95
    assert list(axes.latencies()) == [10, 20, 30, 50, 100, 200, 300, 500, 1000]
    plots.draw(curves, "a plot", 0.95, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert {tuple(bytes.fromhex(colour[1:])) for colour in plots._COLOURS[:3]} < set(picture.get_flattened_data())


def test_no_curves_make_an_empty_plot(tmp_path):
    plots.draw({}, "nothing", 0.95, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size


# --- With an index ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A collection whose seeds are no photos and short."""
    folder = tmp_path_factory.mktemp("collection")
    seeds = vectors.unit(np.maximum(np.random.default_rng(2).standard_normal((100, DIM)), 0))
    made = Collection(folder, "made up", [])
    made.raw.vectors.parent.mkdir()
    vectors.generate(seeds, COUNT, made.raw.vectors)
    vectors.generate(seeds, 50, made.raw.queries, seed=1)
    made.raw.solve()
    stores.write_store(made.store, made.raw.vectors)
    return made


@pytest.fixture(scope="module")
def index(small):
    """The folder of an index of it, built and saved by our side of the protocol."""
    side = ours.Ours()
    options = {"store": str(small.store), "building": str(small.folder / "building"), "request": {"dim": 32}}
    side.build(None, 1, options)
    folder = small.folder / "built"
    folder.mkdir()
    side.save(folder)
    assert not (small.folder / "building").exists()
    assert (folder / "CURRENT").exists()
    return folder


def opened(kind, index):
    library = kind()
    assert library.build(None, 1, {"index": str(index)}) == {}
    library.save(index)
    library.load(index, COUNT, DIM, {"index": str(index)})
    return library


@pytest.mark.parametrize("kind", [ours.Ours, ours.Bare])
def test_our_side_finds_numbers_of_vectors(small, index, kind):
    library = opened(kind, index)
    least, most = library.knobs["nprobe"]
    assert least == 1 < most
    library.set_effort(nprobe=most, rerank=640)
    space = small.reduced(index)
    asked, right = np.load(small.raw.queries), np.load(space.truth)
    singly = [np.asarray(library.search(query, 10)) for query in asked]
    at_once = [np.asarray(answer) for answer in library.search_batch(asked, 10)]
    for answers in (singly, at_once):
        assert np.mean([len({*ids} & {*truth}) for ids, truth in zip(answers, right.tolist(), strict=True)]) > 9.5


def test_more_effort_finds_more(small, index):
    library = opened(ours.Ours, index)
    shares = []
    for nprobe in (1, library.knobs["nprobe"][1]):
        library.set_effort(nprobe=nprobe, rerank=640)
        fake = worker.Worker.__new__(worker.Worker)
        fake._library = library
        truths = [str(small.reduced(index).truth), str(small.raw.truth)]
        shares.append(ours.recall(fake, str(small.raw.queries), truths)["recalls"])
    assert shares[0][0] < shares[1][0] > 0.95
    assert shares[1][1] < shares[1][0]


def test_a_reduced_query_is_as_in_the_index(small, index):
    library = opened(ours.Reduction, index)
    asked, right = np.load(small.raw.queries), np.load(small.reduced(index).queries)
    np.testing.assert_allclose([library.search(2 * query, 10) for query in asked], right, atol=1e-5)
    np.testing.assert_allclose(library.search_batch(asked, 10), right, atol=1e-5)


def test_a_whole_comparison_with_one_of_its_own_and_one_that_fails(small, index):
    """Ours in a process of its own, beside one that takes its setting and one whose files are not there."""
    space = small.reduced(index)
    files = (small.raw.vectors, small.raw.queries, space.truth)
    mine = System("mine", "ours", small.folder / "mine", *files, {"index": str(index)})
    bare = System("bare", "bare", small.folder / "bare", *files, {"index": str(index)}, like="mine")
    gone = System("gone", "bare", small.folder / "gone", *files, {"index": str(small.folder / "nowhere")}, like="mine")
    results = rounds.compare([mine, bare, gone], [], small.raw.truth, 0.9, rounds=2, threads=1)
    assert results["mine"].recall >= 0.9
    assert results["mine"].tuned["setting"] == results["bare"].tuned["setting"]
    assert len(results["mine"].p50) == len(results["bare"].batch) == 2
    assert "gone" not in results["gone"].tuned
    assert results["gone"].absent.startswith("bare cannot open: NotFound")
    assert json.loads((small.folder / "mine" / "answer.json").read_text())["build_seconds"] < 1
    rows = [lookup.row_of(title, result, COUNT) for title, result in results.items()]
    assert [row[1] == "absent" for row in rows] == [False, False, True]


def test_a_truth_is_kept(tmp_path):
    space = Space.below(tmp_path)
    save(space.truth, np.array([[3]]))
    space.solve()
    assert np.load(space.truth) == [[3]]
    assert [path.name for path in tmp_path.iterdir()] == ["truth.npy"]
