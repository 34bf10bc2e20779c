"""A store that fails now and then costs no image, and one that does not is asked once for each."""

import hashlib
import random
import re
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from real import embed_folder

from jobs import drawings
from serving import remote, storage
from serving.gcs import GoogleStorage
from serving.s3 import S3Storage
from transforms.reading import Ahead

COUNT = 300
FAULTS = {429: 1.25, 500: 1.25, 503: 1.25, "reset": 1.25, "stall": 1, "cut": 2, "short": 2, "clipped": 1, "garbled": 1}
"""Percent of requests; the first four are the 5 % that fail outright."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures by their names, all different, so that one taken for another is noticed; and their folder."""
    folder = tmp_path_factory.mktemp("pictures")
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in drawings.write_collection(folder, COUNT)
    }
    assert len(set(found.values())) == COUNT
    return found, folder


@pytest.fixture(scope="module")
def undisturbed(pictures, artifact, tmp_path_factory):
    """What a run on the local disk makes of them."""
    return embedded(pictures[1], tmp_path_factory.mktemp("store"), artifact)[0]


@pytest.fixture(params=["gcs", "s3"])
def bucket(request, pictures):
    """A bucket that holds the pictures, and the server it is on."""
    uri, fake = request.getfixturevalue(f"{request.param}_server"), request.getfixturevalue(f"{request.param}_fake")
    for name, data in pictures[0].items():
        fake.put(storage.split_bucket(uri)[0], name, data)
    fake.reset()
    return uri, fake


@pytest.fixture
def clients(monkeypatch):
    """The storage clients that are made."""
    made = []
    for kind in (GoogleStorage, S3Storage):
        real = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, real=real: (made.append(self), real(self))[1])
    return made


def embedded(images, store, artifact, **options):
    """Embed all pictures; return the parts' rows by the pictures' names, and the counters."""
    result = embed_folder(images, store, artifact, unit_size=150, **options)
    assert result.manifest.accounting.embedded == result.manifest.accounting.listed == COUNT
    tables = [pq.read_table(store / part.name) for part in result.manifest.parts]
    found = {row["uri"].removeprefix(f"{images}/"): row for table in tables for row in table.to_pylist()}
    assert len(found) == COUNT
    return found, result.counters


def check(found, pictures, undisturbed):
    """Compare every row with its file and with the run on the local disk."""
    for name, data in pictures[0].items():
        row = found[name]
        assert (row["status"], row["reason"], row["message"]) == ("embedded", None, None), name
        assert (row["bytes"], row["content_hash"]) == (len(data), hashlib.sha256(data).digest()), name
        np.testing.assert_array_equal(row["embedding"], undisturbed[name]["embedding"], err_msg=name)


def is_download(request):
    """Tell whether a request is for the bytes of an object."""
    return re.match(r"GET (/download/|/bucket-\d+/.)", request) is not None


class Trouble:
    """Chooses faults by a seed: the nth download always gets the same one."""

    def __init__(self, seed):
        self._random = random.Random(seed)

    def __call__(self, request):
        if not is_download(request):
            return None
        at = 100 * self._random.random()
        for fault, share in FAULTS.items():
            if at < share:
                return fault
            at -= share
        return None


def test_faults_cost_no_image(bucket, pictures, undisturbed, clients, artifact, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "READ_SECONDS", 0.5)
    uri, fake = bucket
    fake.chooser = Trouble(seed=16)
    found, counters = embedded(uri, tmp_path, artifact)
    check(found, pictures, undisturbed)
    assert set(fake.done) == set(FAULTS)
    assert sum(fake.done[fault] for fault in (429, 500, 503, "reset")) >= COUNT / 25
    downloads = [request for request in fake.requests if is_download(request)]
    assert len(downloads) >= COUNT + sum(fake.done.values())
    assert len(clients) == 1
    assert counters["embed/embedded"] == COUNT


def test_without_faults_every_image_is_one_request(bucket, pictures, undisturbed, clients, artifact, tmp_path):
    uri, fake = bucket
    found, _ = embedded(uri, tmp_path, artifact, ahead=Ahead(images=8))
    check(found, pictures, undisturbed)
    downloads = Counter(request for request in fake.requests if is_download(request))
    assert (len(downloads), set(downloads.values())) == (COUNT, {1})
    assert len(fake.requests) == COUNT + 1  # and one for the list of them
    assert len(clients) == 1
    if uri.startswith("gs://"):  # moto hangs up after every answer
        assert fake.connections <= 1 + 8
