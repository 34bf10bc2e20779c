"""S3, and what speaks its protocol, as a `Storage`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from serving import remote
from serving.errors import AccessDenied, MissingExtra, NotFound, StorageError
from serving.storage import Entry, split_bucket

try:
    import boto3
    import urllib3
    from botocore import UNSIGNED
    from botocore import exceptions as failures
    from botocore.config import Config
except ImportError as error:
    raise MissingExtra("reading s3:// URIs", "s3") from error

_SIGN_IN = "set AWS_PROFILE or AWS_ACCESS_KEY_ID, or LOOKALIKE_ANONYMOUS=1 for a public bucket"
# S3 answers these with 400, though they are about credentials.
_STALE_CREDENTIALS = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
_NO_CREDENTIALS = (
    failures.CredentialRetrievalError,
    failures.NoAuthTokenError,
    failures.NoCredentialsError,
    failures.PartialCredentialsError,
    failures.SSOError,
    failures.TokenRetrievalError,
)
_TORN = (
    failures.FlexibleChecksumError,
    failures.IncompleteReadError,
    failures.ReadTimeoutError,
    failures.ResponseStreamingError,
    urllib3.exceptions.HTTPError,  # TLS that breaks amid a body comes through as it is
    OSError,
)


class S3Storage(remote.RemoteStorage):
    """Objects of S3; the etag is S3's own, without quotes. Threads share one client and its connections."""

    def __init__(self) -> None:
        config = Config(
            retries={"mode": "standard", "total_max_attempts": remote.ATTEMPTS},
            connect_timeout=remote.CONNECT_SECONDS,
            read_timeout=remote.READ_SECONDS,
            max_pool_connections=remote.CONNECTIONS,
            signature_version=UNSIGNED if remote.anonymous() else None,
        )
        with _sentences("s3://"):
            self._client = boto3.session.Session().client("s3", config=config)

    def stat(self, uri: str) -> Entry:
        """Describe one object."""
        return _entry(uri, self._head(uri), "ContentLength")

    def delete(self, uri: str) -> None:
        """Remove an object; a missing one is no error."""
        with _sentences(uri):
            self._client.delete_object(**_name(uri))

    def _below(self, uri: str) -> Iterator[Entry]:
        bucket = split_bucket(uri)[0]
        with _sentences(uri, of_bucket=True):
            pages = self._client.get_paginator("list_objects_v2")
            # The server's order is that of UTF-8 bytes, which is the order of code points.
            for page in pages.paginate(Bucket=bucket, Prefix=remote.prefix_of(uri)):
                for item in page.get("Contents", ()):
                    if not item["Key"].endswith("/"):  # consoles make such empty objects to show a folder
                        yield _entry(f"s3://{bucket}/{item['Key']}", item, "Size")

    def _get(self, uri: str, start: int, length: int | None, etag: str | None) -> tuple[bytes, str]:
        request = _name(uri)
        if start or length is not None:
            request["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"
        if etag is not None:
            request["IfMatch"] = f'"{etag}"'
        with _sentences(uri):
            return self._download(request)

    def _download(self, request: dict[str, Any]) -> tuple[bytes, str]:
        # The client's own retries end where the body begins.
        for _ in range(remote.ATTEMPTS - 1):
            answer = self._client.get_object(**request)
            try:
                return answer["Body"].read(), _etag(answer)
            except _TORN:
                continue
        answer = self._client.get_object(**request)
        return answer["Body"].read(), _etag(answer)

    def _put(self, uri: str, data: bytes, token: str | None, writer: str) -> bool:
        condition = {"IfNoneMatch": "*"} if token is None else {"IfMatch": f'"{token}"'}
        request = _name(uri) | condition | {"Body": data, "Metadata": {"writer": writer}}
        with _sentences(uri, of_bucket=token is None):
            for attempt in range(remote.ATTEMPTS):
                done = self._try_put(request)
                if done is not None:
                    return done
                time.sleep(0.1 * 2**attempt)
        raise StorageError(f"{uri}: others keep writing it at the same time; run again later")

    def _try_put(self, request: dict[str, Any]) -> bool | None:
        try:
            self._client.put_object(**request)
        except failures.ClientError as error:
            status, code = _status(error)
            if status == 409:  # another conditional write was under way, and nobody knows yet how it ended
                return None
            if status == 412 or code == "NoSuchKey":
                return False
            raise
        return True

    def _writer(self, uri: str) -> str | None:
        try:
            metadata: dict[str, str] = self._head(uri)["Metadata"]
        except NotFound:
            return None
        return metadata.get("writer")

    def _head(self, uri: str) -> dict[str, Any]:
        with _sentences(uri):
            answer: dict[str, Any] = self._client.head_object(**_name(uri))
            return answer


def _name(uri: str) -> dict[str, Any]:
    bucket, key = split_bucket(uri)
    return {"Bucket": bucket, "Key": key}


def _entry(uri: str, item: dict[str, Any], size: str) -> Entry:
    return Entry(uri, item[size], _etag(item), remote.microseconds(item["LastModified"]))


def _etag(item: dict[str, Any]) -> str:
    return str(item["ETag"]).strip('"')


@contextmanager
def _sentences(uri: str, of_bucket: bool = False) -> Iterator[None]:
    """Turn the client's errors into ours, naming the URI; `of_bucket`: what a 404 misses is the bucket."""
    try:
        yield
    except failures.ClientError as error:
        raise _explained(uri, error, of_bucket) from error
    except (failures.ConnectTimeoutError, failures.ReadTimeoutError) as error:
        raise remote.late(uri, error) from error
    except (failures.ConnectionError, failures.HTTPClientError, failures.IncompleteReadError) as error:
        raise remote.unreachable(uri, error) from error
    except _NO_CREDENTIALS as error:
        raise AccessDenied(f"{uri}: no usable credentials were found ({error}); {_SIGN_IN}") from error
    except failures.BotoCoreError as error:
        raise StorageError(f"{uri}: {' '.join(str(error).split())}") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise remote.unreachable(uri, error) from error


def _explained(uri: str, error: Any, of_bucket: bool) -> StorageError:
    status, code = _status(error)
    if status == 404 and (of_bucket or code == "NoSuchBucket"):
        return remote.no_bucket(uri)
    detail = error.response.get("Error", {}).get("Message", "")
    return remote.refused(uri, 403 if code in _STALE_CREDENTIALS else status, detail or code, _SIGN_IN)


def _status(error: Any) -> tuple[int, str]:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(error.response.get("Error", {}).get("Code", ""))
