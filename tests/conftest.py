"""Object stores on loopback: a fake of Google's JSON API, and moto for S3.

`gcs_server` and `s3_server` give the URI of a fresh bucket, with the environment set for this process and its children;
`gcs_fake` and `s3_fake` are the servers behind them, which count requests and can be told to misbehave.
"""

import base64
import itertools
import json
import logging
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from real import artifact, drawn  # noqa: F401 (fixtures)

from serving import storage
from serving.threads import one_thread

_numbers = itertools.count(1)


@dataclass
class Wire:
    """What a server has seen, and what it is to do wrong with its next requests, one fault each.

    A number is answered as a status; "lost" does the work and hangs up unanswered; "cut" hangs up amid the body;
    "stall" says nothing until the test is over.
    """

    requests: list[str] = field(default_factory=list)  # "GET /path"
    authorizations: list[str | None] = field(default_factory=list)
    connections: int = 0
    pause: float = 0.0  # before each answer
    faults: deque[int | str] = field(default_factory=deque)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def seen(self, request: str, authorization: str | None) -> int | str | None:
        with self.lock:
            self.requests.append(request)
            self.authorizations.append(authorization)
            fault = self.faults.popleft() if self.faults else None
        time.sleep(self.pause)
        if fault == "stall":
            self.over.wait(10)
        return fault

    def reset(self) -> None:
        self.over.clear()
        self.faults.clear()
        self.requests.clear()
        self.authorizations.clear()
        self.connections, self.pause = 0, 0.0


