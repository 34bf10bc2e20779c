"""One contract for all kinds of storage, then what only the stores or only the disk can get wrong."""

import io
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving import disk, remote, storage
from serving.errors import AccessDenied, Changed, Conflict, MissingExtra, NotFound, StorageError, TimedOut, UsageError
from serving.storage import Entry, join

# U+FFFD before the emoji is the order of code points and of UTF-8, but not of UTF-16.
NAMES = [
    " lead", "!", "#", "#x#", "%", "%2F", "100%", "&", "'", "(1)", "*", "**.jpg", "+", "..x", ".hidden", "0", "=", "?",
    "A", "B", "[1]", "\\", "a b", "a!", "a.b", "a/x", "a/é/z", "a0", "a?b=1#c", "ab", "b ", "e\u0301", "q;v", "~",
    "é", "日本/語", "\ufffd", "\U0001f600",
]  # fmt: skip


@pytest.fixture(params=["disk", "gs", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder or bucket."""
    if request.param == "disk":
        return str(tmp_path)
    return str(request.getfixturevalue({"gs": "gcs_server", "s3": "s3_server"}[request.param]))


@pytest.fixture(params=["gs", "s3"])
def remote_store(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A fresh bucket's URI and the server behind it."""
    name = {"gs": "gcs", "s3": "s3"}[request.param]
    uri, fake = request.getfixturevalue(f"{name}_server"), request.getfixturevalue(f"{name}_fake")
    return SimpleNamespace(uri=uri, fake=fake, scheme=request.param)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink every limit, for the next client made."""
    monkeypatch.setattr(remote, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(remote, "READ_SECONDS", 0.15)
    monkeypatch.setattr(remote, "GIVE_UP_SECONDS", 0.4)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    storage._client.cache_clear()


def fill(folder: str, names: list[str]) -> None:
    for number, name in enumerate(names):
        assert storage.create(join(folder, name), b"x" * number)


def rewrite(uri: str, data: bytes) -> None:
    time.sleep(0.02)  # a disk's clock ticks every few milliseconds
    storage.of(uri).delete(uri)
    assert storage.create(uri, data)


def race(work: Callable[[int], Any], threads: int = 8) -> list[Any]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(threads)))


# --- The contract ---------------------------------------------------------------------------------------------------


def test_listing_is_whole_and_in_code_point_order(folder: str) -> None:
    fill(folder, NAMES)
    found = list(storage.list_entries(folder))
    assert [entry.uri for entry in found] == sorted(join(folder, name) for name in NAMES)
    assert {entry.uri: entry.size for entry in found} == {join(folder, name): n for n, name in enumerate(NAMES)}
    assert all(abs(entry.updated / 1e6 - time.time()) < 60 for entry in found)


def test_listing_stays_below_the_folder(folder: str) -> None:
    fill(folder, ["a/x", "a/é/z", "a b/x", "ab", "a.b"])
    for spelling in ("a", "a/"):
        uris = [entry.uri for entry in storage.list_entries(f"{folder}/{spelling}")]
        assert uris == [join(folder, "a", "x"), join(folder, "a", "é", "z")]


def test_empty_folder_lists_nothing(folder: str) -> None:
    assert list(storage.list_entries(folder)) == []


def test_one_object_lists_itself(folder: str) -> None:
    fill(folder, ["cat.jpg", "cat.jpg.txt"])
    assert [entry.uri for entry in storage.list_entries(join(folder, "cat.jpg"))] == [join(folder, "cat.jpg")]


def test_stat_says_what_the_listing_says(folder: str) -> None:
    uri = join(folder, "a/b#1.jpg")
    storage.create(uri, b"12345")
    [listed] = storage.list_entries(folder)
    found = storage.of(uri).stat(uri)
    assert (found.uri, found.size, found.etag) == (uri, 5, listed.etag)
    assert abs(found.updated - listed.updated) < 1_000_001  # a header has whole seconds


def test_odd_names_are_ordinary(folder: str) -> None:
    for name in NAMES:
        assert storage.create(join(folder, name), name.encode()), name
    for name in NAMES:
        uri = join(folder, name)
        etag = storage.of(uri).stat(uri).etag
        assert storage.read(uri, etag) == name.encode()
        storage.of(uri).delete(uri)
        assert not storage.exists(uri), name


def test_etag_changes_with_the_bytes(folder: str) -> None:
    uri = join(folder, "a")
    storage.create(uri, b"one")
    before = storage.of(uri).stat(uri)
    assert storage.read(uri, etag=before.etag) == b"one"
    rewrite(uri, b"two")
    after = storage.of(uri).stat(uri)
    assert after.etag != before.etag
    assert storage.read(uri, etag=after.etag) == b"two"
    for stale in (before.etag, "nonsense", "0", ""):
        with pytest.raises(Changed, match="has changed since it was listed") as raised:
            storage.read(uri, etag=stale)
        assert uri in str(raised.value)
        with pytest.raises(Changed):
            storage.of(uri).read(uri, 1, 1, stale)


def test_read_of_a_removed_object_says_it_is_missing(folder: str) -> None:
    uri = join(folder, "a")
    storage.create(uri, b"one")
    etag = storage.of(uri).stat(uri).etag
    storage.of(uri).delete(uri)
    with pytest.raises(NotFound):
        storage.read(uri, etag=etag)


@pytest.mark.parametrize("data", [b"0123456789", b""])
def test_ranges_are_those_of_a_file(folder: str, data: bytes) -> None:
    uri = join(folder, "digits")
    storage.create(uri, data)
    for start, length in itertools.product([0, 3, 10, 100], [None, 0, 4, 100]):
        expected = data[start:] if length is None else data[start : start + length]
        assert storage.of(uri).read(uri, start, length) == expected, (start, length)


def test_missing_objects(folder: str) -> None:
    uri = join(folder, "none", "such.jpg")
    store = storage.of(uri)
    for action in (store.read, store.stat, storage.open_binary, lambda uri: store.read(uri, 2, 0)):
        with pytest.raises(NotFound, match="does not exist") as raised:
            action(uri)
        assert uri in str(raised.value)
    assert not storage.exists(uri)
    assert store.read_pointer(uri) is None


def test_create_writes_once(folder: str) -> None:
    uri = join(folder, "new/folder/part.parquet")
    assert storage.create(uri, b"first")
    assert not storage.create(uri, b"second")
    assert storage.read(uri) == b"first"


def test_one_of_racing_writers_creates(folder: str) -> None:
    uri = join(folder, "raced")
    done = race(lambda number: storage.create(uri, b"%d" % number))
    assert sorted(done) == [False] * 7 + [True]
    assert storage.read(uri) == b"%d" % done.index(True)
    assert [entry.uri for entry in storage.list_entries(folder)] == [uri]


def test_pointer_moves_from_the_state_that_was_read(folder: str) -> None:
    uri = join(folder, "CURRENT")
    store = storage.of(uri)
    assert store.read_pointer(uri) is None
    store.swap_pointer(uri, b"one", None)
    data, first = store.read_pointer(uri)
    assert data == b"one"
    with pytest.raises(Conflict, match="was moved by another run") as raised:
        store.swap_pointer(uri, b"two", None)
    assert uri in str(raised.value)
    store.swap_pointer(uri, b"two", first)
    with pytest.raises(Conflict):
        store.swap_pointer(uri, b"three", first)
    assert store.read_pointer(uri)[0] == b"two"


def test_pointer_that_was_removed_is_a_conflict(folder: str) -> None:
    uri = join(folder, "CURRENT")
    store = storage.of(uri)
    store.swap_pointer(uri, b"one", None)
    token = store.read_pointer(uri)[1]
    store.delete(uri)
    with pytest.raises(Conflict):
        store.swap_pointer(uri, b"two", token)
    assert store.read_pointer(uri) is None


@pytest.mark.parametrize("present", [False, True])
def test_one_of_racing_swaps_wins(folder: str, present: bool) -> None:
    uri = join(folder, "CURRENT")
    store = storage.of(uri)
    if present:
        store.swap_pointer(uri, b"before", None)
    token = store.read_pointer(uri)[1] if present else None

    def swap(number: int) -> bool:
        try:
            store.swap_pointer(uri, b"%d" % number, token)
        except Conflict:
            return False
        return True

    done = race(swap)
    assert sorted(done) == [False] * 7 + [True]
    assert store.read_pointer(uri)[0] == b"%d" % done.index(True)


def test_delete_twice(folder: str) -> None:
    uri = join(folder, "a")
    storage.create(uri, b"x")
    storage.of(uri).delete(uri)
    storage.of(uri).delete(uri)
    assert not storage.exists(uri)


def parquet_bytes(rows: int, groups: int) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"row": pa.array(range(rows)), "noise": pa.array([os.urandom(1000) for _ in range(rows)])})
    pq.write_table(table, sink, row_group_size=rows // groups, compression="none")
    return sink.getvalue()


def test_open_binary_reads_one_row_group(folder: str) -> None:
    uri = join(folder, "part.parquet")
    storage.create(uri, parquet_bytes(8000, 4))
    with storage.open_binary(uri) as file:
        group = pq.ParquetFile(file).read_row_group(2, columns=["row"])
    assert group["row"].to_pylist() == list(range(4000, 6000))


def test_open_binary_seeks(folder: str) -> None:
    uri = join(folder, "digits")
    storage.create(uri, b"0123456789")
    with storage.open_binary(uri) as file:
        assert (file.read(3), file.tell()) == (b"012", 3)
        assert (file.seek(-2, os.SEEK_END), file.read(9)) == (8, b"89")
        assert (file.seek(1), file.seek(2, os.SEEK_CUR), file.read(1)) == (1, 3, b"3")
        assert (file.seek(50), file.read()) == (50, b"")


# --- Both object stores ---------------------------------------------------------------------------------------------


def test_every_call_is_one_request(remote_store: SimpleNamespace) -> None:
    uri, requests = join(remote_store.uri, "a/b c.jpg"), remote_store.fake.requests
    store = storage.of(uri)

    def count(work: Callable[[], Any]) -> int:
        requests.clear()
        work()
        return len(requests)

    assert count(lambda: store.create(uri, b"12345")) == 1
    etag = store.stat(uri).etag
    assert count(lambda: store.stat(uri)) == 1
    assert count(lambda: store.read(uri)) == 1
    assert count(lambda: store.read(uri, etag=etag)) == 1
    assert count(lambda: store.read(uri, 1, 2, etag)) == 1
    assert count(lambda: store.read_pointer(uri)) == 1
    assert count(lambda: store.swap_pointer(uri, b"54321", etag)) == 1
    assert count(lambda: list(store.list(remote_store.uri))) == 1
    assert count(lambda: store.delete(uri)) == 1


def test_open_binary_asks_for_little(remote_store: SimpleNamespace) -> None:
    uri = join(remote_store.uri, "part.parquet")
    storage.create(uri, parquet_bytes(8000, 4))
    remote_store.fake.requests.clear()
    with storage.open_binary(uri) as file:
        pq.ParquetFile(file).read_row_group(2, columns=["row"])
    assert len(remote_store.fake.requests) <= 4  # what it is, the footer, one column of one group


def test_open_binary_notices_a_replaced_object(remote_store: SimpleNamespace) -> None:
    uri = join(remote_store.uri, "digits")
    storage.create(uri, b"0" * 3_000_000)
    with storage.open_binary(uri) as file:
        assert file.read(3) == b"000"
        rewrite(uri, b"1" * 3_000_000)
        file.seek(2_500_000)
        with pytest.raises(Changed):
            file.read(3)


def test_pages_are_followed(remote_store: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(remote_store.uri, NAMES)
    remote_store.fake.requests.clear()
    remote_store.fake.page_size = 7
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "7")
    found = [entry.uri for entry in storage.list_entries(remote_store.uri)]
    assert found == sorted(join(remote_store.uri, name) for name in NAMES)
    assert len(remote_store.fake.requests) == -(-len(NAMES) // 7)


def test_folder_placeholders_are_skipped(remote_store: SimpleNamespace) -> None:
    bucket = storage.split_bucket(remote_store.uri)[0]
    for key in ("photos/", "photos/cats/", "photos/cats/1.jpg"):
        remote_store.fake.put(bucket, key, b"")
    for uri in (remote_store.uri, join(remote_store.uri, "photos")):
        assert [entry.uri for entry in storage.list_entries(uri)] == [join(remote_store.uri, "photos/cats/1.jpg")]


def test_doubled_slashes_are_kept(remote_store: SimpleNamespace) -> None:
    uri = f"{remote_store.uri}/a//b"
    storage.create(uri, b"x")
    assert [entry.uri for entry in storage.list_entries(join(remote_store.uri, "a"))] == [uri]
    assert storage.read(uri) == b"x"


def test_missing_bucket_is_named(remote_store: SimpleNamespace) -> None:
    missing = f"{remote_store.scheme}://no-such-bucket"
    sentence = f"^the bucket {missing} does not exist"
    with pytest.raises(NotFound, match=sentence):
        list(storage.list_entries(join(missing, "photos")))
    with pytest.raises(NotFound, match=sentence):
        storage.create(join(missing, "a"), b"x")
    with pytest.raises(NotFound, match=f"{missing}.* does not exist"):
        storage.read(join(missing, "a"))


def test_passing_faults_are_retried(remote_store: SimpleNamespace) -> None:
    uri = join(remote_store.uri, "a")
    storage.create(uri, b"0123456789")
    etag = storage.of(uri).stat(uri).etag
    for fault in (503, 429, "lost", "reset", "cut", "clipped", "garbled"):
        remote_store.fake.requests.clear()
        remote_store.fake.faults.append(fault)
        assert storage.read(uri, etag) == b"0123456789", fault
        assert len(remote_store.fake.requests) == 2


def test_lost_answer_to_a_write_is_no_refusal(remote_store: SimpleNamespace) -> None:
    uri = join(remote_store.uri, "CURRENT")
    store = storage.of(uri)
    remote_store.fake.faults.append("lost")
    assert store.create(uri, b"one")
    assert not store.create(uri, b"one")
    token = store.read_pointer(uri)[1]
    remote_store.fake.faults.append("lost")
    store.swap_pointer(uri, b"two", token)
    assert store.read_pointer(uri)[0] == b"two"
    with pytest.raises(Conflict):
        store.swap_pointer(uri, b"two", token)


@pytest.mark.parametrize("status", [401, 403])
def test_denied_access_is_said_at_once(remote_store: SimpleNamespace, status: int) -> None:
    uri = join(remote_store.uri, "a.jpg")
    store = storage.of(uri)
    actions: list[Callable[[], Any]] = [
        lambda: store.stat(uri),
        lambda: store.create(uri, b"x"),
        lambda: store.delete(uri),
        lambda: list(store.list(uri)),
        lambda: store.read(uri),
    ]
    for action in actions:
        remote_store.fake.requests.clear()
        remote_store.fake.faults.append(status)
        with pytest.raises(AccessDenied, match=r"LOOKALIKE_ANONYMOUS=1") as raised:
            action()
        assert str(raised.value).startswith(uri)
        assert "\n" not in str(raised.value)
        assert len(remote_store.fake.requests) == 1
        sentence = str(raised.value)
    assert status == 401 or "(403 a fault)" in sentence


@pytest.mark.usefixtures("impatient")
def test_silence_is_a_timeout(remote_store: SimpleNamespace) -> None:
    uri = join(remote_store.uri, "a.jpg")
    store = storage.of(uri)
    for action in (store.read, store.stat, lambda uri: list(store.list(uri))):
        remote_store.fake.faults.extend(["stall"] * 5)
        with pytest.raises(TimedOut, match="no answer in time") as raised:
            action(uri)
        assert str(raised.value).startswith(uri)
        remote_store.fake.faults.clear()


@pytest.mark.usefixtures("impatient")
def test_lasting_faults_end(remote_store: SimpleNamespace) -> None:
    uri = join(remote_store.uri, "a.jpg")
    storage.create(uri, b"x")
    for fault, sentence in [
        (503, "busy or failing"),
        (400, "refused the request"),
        ("lost", "cannot be reached"),
        ("cut", "cannot be reached"),
        ("garbled", "[Cc]hecksum"),
    ]:
        remote_store.fake.faults.extend([fault] * 9)
        with pytest.raises(StorageError, match=sentence) as raised:
            storage.read(uri)
        assert str(raised.value).startswith(uri)
        remote_store.fake.faults.clear()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.usefixtures("gcs_server", "s3_server")
def test_unreachable_store(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # the port of "discard", where nothing listens
    with pytest.raises(StorageError, match=f"^{scheme}://b/k: the store cannot be reached"):
        storage.read(f"{scheme}://b/k")


@pytest.mark.parametrize("uri", ["gs://-bad-/k", "s3://b d/k", "gs://bucket", "s3://bucket"])
@pytest.mark.usefixtures("gcs_server", "s3_server")
def test_impossible_names_give_a_sentence(uri: str) -> None:
    with pytest.raises(StorageError, match=f"^{uri}"):
        storage.read(uri)


def test_threads_share_one_client(remote_store: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(storage.of(remote_store.uri))
    made = []
    real = kind.__init__
    monkeypatch.setattr(kind, "__init__", lambda self: (made.append(self), real(self))[1])
    storage._client.cache_clear()
    assert len(set(map(id, race(lambda _: storage.of(remote_store.uri), 16)))) == 1
    assert len(made) == 1


# --- Google Cloud Storage -------------------------------------------------------------------------------------------


def test_gs_threads_keep_their_connections(gcs_fake: Any, gcs_server: str) -> None:
    uri = join(gcs_server, "a")
    storage.create(uri, b"x")
    gcs_fake.pause = 0.05  # so that all requests of a round are under way at once, and all connections idle after it
    for _ in range(4):
        race(lambda _: storage.read(uri), 16)
    assert 12 <= gcs_fake.connections <= 16
    assert len(gcs_fake.requests) == 1 + 4 * 16


def test_gs_large_objects_are_written_once(gcs_fake: Any, gcs_server: str) -> None:
    uri, data = join(gcs_server, "shard"), os.urandom(9 << 20)
    assert storage.create(uri, data)
    assert "uploadType=resumable" in gcs_fake.requests[0]
    assert storage.read(uri) == data
    assert not storage.create(uri, b"x" * len(data))
    assert storage.read(uri) == data


@pytest.mark.parametrize("avoided", [False, True])
def test_gs_proxy_of_the_environment(
    gcs_fake: Any, gcs_server: str, monkeypatch: pytest.MonkeyPatch, avoided: bool
) -> None:
    uri = join(gcs_server, "a")
    storage.create(uri, b"x")
    storage._client.cache_clear()
    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if avoided:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    else:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.invalid")
        monkeypatch.setenv("HTTP_PROXY", gcs_fake.url)
    assert storage.read(uri) == b"x"
    assert gcs_fake.requests[-1].startswith("GET /download" if avoided else "GET http://storage.invalid/download")


@pytest.mark.usefixtures("gcs_server")
def test_gs_certificates_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "own.pem"
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(own))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "https://storage.invalid")
    store = storage.of("gs://b")
    assert store._client._http.verify == str(own)  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"^gs://b/k: the store cannot be reached \(OSError\)"):
        store.read("gs://b/k")
    own.touch()
    connections = store._media._lent[0]  # type: ignore[attr-defined]
    assert (connections.cert_reqs, connections.ca_certs) == ("CERT_REQUIRED", str(own))


@pytest.mark.usefixtures("gcs_server")
def test_gs_public_buckets_need_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import gcs

    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setattr(gcs.google.auth, "default", lambda: pytest.fail("looked for credentials"))
    monkeypatch.setenv("LOOKALIKE_ANONYMOUS", "1")
    assert storage.of("gs://public")._client._credentials.token is None  # type: ignore[attr-defined]


@pytest.mark.usefixtures("impatient")
def test_gs_tokens_that_cannot_be_had(gcs_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests
    from google.auth import credentials, exceptions

    from serving import gcs

    class Expired(credentials.Credentials):  # type: ignore[misc]
        failure: Exception

        def refresh(self, _request: object) -> None:
            raise self.failure

    expired = Expired()
    monkeypatch.setattr(gcs, "_credentials", lambda: expired)
    storage._client.cache_clear()
    for failure, kind, sentence in [
        (exceptions.RefreshError("Sign in again"), AccessDenied, "Sign in again.*gcloud auth"),
        (exceptions.TransportError(requests.ConnectionError()), StorageError, "cannot be reached"),
        (exceptions.TransportError(requests.Timeout()), TimedOut, "no answer in time"),
    ]:
        expired.failure = failure
        with pytest.raises(kind, match=f"^{gcs_server}/a: .*{sentence}"):
            storage.read(join(gcs_server, "a"))


def test_gs_refused_tokens_are_renewed(gcs_fake: Any, gcs_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from google.auth import credentials

    from serving import gcs

    class Numbered(credentials.Credentials):  # type: ignore[misc]
        def refresh(self, _request: object) -> None:
            self.token = str(int(self.token or 0) + 1)

    uri = join(gcs_server, "a")
    storage.create(uri, b"x")
    monkeypatch.setattr(gcs, "_credentials", Numbered)
    storage._client.cache_clear()
    gcs_fake.authorizations.clear()
    gcs_fake.faults.extend([401, 401])
    assert storage.read(uri) == b"x"
    assert gcs_fake.authorizations == ["Bearer 1", "Bearer 2", "Bearer 3"]
    gcs_fake.faults.extend([401] * 3)
    with pytest.raises(AccessDenied, match="401 a fault"):
        storage.read(uri)
    assert len(gcs_fake.authorizations) == 6


@pytest.fixture
def black_hole() -> Iterator[tuple[str, list[float]]]:
    """An address that takes connections and never answers; gives it and the times of connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []
        times: list[float] = []

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return
                times.append(time.monotonic())

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", times
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in kept:
            connection.close()


def test_gs_missing_credentials_are_said_in_seconds(
    gcs_server: str, black_hole: tuple[str, list[float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    product = Path("/sys/class/dmi/id/product_name")
    if product.exists() and product.read_text().startswith("Google"):
        pytest.skip("this machine has a metadata server")
    address, times = black_hole
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GCE_METADATA_DETECT_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GCE_METADATA_IP", address)
    monkeypatch.setenv("GCE_METADATA_TIMEOUT", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    code = (
        "import time; from serving import storage, errors; begin = time.monotonic()\n"
        f"try: storage.read({join(gcs_server, 'a')!r})\n"
        "except errors.AccessDenied as error: print(round(time.monotonic() - begin), error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    seconds, _, sentence = done.stdout.partition(" ")
    assert int(seconds) < 10
    assert len(times) == 1
    assert sentence.startswith("gs:// URIs need credentials (Your default credentials were not found); run `gcloud")


# --- S3 -------------------------------------------------------------------------------------------------------------


def test_s3_signs_unless_told_not_to(s3_fake: Any, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    list(storage.list_entries(s3_server))
    monkeypatch.setenv("LOOKALIKE_ANONYMOUS", "1")
    storage._client.cache_clear()
    list(storage.list_entries(s3_server))
    signed, unsigned = s3_fake.authorizations
    assert signed.startswith("AWS4-HMAC-SHA256")
    assert unsigned is None


def test_s3_writes_again_after_a_conflict_of_two_writes(
    s3_fake: Any, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = join(s3_server, "a")
    s3_fake.faults.extend([409, 409])
    assert storage.create(uri, b"x")
    assert len(s3_fake.requests) == 3
    s3_fake.faults.append(409)
    assert not storage.create(uri, b"y")
    assert storage.read(uri) == b"x"
    s3_fake.faults.extend([409] * remote.ATTEMPTS)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(StorageError, match=f"^{uri}: others keep writing it"):
        storage.create(uri, b"z")


def test_s3_breaks_below_http_are_retried(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib3.exceptions import SSLError

    uri = join(s3_server, "a")
    storage.create(uri, b"x")
    client = storage.of(uri)._client  # type: ignore[attr-defined]
    real, breaks = client.get_object, [SSLError("bad record"), ConnectionResetError(), SSLError("again")]

    def break_amid(error: Exception) -> None:
        raise error

    def get(**request: Any) -> dict[str, Any]:
        answer: dict[str, Any] = real(**request)
        if breaks:
            answer["Body"] = SimpleNamespace(read=lambda: break_amid(breaks.pop()))
        return answer

    monkeypatch.setattr(client, "get_object", get)
    assert storage.read(uri) == b"x"
    breaks.extend([SSLError("bad record")] * remote.ATTEMPTS)
    with pytest.raises(StorageError, match=f"^{uri}: the store cannot be reached .SSLError"):
        storage.read(uri)


def test_s3_missing_credentials_are_said_in_seconds(
    s3_server: str, black_hole: tuple[str, list[float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{black_hole[0]}")
    storage._client.cache_clear()
    begin = time.monotonic()
    with pytest.raises(AccessDenied, match=f"^{s3_server}/a: no usable credentials were found"):
        storage.read(join(s3_server, "a"))
    assert time.monotonic() - begin < 10
    assert black_hole[1]


# --- The disk -------------------------------------------------------------------------------------------------------


def test_disk_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=f"^{tmp_path}/none does not exist$"):
        list(storage.list_entries(str(tmp_path / "none")))


def test_disk_folder_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    uri = str(tmp_path / "folder")
    assert not storage.exists(uri)
    for action in (storage.read, storage.open_binary):
        with pytest.raises(StorageError, match=f"^{uri}: Is a directory"):
            action(uri)


def test_disk_denied_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_args: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk, "open", deny, raising=False)
    with pytest.raises(AccessDenied, match=f"^{tmp_path}/a: permission denied$"):
        storage.read(str(tmp_path / "a"))


def test_disk_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    uri = str(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=f"^{uri}: No space left on device$"):
            storage.create(uri, b"x")
        with pytest.raises(StorageError):
            storage.of(uri).swap_pointer(uri, b"x", None)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []
    assert storage.create(uri, b"x")
    assert not storage.create(uri, b"y")
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["a"]


@pytest.mark.parametrize(("links", "dies_in"), [(True, "link"), (False, "replace")])
def test_disk_crash_leaves_the_name_free(tmp_path: Path, links: bool, dies_in: str) -> None:
    uri = str(tmp_path / "part.parquet")
    code = (
        "import os; from serving import storage\n"
        "def no_links(*args): raise PermissionError(1, 'Operation not permitted')\n"
        "def die(*args): os._exit(9)\n"
        f"os.link = os.link if {links} else no_links\n"
        f"os.{dies_in} = die\n"
        f"storage.create({uri!r}, b'half')"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    assert not storage.exists(uri)
    assert storage.create(uri, b"whole")
    assert storage.read(uri) == b"whole"


def test_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    def slow_look(path: str) -> bool:
        found = os.access(path, os.F_OK)
        time.sleep(0.01)
        return found

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os.path, "lexists", slow_look)
    test_one_of_racing_writers_creates(str(tmp_path))
    test_create_writes_once(str(tmp_path / "other"))


def test_disk_loops_of_links_end(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_bytes(b"1")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "a" / "dangling").symlink_to("nowhere")
    (tmp_path / "c").symlink_to(tmp_path / "a" / "b")
    found = [os.path.relpath(entry.uri, tmp_path) for entry in storage.list_entries(str(tmp_path))]
    assert found == sorted(found)
    assert {"a/b/x", "a/dangling", "a/self", "c/x"} <= set(found)
    assert len(found) == len(set(found)) < 10


def test_disk_names_without_utf8_are_listed_in_order(tmp_path: Path) -> None:
    for name in (b"a\xff", b"aa", "aé".encode(), b"a!"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"1")
    found = [entry.uri for entry in storage.list_entries(str(tmp_path))]
    assert found == sorted(found)
    assert str(tmp_path / "a\\xff") in found
    with pytest.raises(NotFound):
        storage.read(str(tmp_path / "a\\xff"))


def test_disk_names_are_spelled_apart(tmp_path: Path) -> None:
    """An escaped spelling never is that of another file, which would be read in its place."""
    names = [b"\xff.jpg", b"\\xff.jpg", b"\xfe", b"\\xfe", b"\\\\xfe", b"\\\xfd", b"\xfd", b"\\xfd", b"\\\\xfd"]
    paths = [folder + b"/" + name for folder in (b"a", b"\xff", b"\\xff") for name in names]
    for path in paths:
        whole = tmp_path / os.fsdecode(path)
        whole.parent.mkdir(exist_ok=True)
        whole.write_bytes(path)
    found = [entry.uri for entry in storage.list_entries(str(tmp_path))]
    assert found == sorted(found)
    assert len(set(found)) == len(found) == len(paths)
    readable = {uri: storage.read(uri) for uri in found if storage.exists(uri)}
    assert readable == {f"{tmp_path}/{path.decode()}": path for path in paths if path.isascii()}


@pytest.fixture
def special(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A pipe, a socket, and links to the pipe and to a device, beside a file and a dangling link."""
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    (tmp_path / "to-device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path is limited to some hundred bytes
        server.bind("socket")
        yield [str(tmp_path / name) for name in ("pipe", "socket", "to-pipe", "to-device")]


def test_disk_lists_files_only(special: list[str], tmp_path: Path) -> None:
    assert all(os.path.lexists(path) for path in special)
    assert [storage.name_of(entry.uri) for entry in storage.list_entries(str(tmp_path))] == ["dangling", "file"]


def test_disk_reads_files_only(special: list[str]) -> None:
    def list_all(uri: str) -> None:
        list(storage.list_entries(uri))

    for path in special:
        for action in (storage.read, storage.open_binary, storage.exists, list_all):
            with pytest.raises(StorageError, match=f"^{path}(: | is no regular file but a pipe)"):
                action(path)


def test_disk_listing_passes_over_what_is_removed_meanwhile(tmp_path: Path) -> None:
    fill(str(tmp_path), ["a", "b", "c"])
    entries = storage.list_entries(str(tmp_path))
    first = next(entries)
    (tmp_path / "b").unlink()
    assert [entry.uri for entry in [first, *entries]] == [str(tmp_path / "a"), str(tmp_path / "c")]


# --- Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/a/b/", "/a/b"),
        ("/a/./b/../c", "/a/c"),
        ("file:///a%20b/c", "/a b/c"),
        ("file://localhost/a", "/a"),
        ("FILE:///a", "/a"),
        ("/a%20b#c?d", "/a%20b#c?d"),
        ("relative/x", f"{os.getcwd()}/relative/x"),
        ("~/x", f"{os.path.expanduser('~')}/x"),
        ("gs://b", "gs://b"),
        ("gs://b/", "gs://b"),
        ("GS://b/a/", "gs://b/a"),
        ("s3://b//a/../é#?%20", "s3://b//a/../é#?%20"),
    ],
)
def test_normalize(uri: str, expected: str) -> None:
    assert storage.normalize(uri) == expected
    assert storage.normalize(expected) == expected


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("", "an empty path names nothing"),
        ("http://x/y", "the scheme http:// is not known"),
        ("gs:///a", "the bucket's name is missing; write gs://bucket/prefix"),
        ("s3://", "the bucket's name is missing"),
        ("file://elsewhere/a", "file URIs name this machine only"),
    ],
)
def test_wrong_uris(uri: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        storage.normalize(uri)


def test_unknown_scheme_is_refused_by_every_entrance() -> None:
    for action in (storage.read, storage.exists, storage.open_binary, storage.list_entries):
        with pytest.raises(UsageError, match="ftp://h/x: the scheme ftp:// is not known"):
            action("ftp://h/x")


def test_join_and_its_opposites() -> None:
    assert join("gs://b/", "a", "c") == "gs://b/a/c"
    assert join("/x", "y z") == "/x/y z"
    assert storage.name_of("gs://b/a/c/") == "c"
    assert storage.split_bucket("s3://b/a/c#d") == ("b", "a/c#d")
    assert storage.split_bucket("gs://b") == ("b", "")


def test_anonymous_is_off_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in [("", False), ("0", False), ("1", True)]:
        monkeypatch.setenv("LOOKALIKE_ANONYMOUS", value)
        assert remote.anonymous() is expected


@pytest.mark.parametrize(
    ("scheme", "package", "module", "extra"),
    [("gs", "google.cloud.storage", "serving.gcs", "gcs"), ("s3", "boto3", "serving.s3", "s3")],
)
def test_missing_package_names_the_extra(
    scheme: str, package: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    storage._client.cache_clear()
    with pytest.raises(MissingExtra, match=rf'{scheme}:// URIs needs packages .*"lookalike\[{extra}\]"'):
        storage.read(f"{scheme}://b/k")


def test_entries_are_plain_values() -> None:
    assert Entry("a", 1, "x", 2) == Entry("a", 1, "x", 2)
    assert len({Entry("a", 1, "x", 2), Entry("a", 1, "x", 2)}) == 1
