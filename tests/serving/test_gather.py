"""An index spread over processes answers as one process does."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import stores

from pipelines.index import IndexRequest, run
from pipelines.runner import Runner
from serving import Index
from serving.errors import EmbedderMismatch, LookalikeError, NotFound, UsageError
from serving.gather import GatheredIndex, merge_answers, share_out
from serving.index import Hit
from serving.manifest import SearchSettings

ROWS, RAW = 1500, 48


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return stores.clustered(ROWS, RAW, seed=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray) -> Path:
    root = tmp_path_factory.mktemp("gather")
    labels = [("cat", "dog", None)[number % 3] for number in range(ROWS)]
    stores.write_store(root / "store", vectors, labels=labels)
    run(IndexRequest(str(root / "store"), str(root / "index"), dim=24, shards=5), Runner())
    return root / "index"


@pytest.fixture(scope="module")
def whole(root: Path) -> Index:
    return Index.open(str(root))


@pytest.fixture(scope="module", params=["memory", "mmap"])
def gathered(root: Path, request: pytest.FixtureRequest) -> Iterator[GatheredIndex]:
    with GatheredIndex.open(str(root), 2, mode=request.param) as index:
        yield index


@pytest.fixture(scope="module")
def queries(vectors: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(5)
    return vectors[:200] + np.float32(0.2) * rng.standard_normal((200, RAW), dtype=np.float32)


def exhaustive(index: Index) -> SearchSettings:
    return SearchSettings(index.info.parameters["nlist"], len(index))


def test_at_exhaustive_settings_the_answers_are_those_of_one_process(whole, gathered, queries):
    settings = exhaustive(whole)
    expected, found = whole.search(queries, 10, settings=settings), gathered.search(queries, 10, settings=settings)
    assert [[(hit.uri, hit.label, hit.row) for hit in hits] for hits in found] == [
        [(hit.uri, hit.label, hit.row) for hit in hits] for hits in expected
    ]
    np.testing.assert_allclose(
        [[hit.score for hit in hits] for hits in found],
        [[hit.score for hit in hits] for hits in expected],
        atol=1e-5,
    )


def test_at_tuned_settings_no_neighbour_is_lost(whole, gathered, queries):
    truth = whole.search(queries, 10, settings=exhaustive(whole))

    def recall(answers: list[list[Hit]]) -> float:
        return float(
            np.mean(
                [
                    len({hit.row for hit in hits} & {hit.row for hit in best}) / 10
                    for hits, best in zip(answers, truth, strict=True)
                ]
            )
        )

    assert recall(gathered.search(queries, 10)) >= recall(whole.search(queries, 10)) - 0.001


def test_labels_and_single_queries_go_to_every_process(whole, gathered, queries):
    (expected,) = whole.search(queries[0], 7, labels={"cat"}, settings=exhaustive(whole))
    (found,) = gathered.search(queries[0], 7, labels={"cat"}, settings=exhaustive(whole))
    assert [hit.row for hit in found] == [hit.row for hit in expected]
    assert {hit.label for hit in found} == {"cat"}
    assert len(gathered) == len(whole) == ROWS


def test_bad_queries_are_refused_as_one_process_does(gathered, queries):
    with pytest.raises(UsageError, match="shape"):
        gathered.search(queries[:, :5])
    with pytest.raises(UsageError, match="labels is the text 'cat'"):
        gathered.search(queries[0], labels="cat")
    assert len(gathered.search(queries[0])[0]) == 10, "it goes on after an error"


def test_what_cannot_be_opened_is_refused(root, tmp_path):
    with pytest.raises(NotFound):
        GatheredIndex.open(str(tmp_path), 2)
    with pytest.raises(UsageError, match="processes is 0"):
        GatheredIndex.open(str(root), 0)
    with pytest.raises(EmbedderMismatch):
        GatheredIndex.open(str(root), 2, embedder="another")
    with pytest.raises(UsageError, match="mode is 'disk'"):
        GatheredIndex.open(str(root), 2, mode="disk")


def test_a_process_that_dies_is_told_of(root, queries):
    with GatheredIndex.open(str(root), 2) as index:
        victim = index._workers[0].submit(os.getpid).result()
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(LookalikeError, match="died"):
            index.search(queries[0])


def test_answers_merge_by_score_then_row():
    def hit(score: float, row: int) -> Hit:
        return Hit(f"{row}", None, score, row)

    first = [[hit(0.9, 4), hit(0.5, 1)], [hit(0.1, 0)]]
    second = [[hit(0.9, 2), hit(0.7, 3)], []]
    assert [[found.row for found in hits] for hits in merge_answers([first, second], 3)] == [[2, 4, 3], [0]]


@pytest.mark.parametrize(
    ("rows", "groups", "expected"),
    [
        ([5, 5, 5, 5], 2, [[0, 1], [2, 3]]),
        ([5, 5, 5], 7, [[0], [1], [2]]),
        ([0, 0, 9], 1, [[0, 1, 2]]),
        ([10, 1, 1, 10], 2, [[0, 1], [2, 3]]),
        ([0], 3, [[0]]),
    ],
)
def test_shards_are_shared_out_evenly_and_none_is_left(rows, groups, expected):
    assert share_out(rows, groups) == expected
