"""Generated vectors, what is said of them, and the store made of them."""

import json

import numpy as np
import pytest

from benchmarks import collection, names, stores, vectors
from pipelines import index
from pipelines.runner import Runner
from serving.index import Index
from serving.manifest import load_run_manifest

pytestmark = pytest.mark.usefixtures("one_faiss_thread")


def seeds(count=60, dim=24):
    return vectors.unit(np.maximum(np.random.default_rng(3).standard_normal((count, dim)), 0))


def generated(folder, *arguments, **options):
    vectors.generate(*arguments, folder / "x.npy", **options)
    return np.load(folder / "x.npy")


def test_rows_are_of_length_one_and_never_negative(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "_CHUNK", 128)
    rows = generated(tmp_path, seeds(), 300)
    assert (rows.shape, rows.dtype) == ((300, 24), np.float32)
    assert rows.min() == 0
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert len(np.unique(rows, axis=0)) == 300


def test_a_seed_gives_the_same_rows_and_another_none_of_them(tmp_path):
    first, again = (generated(tmp_path, seeds(), 200, seed=5) for _ in range(2))
    other = generated(tmp_path, seeds(), 200, seed=6)
    np.testing.assert_array_equal(first, again)
    assert (first @ other.T).max() < 1 - 1e-6


def test_fewer_seeds_than_neighbours(tmp_path):
    assert generated(tmp_path, seeds(5), 10).shape == (10, 24)


def test_weights_add_up_to_one():
    mixed = vectors._weights(np.random.default_rng(0), 50, 13, vectors.Process(noise=0))
    assert ((mixed > 0).sum(axis=1) == 4).all()
    moved = vectors._weights(np.random.default_rng(0), 4000, 13, vectors.Process())
    for weights in (mixed, moved):
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    assert moved.var() == pytest.approx(mixed.var() + 1.6**2 / 13, rel=0.02)  # of 13 deviates, less their mean


@pytest.mark.parametrize(("dimension", "near"), [(3, 0.3), (8, 1)])
def test_intrinsic_dimension_of_a_sphere(dimension, near):
    """A sphere has no edge, near which neighbours lie to one side only."""
    random = np.random.default_rng(1)
    surface = vectors.unit(random.standard_normal((3000, dimension + 1)))
    turned = surface @ np.linalg.qr(random.standard_normal((40, dimension + 1)))[0].T
    assert vectors.intrinsic_dimension(turned.astype(np.float32)) == pytest.approx(dimension, abs=near)


def test_generated_vectors_are_like_their_seeds(tmp_path):
    given = vectors.stand_in(500, 320)
    real, made = vectors.describe(given), vectors.describe(generated(tmp_path, given, len(given)))
    assert made.intrinsic == pytest.approx(real.intrinsic, rel=0.3)
    assert made.intrinsic_small == pytest.approx(real.intrinsic_small, rel=0.3)
    assert made.tenth == pytest.approx(real.tenth, rel=0.15)


def test_figures_by_hand():
    rows = seeds(40)
    apart = np.sort(np.linalg.norm(rows[:, np.newaxis] - rows, axis=2), axis=1)
    found = vectors.describe(3 * rows)
    assert found.first == pytest.approx(np.median(apart[:, 1]), rel=1e-4)
    assert found.tenth == pytest.approx(np.median(apart[:, 10]), rel=1e-4)
    assert found.zeros == pytest.approx(np.mean([number == 0 for row in rows for number in row]))
    assert found.variance == pytest.approx(np.square(rows - rows.mean(axis=0)).sum() / 40, rel=1e-5)


def test_a_file_appears_when_it_is_whole(tmp_path):
    def write(rows):
        with vectors.write_rows(tmp_path / "x.npy", 10, 24) as append:
            append(rows[:7])
            if len(rows) < 10:
                raise KeyboardInterrupt
            append(rows[7:])

    with pytest.raises(KeyboardInterrupt):
        write(seeds(9))
    assert not (tmp_path / "x.npy").exists()
    write(seeds(10))
    pieces = dict(vectors.read_rows(tmp_path / "x.npy", 4))
    assert list(pieces) == [0, 4, 8]
    np.testing.assert_array_equal(np.concatenate(list(pieces.values())), seeds(10))


def test_seeds_that_are_no_photos_are_said_to_be_none(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LOOKALIKE_PHOTOS", raising=False)
    monkeypatch.setattr(vectors.stand_in, "__defaults__", (150, 64, 0))
    monkeypatch.setattr("sys.argv", ["vectors", "--count", "30", "--out", str(tmp_path / "new" / "x.npy")])
    vectors.main()
    assert "150 vectors of each" in (said := capsys.readouterr().out)
    assert "stand-in, not photos" in said
    assert len(np.load(tmp_path / "new" / "x.npy")) == 30


def test_exact_neighbours_over_several_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "_ROWS", 16)
    np.save(tmp_path / "x.npy", seeds(50))
    asked = vectors.unit(np.random.default_rng(8).random((7, 24)))
    right = np.argsort(-(asked @ seeds(50).T), axis=1)[:, :20]
    np.testing.assert_array_equal(collection.exact(tmp_path / "x.npy", asked, 20), right)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """Two thousand vectors, their store in small parts, and an index of three shards."""
    folder = tmp_path_factory.mktemp("store")
    vectors.generate(seeds(200, 64), 2000, folder / "x.npy")
    labels = [f"label {number % 7}" for number in range(2000)]
    manifest = stores.write_store(folder / "store", folder / "x.npy", labels, part_rows=512)
    request = index.IndexRequest(str(folder / "store"), str(folder / "index"), dim=32, shards=3)
    index.run(request, Runner(()))
    return folder, manifest


def test_a_store_is_as_embedding_leaves_it(indexed):
    folder, manifest = indexed
    assert load_run_manifest(str(folder / "store")) == manifest
    assert (manifest.rows, manifest.live, manifest.dim, manifest.accounting.embedded) == (2000, 2000, 64, 2000)
    assert len(manifest.parts) > 4
    assert json.loads((folder / "store" / "CURRENT").read_text()) == {"run": manifest.run_id}


def test_an_index_of_a_store_finds_every_vector_under_its_name(indexed):
    folder, _ = indexed
    opened = Index.open(str(folder / "index"))
    answers = [hits[0] for hits in opened.search(np.load(folder / "x.npy"), 1, nprobe=10_000, rerank=200)]
    assert [hit.uri for hit in answers] == [names.uri_of(number) for number in range(2000)]
    assert {hit.label for hit in answers if names.number_of(hit.uri) % 7 == 3} == {"label 3"}
    np.testing.assert_array_equal(names.numbering(2000)[[hit.row for hit in answers]], np.arange(2000))
