import hashlib
import logging
import os
import pickle
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import apache_beam as beam
import numpy as np
import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from serving import storage
from serving.errors import AccessDenied, Changed, NotFound, StorageError, TimedOut
from serving.images import Limits, load
from transforms import embedding
from transforms.catalog import part_uri
from transforms.embedding import (
    Clock,
    EmbedSettings,
    EmbedUnit,
    EmbedUnits,
    Outcome,
    check_store,
    embed_some,
    part_table,
)
from transforms.metrics import counters
from transforms.planning import Planner
from transforms.progress import tally
from transforms.reading import Ahead, Reading
from transforms.schema import EMBEDDED, REJECTED, UNREAD, ImageRef, part_schema, to_parquet

DIM = 6
LIMITS = Limits()


class FakeEmbedder:
    """Means of colours and a little more; `returns` takes the place of what it would say."""

    spec = SimpleNamespace(input_size=(8, 8), dim=DIM)
    engine = "litert"

    def __init__(self, returns=None, batch=1):
        self.returns = returns
        self.batch = batch
        self.calls = Counter()

    def embed(self, pixels):
        assert pixels.shape == (len(pixels), 8, 8, 3)
        assert 1 <= len(pixels) <= self.batch
        self.calls[threading.get_ident()] += len(pixels)
        return describe(pixels) if self.returns is None else np.asarray([self.returns] * len(pixels), np.float32)


def describe(pixels):
    halves = [pixels[:, :4].mean(axis=(1, 2)), pixels[:, 4:].mean(axis=(1, 2))]
    return np.concatenate(halves, axis=1).astype(np.float32)


def embed_image(ref, embedder, limits, vector_type="float16"):
    """Read one image and embed it."""
    with ThreadPoolExecutor(1) as pool:
        read = Reading([ref], limits, pool, Ahead()).take()
    [outcome] = embed_some([read], embedder, limits, vector_type, Clock())
    return outcome


def listed(*paths):
    return [ImageRef(entry.uri, entry.etag, entry.size, entry.updated, None) for entry in map(stat, paths)]


def stat(path):
    return storage.of(str(path)).stat(str(path))


@pytest.fixture
def picture(tmp_path):
    """A good picture on disk."""
    path = tmp_path / "a.jpg"
    path.write_bytes(pictures.good()["baseline.jpg"])
    return path


class FailingStorage:
    """A store whose reads fail as told."""

    def __init__(self, error):
        self.error = error

    def read(self, uri, etag=None):  # noqa: ARG002
        raise self.error


# One image


@pytest.mark.parametrize("name", ["baseline.jpg", "turned-6.jpg", "rgba.png", "animated.gif", "lossy.webp", "cmyk.tif"])
def test_a_picture_becomes_what_the_query_side_would_make_of_it(tmp_path, name):
    data = pictures.good()[name]
    (tmp_path / name).write_bytes(data)
    (ref,) = listed(tmp_path / name)
    outcome = embed_image(ref, FakeEmbedder(), LIMITS)
    known = load(data, (8, 8))
    assert (outcome.status, outcome.reason, outcome.message) == (EMBEDDED, None, None)
    np.testing.assert_array_equal(outcome.vector, describe(known.pixels[np.newaxis])[0])
    assert (outcome.width, outcome.height) == (known.width, known.height) == (64, 48)
    assert (outcome.size, outcome.content_hash) == (len(data), hashlib.sha256(data).digest())


@pytest.mark.parametrize("name", [*pictures.bad()])
def test_a_bad_picture_is_rejected_with_its_reason_and_what_is_known_of_it(tmp_path, name):
    data, reason = pictures.bad()[name]
    (tmp_path / name).write_bytes(data)
    (ref,) = listed(tmp_path / name)
    embedder = FakeEmbedder()
    outcome = embed_image(ref, embedder, LIMITS)
    assert (outcome.status, outcome.reason, outcome.vector) == (REJECTED, reason, None)
    assert outcome.message
    assert (outcome.size, outcome.content_hash) == (len(data), hashlib.sha256(data).digest())
    assert not embedder.calls


