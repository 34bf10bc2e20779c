import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from describing import DIM, FakeEmbedder, describe, listed

from serving import storage
from serving.errors import AccessDenied, Changed, NotFound, StorageError, TimedOut
from serving.images import Limits, load
from transforms.embedding import Clock, Outcome, check_store, embed_some, part_table
from transforms.reading import Ahead, Reading
from transforms.schema import EMBEDDED, REJECTED, UNREAD, ImageRef, part_schema, to_parquet

LIMITS = Limits()


def embed_image(ref, embedder, limits, vector_type="float16"):
    """Read one image and embed it."""
    with ThreadPoolExecutor(1) as pool:
        reads = Reading([ref], limits, pool, Ahead()).take()
    [outcome] = embed_some(reads, embedder, limits, vector_type, np.empty((1, 8, 8, 3), np.uint8), Clock())
    return outcome


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
