"""Object stores on loopback: a fake of Google's JSON API, and moto for S3.

`gcs_server` and `s3_server` give the URI of a fresh bucket, with the environment set for this process and its children;
`gcs_fake` and `s3_fake` are the servers behind them, which count requests and can be told to misbehave.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_gcs import FakeGcs, GcsServer
from fake_s3 import FakeS3
from real import artifact, blind, drawn  # noqa: F401 (fixtures)
from wire import running

from serving import storage
from serving.threads import one_thread


@pytest.fixture(scope="session")
def _gcs() -> Iterator[FakeGcs]:
    pytest.importorskip("google.cloud.storage", reason="google-cloud-storage is not installed")
    fake = FakeGcs()
    with running(GcsServer(fake)) as fake.url:
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


@pytest.fixture(params=["local", "gcs", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give an empty folder, or a bucket of one of the object stores."""
    if request.param != "local":
        return str(request.getfixturevalue(f"{request.param}_server"))
    (tmp_path / "anywhere").mkdir()
    return str(tmp_path / "anywhere")


@pytest.fixture(scope="module")
def one_faiss_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take longer than one."""
    with one_thread():
        yield
