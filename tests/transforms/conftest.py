"""A store and indexes of it, built once; tests that damage them work on copies."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import stores

from pipelines import index
from pipelines.index import IndexRequest
from pipelines.runner import Runner
from serving.manifest import IndexManifest, RunManifest, load_index_manifest, load_run_manifest
from serving.quantizer import Quantizer
from transforms.encoding import load_quantizer


@dataclass
class Made:
    """A store of vectors, and what was put into it."""

    path: Path
    run: RunManifest
    vectors: np.ndarray
    labels: list[str]
    rejected: list[str]
    uris: list[str] = field(init=False)

    def __post_init__(self):
        self.uris = [f"/made/{number:06}.jpg" for number in range(len(self.vectors))]

    @property
    def root(self) -> str:
        return str(self.path)


def make(path, count, dim, **options) -> Made:
    vectors = stores.clustered(count, dim)
    labels = [f"cluster {number % 20}" for number in range(count)]
    rejected = [f"/made/{number:06}x.jpg" for number in range(0, count, 97)]
    run = stores.write_store(path, vectors, labels=labels, rejected=rejected, **options)
    return Made(path, run, vectors, labels, rejected)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Made:
    """1,200 vectors of 32 dimensions in parts of several row groups, and 13 rejects."""
    return make(tmp_path_factory.mktemp("made") / "store", 1200, 32)


@pytest.fixture(scope="session")
def made_small(tmp_path_factory) -> Made:
    """Too few to train on: 60 vectors of 8 dimensions, and a reject."""
    return make(tmp_path_factory.mktemp("small") / "store", 60, 8, unit_size=16)


def build(made: Made, folder: Path, **options) -> Path:
    index.run(IndexRequest(made.root, str(folder), **options), Runner())
    return folder


@pytest.fixture(scope="session")
def built(made, tmp_path_factory) -> Path:
    """An IVF-PQ index of `made` in three shards, 16 dimensions."""
    return build(made, tmp_path_factory.mktemp("built") / "index", dim=16, shards=3)


@pytest.fixture(scope="session")
def built_faithful(made, tmp_path_factory) -> Path:
    """An index of `made` that ranks by whole vectors at last, in three shards, 16 dimensions."""
    return build(made, tmp_path_factory.mktemp("faithful") / "index", dim=16, shards=3, recall_against="raw")


@pytest.fixture(scope="session")
def built_small(made_small, tmp_path_factory) -> Path:
    """The exact index of `made_small`, in three shards."""
    return build(made_small, tmp_path_factory.mktemp("built-small") / "index", shards=3)


@dataclass
class Copy:
    """A folder that a test may damage."""

    path: Path

    @property
    def root(self) -> str:
        return str(self.path)

    @property
    def run(self) -> RunManifest:
        return load_run_manifest(self.root)

    @property
    def version(self) -> IndexManifest:
        return load_index_manifest(self.root)


@pytest.fixture
def store(made, tmp_path) -> Copy:
    """A copy of the store."""
    return Copy(Path(shutil.copytree(made.path, tmp_path / "store")))


@pytest.fixture
def index_copy(built, tmp_path) -> Copy:
    """A copy of the index."""
    return Copy(Path(shutil.copytree(built, tmp_path / "index")))


@pytest.fixture
def faithful_copy(built_faithful, tmp_path) -> Copy:
    """A copy of the index that ranks by whole vectors at last."""
    return Copy(Path(shutil.copytree(built_faithful, tmp_path / "index")))


@pytest.fixture(scope="session")
def quantizer(built) -> Quantizer:
    """The trained quantizer of `built`."""
    return load_quantizer(str(built), load_index_manifest(str(built)).quantizer)


@pytest.fixture(scope="session")
def quantizer_faithful(built_faithful) -> Quantizer:
    """The quantizer of `built_faithful`, which keeps codes of whole vectors."""
    return load_quantizer(str(built_faithful), load_index_manifest(str(built_faithful)).quantizer)


@pytest.fixture(scope="session")
def quantizer_small(built_small) -> Quantizer:
    """The quantizer of `built_small`, which keeps whole vectors."""
    return load_quantizer(str(built_small), load_index_manifest(str(built_small)).quantizer)
