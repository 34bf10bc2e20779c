import hashlib
import logging
import pickle
import threading
from collections import Counter
from pathlib import Path

import apache_beam as beam
import numpy as np
import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from describing import DIM, FakeEmbedder, describe, listed

from serving.images import load
from transforms import units as under_test
from transforms.catalog import part_uri
from transforms.metrics import counters
from transforms.planning import Planner
from transforms.progress import tally
from transforms.schema import EMBEDDED
from transforms.units import EmbedSettings, EmbedUnit, EmbedUnits


@pytest.fixture
def embedder(monkeypatch):
    """Take the place of the frozen artifact."""
    fake = FakeEmbedder()
    monkeypatch.setattr(under_test, "open_cached", lambda _uri, _engine: fake)
    return fake


@pytest.fixture
def images(tmp_path):
    """Ten good pictures and three bad ones."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(["baseline.jpg", "rgb.png", "still.gif", "rgb.bmp", "lossy.webp"] * 2):
        (folder / f"{number}-{name}").write_bytes(pictures.good()[name])
    for name in ("empty.jpg", "words.txt", "cut-rgb.png"):
        (folder / name).write_bytes(pictures.bad()[name][0])
    return folder


def settle(tmp_path, images, unit_size=100, **options):
    """Plan to embed a folder; return the settings of a worker and the units."""
    store = f"{tmp_path}/store"
    refs = sorted(listed(*Path(images).iterdir()))
    plan = Planner(f"{store}/runs/run/plan", {}, unit_size).plan(refs, ())
    return EmbedSettings(store, "run", "f00d", **options), plan.units


def work(settings, units):
    """Put units through a worker by hand."""
    worker = EmbedUnit(pickle.loads(pickle.dumps(settings)))
    worker.setup()
    try:
        worker.start_bundle()
        records = [record for unit in units for record in worker.process(unit)]
        return records + [windowed.value for windowed in worker.finish_bundle()]
    finally:
        worker.teardown()


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (3, 1), (1, 4), (2, 32)])
def test_a_unit_becomes_a_part(tmp_path, images, embedder, threads, batch):
    embedder.batch = batch
    (tmp_path / "hearts").mkdir()
    settings, units = settle(tmp_path, images, threads=threads, heartbeat=f"{tmp_path}/hearts")
    records = work(settings, units)
    assert [name for name, _, _ in records] == list(units)
    assert [sum(counts) for counts in zip(*(record[1:] for record in records), strict=True)] == [13, 3]
    assert sum(embedder.calls.values()) == 10
    assert threading.get_ident() not in embedder.calls
    assert tally(tmp_path / "hearts") == (13, 3)
    rows = []
    for unit in units:
        table = pq.read_table(part_uri(settings.store, "f00d", unit))
        rows += table.to_pylist()
        told = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        assert told == {"lookalike.embedder": "f00d", "lookalike.unit": unit, "lookalike.dim": str(DIM)}
    assert [row["uri"] for row in rows] == sorted(map(str, images.iterdir()))
    for row in rows:
        data = Path(row["uri"]).read_bytes()
        assert (row["bytes"], row["content_hash"]) == (len(data), hashlib.sha256(data).digest())
        if row["status"] == EMBEDDED:
            pixels = load(data, (8, 8)).pixels
            assert row["embedding"] == describe(pixels[np.newaxis])[0].astype(np.float16).tolist()
    assert Counter(row["reason"] for row in rows) == {None: 10, "empty": 1, "not_an_image": 1, "truncated": 1}


def test_a_unit_whose_part_exists_is_done(tmp_path, images, embedder):
    (tmp_path / "hearts").mkdir()
    settings, units = settle(tmp_path, images, unit_size=4, heartbeat=f"{tmp_path}/hearts")
    assert len(units) > 3
    work(settings, units[1:3])
    parts = {unit: Path(part_uri(settings.store, "f00d", unit)) for unit in units}
    before = {unit: path.stat().st_mtime_ns for unit, path in parts.items() if path.exists()}
    assert before.keys() == set(units[1:3])
    embedder.calls.clear()
    for path in (tmp_path / "hearts").iterdir():
        path.unlink()
    records = work(settings, units)
    assert {name for name, _, _ in records} == set(units) - before.keys()
    assert {unit: parts[unit].stat().st_mtime_ns for unit in before} == before
    assert sum(embedder.calls.values()) == sum(images - rejects for _, images, rejects in records)
    assert tally(tmp_path / "hearts")[0] == 13, "what was found done counts as done"


def test_the_vector_type_asked_for_reaches_the_part(tmp_path, images, embedder):
    embedder.returns = np.full(DIM, 70000.0)
    settings, units = settle(tmp_path, images, vector_type="float32")
    work(settings, units)
    column = pa.concat_tables(pq.read_table(part_uri(settings.store, "f00d", unit)) for unit in units)["embedding"]
    assert column.type.value_type == pa.float32()
    assert column.drop_null().to_pylist() == [[70000.0] * DIM] * 10


def test_a_fault_in_one_thread_ends_the_unit_at_once(tmp_path, images, embedder):
    """The others stop after the image they are at, and no part is written."""
    asked = []

    def fail(pixels):
        asked.append(len(pixels))
        raise ZeroDivisionError

    embedder.embed = fail
    settings, units = settle(tmp_path, images, threads=2)
    with pytest.raises(ZeroDivisionError):
        work(settings, units)
    assert len(asked) <= 2
    assert not Path(part_uri(settings.store, "f00d", units[0])).exists()


def test_a_unit_is_begun_before_the_one_before_is_written(tmp_path, images, embedder):
    """Its record comes out with the next unit or at the bundle's end, and never before its part is there."""
    settings, units = settle(tmp_path, images, unit_size=4)
    worker = EmbedUnit(settings)
    worker.setup()
    worker.start_bundle()
    told = []
    for number, unit in enumerate(units):
        told += [name for name, _, _ in worker.process(unit)]
        assert told == list(units[:number])
        assert all(Path(part_uri(settings.store, "f00d", name)).exists() for name in told)
    assert [windowed.value[0] for windowed in worker.finish_bundle()] == [units[-1]]
    assert list(worker.finish_bundle()) == []
    worker.teardown()
    assert sum(embedder.calls.values()) == 10


