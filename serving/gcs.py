"""Google Cloud Storage as a `Storage`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from serving import remote
from serving.errors import AccessDenied, MissingExtra, NotFound, StorageError
from serving.storage import Entry, split_bucket

# The packages below read these when they are imported. One probe for a metadata server is enough: on Google's own
# machines the firmware's name decides when the probe is slow, and elsewhere further ones only delay the error.
os.environ.setdefault("GCE_METADATA_DETECT_RETRIES", "1")
os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")  # a request per bucket for telemetry

try:
    import google.auth
    import requests
    import urllib3
    from google.api_core.exceptions import GoogleAPICallError, RetryError
    from google.auth.credentials import AnonymousCredentials, Credentials
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
    from google.cloud.storage import Blob, Client
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
    from google.cloud.storage.retry import DEFAULT_RETRY

    from serving.gcs_media import FIRST_PAUSE, Connections, Media
except ImportError as error:
    raise MissingExtra("reading gs:// URIs", "gcs") from error

_SIGN_IN = "run `gcloud auth application-default login`, or set LOOKALIKE_ANONYMOUS=1 for a public bucket"
_FIELDS = "items(name,size,generation,updated),nextPageToken"


class GoogleStorage(remote.RemoteStorage):
    """Objects of Google Cloud Storage; the etag is the generation. Threads share one client and its connections."""

    def __init__(self) -> None:
        self._client = Client(project=None, credentials=_credentials())
        connections = Connections()
        session = self._client._http
        for scheme in ("https://", "http://"):
            session.mount(scheme, connections)
        # The environment is asked for proxies and certificates once: asked by each request, it took 0.2 of 1 ms.
        found = session.merge_environment_settings(self._client.api_endpoint, {}, None, None, None)
        session.proxies, session.verify, session.trust_env = found["proxies"], found["verify"], False
        self._limits = {
            "timeout": (remote.CONNECT_SECONDS, remote.READ_SECONDS),
            "retry": DEFAULT_RETRY.with_timeout(remote.GIVE_UP_SECONDS).with_delay(initial=FIRST_PAUSE),
        }
        self._media = Media(self._client, connections)

    def stat(self, uri: str) -> Entry:
        """Describe one object."""
        return _entry(self._find(uri))

    def delete(self, uri: str) -> None:
        """Remove an object; a missing one is no error."""
        try:
            with _sentences(uri):
                self._blob(uri).delete(**self._limits)
        except NotFound:
            pass

    def _below(self, uri: str) -> Iterator[Entry]:
        bucket = split_bucket(uri)[0]
        with _sentences(uri, of_bucket=True):
            # The server's order is that of UTF-8 bytes, which is the order of code points.
            for blob in self._client.list_blobs(bucket, prefix=remote.prefix_of(uri), fields=_FIELDS, **self._limits):
                if not blob.name.endswith("/"):  # consoles make such empty objects to show a folder
                    yield _entry(blob)

    def _get(self, uri: str, start: int, length: int | None, etag: str | None) -> tuple[bytes, str]:
        with _sentences(uri):
            generation = None if etag is None else _generation(etag)
            return self._media.get(self._blob(uri).path, start, length, generation)

    def _put(self, uri: str, data: bytes, token: str | None, writer: str) -> bool:
        with _sentences(uri, of_bucket=True):
            blob = self._blob(uri)
            blob.metadata = {"writer": writer}
            generation = 0 if token is None else _generation(token)  # 0: there is none
            try:
                blob.upload_from_string(
                    data, "application/octet-stream", if_generation_match=generation, **self._limits
                )
            except GoogleAPICallError as error:
                if error.code != 412:
                    raise
                return False
            return True

    def _writer(self, uri: str) -> str | None:
        try:
            metadata: dict[str, str] = self._find(uri).metadata or {}
        except NotFound:
            return None
        return metadata.get("writer")

    def _find(self, uri: str) -> Blob:
        with _sentences(uri):
            blob = self._blob(uri)
            blob.reload(**self._limits)
            return blob

    def _blob(self, uri: str) -> Blob:
        bucket, key = split_bucket(uri)
        return self._client.bucket(bucket).blob(key)


def _credentials() -> Credentials:
    if remote.anonymous() or os.environ.get("STORAGE_EMULATOR_HOST"):
        return AnonymousCredentials()
    try:
        return google.auth.default()[0]
    except DefaultCredentialsError as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise AccessDenied(f"gs:// URIs need credentials ({reason}); {_SIGN_IN}") from error


def _generation(etag: str) -> int:
    # Generations are microseconds since 1970: no object has the first, so an etag of another store counts as stale.
    return int(etag) if etag.isdecimal() else 1


def _entry(blob: Blob) -> Entry:
    uri = f"gs://{blob.bucket.name}/{blob.name}"
    return Entry(uri, blob.size, str(blob.generation), remote.microseconds(blob.updated))


@contextmanager
def _sentences(uri: str, of_bucket: bool = False) -> Iterator[None]:
    """Turn the client's errors into ours, naming the URI; `of_bucket`: what a 404 misses is the bucket."""
    try:
        yield
    except RetryError as error:
        raise _explained(uri, error.cause or error, of_bucket) from error
    except _CLIENT_ERRORS as error:
        raise _explained(uri, error, of_bucket) from error


_CLIENT_ERRORS = (
    GoogleAPICallError,
    GoogleAuthError,
    InvalidResponse,
    DataCorruption,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    OSError,
    ValueError,  # a name that no bucket or object can have
)


def _explained(uri: str, error: BaseException, of_bucket: bool) -> Exception:
    if isinstance(error, TransportError) and error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    if isinstance(error, GoogleAPICallError | InvalidResponse):
        status, detail = _status(error)
        if status == 404 and of_bucket:
            return remote.no_bucket(uri)
        return remote.refused(uri, status, detail, _SIGN_IN)
    if isinstance(error, urllib3.exceptions.NewConnectionError):  # to urllib3 it is a timeout too
        return remote.unreachable(uri, error)
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        return remote.late(uri, error)
    if isinstance(error, requests.RequestException | urllib3.exceptions.HTTPError | OSError | TransportError):
        return remote.unreachable(uri, error)
    if isinstance(error, GoogleAuthError):
        return remote.refused(uri, 401, str(error), _SIGN_IN)
    return StorageError(f"{uri}: {error}")


def _status(error: GoogleAPICallError | InvalidResponse) -> tuple[int, str]:
    response = error.response
    try:
        detail = str(response.json()["error"]["message"])
    except (AttributeError, LookupError, TypeError, ValueError):
        detail = str(getattr(response, "text", None) or getattr(error, "message", ""))
    return int(getattr(error, "code", None) or response.status_code), detail
