"""Indexes that several test modules search."""

import dataclasses
import shutil
from pathlib import Path

import indexes
import numpy as np
import pytest
import stores
from indexes import Built

RAW, DIM = 48, 24
CLUSTERS = 20
KINDS = {"rare": 0.001, "few": 0.01, "some": 0.1, "half": 0.5}
"""Shares of the rows whose labels begin so; the others' begin with `rest`, and few have none."""


@pytest.fixture(scope="session")
def pq(tmp_path_factory: pytest.TempPathFactory) -> Built:
    built = indexes.build(tmp_path_factory.mktemp("pq"), stores.clustered(1200, RAW), 3, DIM, labels_of(1200))
    assert built.manifest.kind == "ivf-pq"
    return built


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Built:
    built = indexes.build(tmp_path_factory.mktemp("exact"), stores.clustered(120, RAW), 3, DIM, labels_of(120))
    assert built.manifest.kind == "exact"
    return built


@pytest.fixture(scope="session")
def faithful(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Ranks at last by codes of whole vectors; rows are labelled by kind and cluster."""
    return _labelled(tmp_path_factory.mktemp("faithful"), recall_against="raw")


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Rows are labelled by kind and cluster."""
    return _labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """One shard of 4-bit codes, nothing to rank again by."""
    built = indexes.build(
        tmp_path_factory.mktemp("plain"), stores.clustered(1200, RAW), 1, DIM, labels_of(1200), max_bytes_per_vector=16
    )
    assert built.manifest.parameters["refine_bytes"] == 0
    return built


@pytest.fixture(params=["pq", "exact"])
def built(request: pytest.FixtureRequest) -> Built:
    found: Built = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def copied(pq: Built, tmp_path: Path) -> Built:
    """An index that a test may damage."""
    return _copy(pq, tmp_path)


@pytest.fixture
def copied_faithful(faithful: Built, tmp_path: Path) -> Built:
    """Another one."""
    return _copy(faithful, tmp_path)


def labels_of(rows: int) -> list[str | None]:
    return [("cat", "dög", None)[number % 3] for number in range(rows)]


def _labelled(root: Path, **options: str) -> Built:
    rows = 3000
    vectors = stores.clustered(rows, RAW, CLUSTERS)
    kinds = np.full(rows, "rest")
    order, start = np.random.default_rng(2).permutation(rows), 0
    for kind, share in KINDS.items():
        kinds[order[start : start + round(share * rows)]] = kind
        start += round(share * rows)
    labels: list[str | None] = [f"{kind}/{number % CLUSTERS}" for number, kind in enumerate(kinds)]
    for place in order[-50:]:
        labels[place] = None
    return indexes.build(root, vectors, 3, DIM, labels, **options)


def _copy(built: Built, to: Path) -> Built:
    shutil.copytree(built.root, to, dirs_exist_ok=True)
    return dataclasses.replace(built, root=to)
