import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving import storage
from serving.errors import ImageRejected, StorageError
from serving.images import Limits
from transforms.reading import Ahead, Reading, read_image
from transforms.schema import ImageRef

LIMITS = Limits()
MANY = Ahead(images=4, bytes=1000)


class Store:
    """A store of `size` bytes an object, which remembers how many reads are under way and lets them go when told."""

    def __init__(self, held=False):
        self.gate = threading.Event()
        if not held:
            self.gate.set()
        self.lock = threading.Lock()
        self.started = []
        self.under_way = self.most = 0

    def read(self, uri, etag=None):
        with self.lock:
            self.started.append(uri)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        self.gate.wait(10)
        with self.lock:
            self.under_way -= 1
        if etag == "broken":
            raise StorageError("broken")
        return bytes(int(uri.rpartition("-")[2]))


@pytest.fixture
def store(monkeypatch):
    found = Store()
    monkeypatch.setattr(storage, "of", lambda _uri: found)
    return found


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as threads:
        yield threads


def refs(*sizes, etag="e"):
    return [ImageRef(f"gs://b/{number:03}-{size}", etag, size, 0, None) for number, size in enumerate(sizes)]


def settled(store, count):
    """Wait until `count` reads have begun, and a little longer to see whether more do."""
    deadline = time.monotonic() + 5
    while len(store.started) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    return len(store.started)


def test_all_images_come_once_each_with_its_place_and_bytes(store, pool):
    images = refs(*range(1, 101))
    reading = Reading(images, LIMITS, pool, MANY)
    reads = [read for _ in images for read in reading.take()]
    assert sorted(read.place for read in reads) == list(range(100))
    for read in reads:
        assert (read.ref, len(read.data), read.error) == (images[read.place], read.place + 1, None)
    assert reading.take() == []
    assert reading.seconds >= 0
    assert store.most <= MANY.images


def test_what_has_come_is_handed_over_together(store, pool):
    reading = Reading(refs(*[1] * 10), LIMITS, pool, MANY)
    settled(store, 4)
    assert len(reading.take(3)) == 3
    assert reading.left == 7
    settled(store, 7)
    assert len(reading.take(100)) == 4, "no more may have been read ahead"
    rest = [read for _ in range(3) for read in reading.take(1)]
    assert (len(rest), reading.left, reading.take(5)) == (3, 0, [])


def test_local_files_are_read_in_turn_by_one_thread(tmp_path):
    images = []
    for number in range(20):
        (tmp_path / f"{number:02}").write_bytes(bytes(number))
        entry = storage.of(str(tmp_path)).stat(str(tmp_path / f"{number:02}"))
        images.append(ImageRef(entry.uri, entry.etag, entry.size, 0, None))
    with ThreadPoolExecutor(16) as pool:
        submitted = []
        submit = pool.submit
        pool.submit = lambda work, some: submitted.append([place for place, _ in some]) or submit(work, some)
        reading = Reading(images, LIMITS, pool, Ahead(images=10))
        assert submitted == [[*range(8)], [8, 9]]
        found = {}
        while reads := reading.take(4):
            found |= {read.place: len(read.data) for read in reads}
    assert found == {number: number for number in range(20)}


def test_no_image_is_no_wait(pool):
    assert Reading([], LIMITS, pool, MANY).take() == []


def test_reading_is_ahead_by_so_many_images_and_no_more(store, pool):
    reading = Reading(refs(*[1] * 50), LIMITS, pool, MANY)
    assert settled(store, 4) == 4
    reading.take()
    assert settled(store, 5) == 5
    reading.stop()
    assert settled(store, 5) == 5


@pytest.mark.parametrize(
    ("sizes", "begun"),
    [
        ((400, 400, 400, 1), 2),  # the third has no room, and nothing overtakes it
        ((999, 1, 1), 2),
        ((5000, 1), 1),  # too large for the room: it goes alone
        ((1, 5000, 1), 1),
    ],
)
def test_bytes_are_bounded_too(store, pool, sizes, begun):
    store.gate.clear()
    reading = Reading(refs(*sizes), LIMITS, pool, MANY)
    assert settled(store, begun) == begun
    store.gate.set()
    assert {reading.take()[0].place for _ in sizes} == set(range(len(sizes)))


def test_a_slow_image_holds_up_none_of_the_others(store, pool, monkeypatch):
    late = threading.Event()
    read = store.read

    def slow(uri, etag=None):
        if uri.startswith("gs://b/000"):
            late.wait(10)
        return read(uri, etag)

    monkeypatch.setattr(store, "read", slow)
    reading = Reading(refs(*[1] * 20), LIMITS, pool, MANY)
    assert {reading.take()[0].place for _ in range(19)} == set(range(1, 20))
    late.set()
    assert reading.take()[0].place == 0


def test_what_went_wrong_is_handed_over(store, pool):  # noqa: ARG001
    images = [*refs(1, etag="broken"), *refs(7, 2000)[1:]]
    reading = Reading(images, Limits(max_bytes=1999), pool, MANY)
    errors = {read.place: read.error for _ in images for read in reading.take()}
    assert isinstance(errors[0], StorageError)
    assert isinstance(errors[1], ImageRejected)


def test_who_waits_is_let_go_when_the_reading_stops(store, pool):
    store.gate.clear()
    reading = Reading(refs(1, 1), LIMITS, pool, MANY)
    waiting = [pool.submit(reading.take) for _ in range(3)]
    time.sleep(0.01)
    reading.stop()
    assert [thread.result(5) for thread in waiting] == [[]] * 3
    store.gate.set()


def test_who_waits_is_let_go_when_others_took_the_rest(store, pool):
    store.gate.clear()
    reading = Reading(refs(1, 1), LIMITS, pool, MANY)
    waiting = [pool.submit(reading.take) for _ in range(5)]
    time.sleep(0.01)
    store.gate.set()
    found = [thread.result(5) for thread in waiting]
    assert sorted(read.place for reads in found for read in reads) == [0, 1]


def test_a_body_that_is_cut_short_unnoticed_is_asked_for_again(monkeypatch):
    answers = [b"12", b"", b"1234"]

    class Short:
        def read(self, uri, etag=None):  # noqa: ARG002
            return answers.pop(0)

    monkeypatch.setattr(storage, "of", lambda _uri: Short())
    assert read_image(ImageRef("gs://b/a", "e", 4, 0, None), LIMITS) == b"1234"
    answers[:] = [b"12"] * 9
    with pytest.raises(StorageError, match="gs://b/a: 2 bytes came of 4; check the store, then run again"):
        read_image(ImageRef("gs://b/a", "e", 4, 0, None), LIMITS)