def test_a_picture_that_changed_after_listing_is_rejected(picture):
    (ref,) = listed(picture)
    os.utime(picture, ns=(1, 1))
    outcome = embed_image(ref, FakeEmbedder(), LIMITS)
    assert (outcome.reason, outcome.size, outcome.content_hash) == ("unreadable", None, None)
    assert outcome.message == f"{picture} has changed since it was listed"


def test_a_picture_that_went_after_listing_is_rejected(picture):
    (ref,) = listed(picture)
    picture.unlink()
    outcome = embed_image(ref, FakeEmbedder(), LIMITS)
    assert (outcome.reason, outcome.message) == ("unreadable", f"{picture} does not exist")


def test_an_image_listed_without_etag_is_read_as_it_is(picture):
    ref = ImageRef(str(picture), "", 0, 0, None)
    assert embed_image(ref, FakeEmbedder(), LIMITS).status == EMBEDDED


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimedOut("no answer for 30 s"), "timeout"),
        (StorageError("the store is busy"), "unreadable"),
        (NotFound("it does not exist"), "unreadable"),
        (Changed("it has changed"), "unreadable"),
        (AccessDenied("permission denied"), "unreadable"),
    ],
)
def test_what_a_store_says_becomes_a_reason(monkeypatch, error, reason):
    monkeypatch.setattr(storage, "of", lambda _uri: FailingStorage(error))
    outcome = embed_image(ImageRef("gs://b/a.jpg", "e", 1, 0, None), FakeEmbedder(), LIMITS)
    assert outcome.reason == reason
    assert str(error) in outcome.message
    # What is gone or replaced has no etag next time, or another; the rest may pass, and is tried again.
    assert outcome.status == (REJECTED if isinstance(error, NotFound | Changed) else UNREAD)


def test_an_outage_is_not_taken_for_many_bad_images():
    unread = [Outcome(reason="unreadable", message="permission denied", unread=True)] * 10
    good = [Outcome(vector=np.ones(3, np.float32))]
    check_store(unread[:9])  # too few to tell
    check_store(unread + good * 10)  # half of them
    with pytest.raises(StorageError, match=r"10 of 19 images of a unit could not be read, such as: permission denied"):
        check_store(unread + good * 9)