@contextmanager
def running(server: Any) -> Iterator[str]:
    """Serve from a thread; gives the address."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- Google Cloud Storage -------------------------------------------------------------------------------------------

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Stored:
    data: bytes
    generation: int
    updated: str
    metadata: dict[str, str]


@dataclass
class FakeGcs(Wire):
    """Buckets in memory with generations, preconditions, paged lists, ranges and both kinds of upload."""

    url: str = ""
    page_size: int = 1000
    buckets: dict[str, dict[str, Stored]] = field(default_factory=dict)
    uploads: dict[str, tuple[dict[str, Any], dict[str, str]]] = field(default_factory=dict)

    def new_bucket(self) -> str:
        name = f"bucket-{next(_numbers)}"
        self.buckets[name] = {}
        return f"gs://{name}"

    def put(self, bucket: str, key: str, data: bytes, metadata: dict[str, str] | None = None) -> Stored:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        stored = Stored(data, 1_700_000_000_000_000 + next(_numbers), now, metadata or {})
        self.buckets[bucket][key] = stored
        return stored

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> Answer:
        url = urlsplit(target)
        query = dict(parse_qsl(url.query))
        found = re.fullmatch(r"(/download|/upload|)/storage/v1/b/([^/]+)/o(?:/(.*))?", url.path)
        if found is None:
            return _error(400, f"cannot parse {target}")
        kind, bucket, key = found[1], unquote(found[2]), unquote(found[3] or "")
        if bucket not in self.buckets:
            return _error(404, "The specified bucket does not exist.")
        if kind == "/upload":
            return self._upload(bucket, query, headers, body)
        if not key:
            return self._list(bucket, query)
        stored = self.buckets[bucket].get(key)
        if stored is None:
            return _error(404, f"No such object: {bucket}/{key}")
        if not _holds(query, stored):
            return _error(412, "At least one of the pre-conditions you specified did not hold.")
        if method == "DELETE":
            del self.buckets[bucket][key]
            return 204, {}, b""
        return _media(stored, headers) if query.get("alt") == "media" else _json(_resource(bucket, key, stored))

    def _list(self, bucket: str, query: dict[str, str]) -> Answer:
        prefix, after = query.get("prefix", ""), query.get("pageToken", "")
        keys = sorted((k for k in self.buckets[bucket] if k.startswith(prefix)), key=lambda k: k.encode())
        rest = [key for key in keys if key.encode() > after.encode()]
        page = rest[: self.page_size]
        answer: dict[str, Any] = {"items": [_resource(bucket, key, self.buckets[bucket][key]) for key in page]}
        return _json(answer | ({"nextPageToken": page[-1]} if len(rest) > len(page) else {}))

    def _upload(self, bucket: str, query: dict[str, str], headers: Any, body: bytes) -> Answer:
        if "upload_id" in query:
            query, resource = self.uploads[query["upload_id"]]
        elif query["uploadType"] == "resumable":
            resource = json.loads(body)
            number = str(next(_numbers))
            self.uploads[number] = (query, resource)
            return 200, {"Location": f"{self.url}/upload/storage/v1/b/{bucket}/o?upload_id={number}"}, b""
        else:
            boundary = re.search(r'boundary="?([^";]+)', headers["Content-Type"])
            _, first, second, _ = body.split(b"--" + boundary[1].encode())  # type: ignore[index]
            resource = json.loads(first.partition(b"\r\n\r\n")[2])
            body = second.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        if not _holds(query, self.buckets[bucket].get(resource["name"])):
            return _error(412, "At least one of the pre-conditions you specified did not hold.")
        stored = self.put(bucket, resource["name"], body, resource.get("metadata"))
        return _json(_resource(bucket, resource["name"], stored))


def _holds(query: dict[str, str], stored: Stored | None) -> bool:
    wanted = query.get("ifGenerationMatch")
    return wanted is None or int(wanted) == (stored.generation if stored else 0)


def _resource(bucket: str, key: str, stored: Stored) -> dict[str, Any]:
    return {
        "bucket": bucket,
        "name": key,
        "size": str(len(stored.data)),
        "generation": str(stored.generation),
        "updated": stored.updated,
        "metadata": stored.metadata,
        "crc32c": _crc32c(stored.data),
    }


def _crc32c(data: bytes) -> str:
    import google_crc32c

    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def _media(stored: Stored, headers: Any) -> Answer:
    about = {"X-Goog-Generation": str(stored.generation)}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", ""))
    if asked is None:
        return 200, about | {"X-Goog-Hash": f"crc32c={_crc32c(stored.data)}"}, stored.data
    start, size = int(asked[1]), len(stored.data)
    if start >= size:
        return _error(416, "The requested range cannot be satisfied.")
    end = min(int(asked[2] or size), size - 1)
    return 206, about | {"Content-Range": f"bytes {start}-{end}/{size}"}, stored.data[start : end + 1]


def _json(value: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status: int, message: str) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps({"error": {"message": message}}).encode()


class _GcsHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeGcs

    def setup(self) -> None:
        super().setup()
        with self.fake.lock:
            self.fake.connections += 1

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.fake.seen(f"{self.command} {self.path}", self.headers.get("Authorization"))
        if isinstance(fault, int):
            plain = self.path.startswith("/download")
            status, headers, data = (fault, {}, b"a fault") if plain else _error(fault, "a fault")
        else:
            with self.fake.lock:
                status, headers, data = self.fake.answer(self.command, self.path, self.headers, body)
        self.close_connection = isinstance(fault, str)
        if fault in ("lost", "stall"):
            return
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

    do_GET = do_POST = do_PUT = do_DELETE = serve  # noqa: N815 (the names http.server looks for)

    def log_message(self, *_args: object) -> None: ...


@pytest.fixture(scope="session")
def _gcs() -> Iterator[FakeGcs]:
    pytest.importorskip("google.cloud.storage", reason="google-cloud-storage is not installed")
    fake = FakeGcs()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_GcsHandler,), {"fake": fake}))
    with running(server) as fake.url:
        yield fake


@pytest.fixture
def gcs_fake(_gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcs]:
    _gcs.reset()
    _gcs.page_size = 1000
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", _gcs.url)
    storage._client.cache_clear()
    yield _gcs
    _gcs.over.set()
    storage._client.cache_clear()


@pytest.fixture
def gcs_server(gcs_fake: FakeGcs) -> str:
    return gcs_fake.new_bucket()


# --- S3 -------------------------------------------------------------------------------------------------------------


@dataclass
class FakeS3(Wire):
    """A front before moto: it looks at requests one at a time, as moto's check and write are two steps."""

    url: str = ""
    app: Callable[..., Any] | None = None
    client: Any = None

    def new_bucket(self) -> str:
        name = f"bucket-{next(_numbers)}"
        self.client.create_bucket(Bucket=name)
        self.reset()
        return f"s3://{name}"

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        fault = self.seen(request, environ.get("HTTP_AUTHORIZATION"))
        if isinstance(fault, int):
            start_response(f"{fault} Fault", [("Content-Type", "application/xml")])
            code = b"SlowDown" if fault in (429, 503) else b"Fault"
            return [b"<Error><Code>%s</Code><Message>a fault</Message></Error>" % code]
        with self.lock:
            answer = self.app(environ, start_response)  # type: ignore[misc]
            data = b"".join(answer)
            answer.close()
        if fault in ("lost", "stall"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        return [data[: len(data) // 2] if fault == "cut" else data]


@pytest.fixture(scope="session")
def _s3() -> Iterator[FakeS3]:
    reason = "boto3 or moto[server] is not installed"
    boto3 = pytest.importorskip("boto3", reason=reason)
    moto = pytest.importorskip("moto.server", reason=reason)
    serving = pytest.importorskip("werkzeug.serving", reason=reason)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    fake = FakeS3(app=moto.DomainDispatcherApplication(moto.create_backend_app))
    server = serving.make_server("127.0.0.1", 0, fake, threaded=True, request_handler=moto.MotoRequestHandler)
    with running(server) as fake.url:
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        fake.client = boto3.session.Session(**keys).client("s3", endpoint_url=fake.url)
        yield fake


@pytest.fixture
def s3_fake(_s3: FakeS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    _s3.reset()
    for name, value in {
        "AWS_ENDPOINT_URL": _s3.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    storage._client.cache_clear()
    yield _s3
    _s3.over.set()
    storage._client.cache_clear()


@pytest.fixture
def s3_server(s3_fake: FakeS3) -> str:
    return s3_fake.new_bucket()


@pytest.fixture(scope="module")
def one_faiss_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take longer than one."""
    with one_thread():
        yield