def test_a_bundle_that_failed_leaves_nothing_to_the_next(tmp_path, images, embedder):
    settings, units = settle(tmp_path, images, unit_size=4)
    worker = EmbedUnit(settings)
    worker.setup()
    worker.start_bundle()
    embed, embedder.embed = embedder.embed, lambda _pixels: 1 / 0
    assert list(worker.process(units[0])) == []
    with pytest.raises(ZeroDivisionError):
        list(worker.process(units[1]))
    embedder.embed = embed
    worker.start_bundle()
    records = [record for unit in units for record in worker.process(unit)]
    records += [windowed.value for windowed in worker.finish_bundle()]
    worker.teardown()
    assert [name for name, _, _ in records] == list(units)
    assert [sum(counts) for counts in zip(*(record[1:] for record in records), strict=True)] == [13, 3]


def run_through_beam(settings, units):
    options = PipelineOptions(["--allow_unsafe_triggers"])
    logging.getLogger("apache_beam.runners.portability.local_job_service").setLevel(logging.ERROR)
    pipeline = beam.Pipeline(FnApiRunner(), options=options)
    _ = pipeline | beam.Create(list(units)) | EmbedUnits(settings)
    result = pipeline.run()
    result.wait_until_finish()
    return counters(result)


@pytest.mark.usefixtures("embedder")
def test_beam_runs_units_and_counts(tmp_path, images):
    settings, units = settle(tmp_path, images, unit_size=4, threads=2)
    counted = run_through_beam(settings, units)
    written = sum(path.stat().st_size for path in images.iterdir())
    assert {name: counted[f"embed/{name}"] for name in ("images", "embedded", "bytes_read")} == {
        "images": 13,
        "embedded": 10,
        "bytes_read": written,
    }
    assert (counted["embed/images_by_litert"], counted["embed/batches"]) == (13, 13)
    rejects = {name: count for name, count in counted.items() if "rejected" in name}
    assert rejects == {f"embed/rejected_{reason}": 1 for reason in ("empty", "not_an_image", "truncated")}
    assert "embed/units_found_done" not in counted
    assert all(Path(part_uri(settings.store, "f00d", unit)).exists() for unit in units)
    assert run_through_beam(settings, units) == {"embed/units_found_done": len(units)}


def test_an_embedder_that_cannot_be_loaded_ends_the_run_with_its_own_sentence(tmp_path, images):
    settings, units = settle(tmp_path, images)
    with pytest.raises(Exception, match=r"embedders/f00d/embedder\.json does not exist") as caught:
        run_through_beam(settings, units)
    assert "AttributeError" not in str(caught.value)