def test_a_fault_of_the_program_is_not_taken_for_one_of_the_picture(monkeypatch):
    monkeypatch.setattr(storage, "of", lambda _uri: FailingStorage(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        embed_image(ImageRef("gs://b/a.jpg", "e", 1, 0, None), FakeEmbedder(), LIMITS)


def test_what_was_listed_too_large_is_not_read(monkeypatch, picture):
    monkeypatch.setattr(storage, "of", lambda _uri: FailingStorage(AssertionError("read")))
    ref = ImageRef(str(picture), "e", 1001, 0, None)
    outcome = embed_image(ref, FakeEmbedder(), Limits(max_bytes=1000))
    assert (outcome.reason, outcome.message, outcome.size) == ("too_large", "1,001 bytes; the limit is 1,000", None)


def test_limits_reach_the_decoder(picture):
    (ref,) = listed(picture)
    assert embed_image(ref, FakeEmbedder(), Limits(max_pixels=64 * 48 - 1)).reason == "too_large"
    assert embed_image(ref, FakeEmbedder(), Limits(min_side=49)).reason == "too_small"
    assert embed_image(ref, FakeEmbedder(), Limits(max_bytes=ref.size)).status == EMBEDDED


@pytest.mark.parametrize(
    ("value", "precision", "status"),
    [
        (0.0, "float16", REJECTED),
        (0.0, "float32", REJECTED),
        (np.nan, "float16", REJECTED),
        (np.nan, "float32", REJECTED),
        (np.inf, "float16", REJECTED),
        (-np.inf, "float32", REJECTED),
        (65504.0, "float16", EMBEDDED),
        (-65504.0, "float16", EMBEDDED),
        (70000.0, "float16", REJECTED),
        (70000.0, "float32", EMBEDDED),
        (1e-5, "float16", REJECTED),
        (1e-5, "float32", EMBEDDED),
        (1.0, "float16", EMBEDDED),
    ],
)
def test_a_vector_that_says_nothing_or_does_not_fit_is_rejected(picture, value, precision, status):
    (ref,) = listed(picture)
    vector = np.zeros(DIM, np.float32)
    vector[2] = value
    outcome = embed_image(ref, FakeEmbedder(vector), LIMITS, precision)
    assert outcome.status == status
    assert (outcome.vector is None) == (status == REJECTED)
    assert (outcome.width, outcome.size) == (64, ref.size)


def test_one_bad_value_among_good_ones_rejects_the_vector(picture):
    (ref,) = listed(picture)
    for bad in (np.nan, np.inf, 1e6):
        vector = np.ones(DIM, np.float32)
        vector[-1] = bad
        assert embed_image(ref, FakeEmbedder(vector), LIMITS).reason == "unreadable"


# A part


def outcomes_with_gaps(count, dim, seed=0):
    """Random outcomes, of which about a third are rejects."""
    rng = np.random.default_rng(seed)
    return [
        Outcome(reason="empty", message="no bytes", size=0, content_hash=b"\1" * 32)
        if rng.random() < 0.3
        else Outcome(rng.standard_normal(dim).astype(np.float32), None, None, 9, 8, 7, b"\2" * 32)
        for _ in range(count)
    ]


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize(("count", "row_group"), [(0, 4), (1, 4), (40, 7), (40, 100)])
def test_a_part_comes_back_from_parquet_as_it_was(tmp_path, precision, count, row_group):
    outcomes = outcomes_with_gaps(count, 5)
    refs = [ImageRef(f"/é/{number}", f"{number:x}", 1, 1_700_000_000_000_001 + number, "x") for number in range(count)]
    table = part_table(refs, outcomes, part_schema(precision))
    (tmp_path / "part.parquet").write_bytes(to_parquet(table, row_group=row_group))
    back = pq.read_table(tmp_path / "part.parquet")
    back.validate(full=True)
    assert back.schema.names == part_schema(precision).names
    rows = back.to_pylist()
    assert [row["uri"] for row in rows] == [ref.uri for ref in refs]
    assert [row["etag"] for row in rows] == [ref.etag for ref in refs]
    assert back["updated"].cast(pa.int64()).to_pylist() == [ref.updated for ref in refs]
    for row, outcome in zip(rows, outcomes, strict=True):
        told = {name: row[name] for name in ("status", "reason", "message", "width", "height", "content_hash")}
        assert told == {name: getattr(outcome, name) for name in told}
        assert row["bytes"] == outcome.size
        expected = None if outcome.vector is None else outcome.vector.astype(precision).tolist()
        assert row["embedding"] == expected


@pytest.mark.parametrize("kinds", ["rejected", "embedded", "rejected first", "rejected last"])
def test_nulls_stand_where_images_were_rejected(kinds):
    pattern = {"rejected": "000", "embedded": "111", "rejected first": "0011", "rejected last": "1100"}[kinds]
    outcomes = [Outcome(vector=np.ones(3, np.float32)) if mark == "1" else Outcome(reason="empty") for mark in pattern]
    refs = [ImageRef(f"/{number}", "e", 1, 0, None) for number in range(len(pattern))]
    column = part_table(refs, outcomes, part_schema("float32"))["embedding"]
    assert column.to_pylist() == [[1.0] * 3 if mark == "1" else None for mark in pattern]


# A unit


@pytest.fixture
def embedder(monkeypatch):
    """Take the place of the frozen artifact."""
    fake = FakeEmbedder()
    monkeypatch.setattr(embedding, "open_cached", lambda _uri, _engine: fake)
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
        return [record for unit in units for record in worker.process(unit)]
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
