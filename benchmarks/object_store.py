"""An object store on loopback that keeps a folder in memory and answers late, as one far away does.

    python -m benchmarks.object_store FOLDER --latency-ms 50

It speaks as much of Google's JSON API as reading images takes, from a process of its own, with little to do for each
request: on a machine of few cores its time is taken from those whom it serves. It prints its port and ends with its
standard input.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import google_crc32c

BUCKET = "photos"
_PAGE = 1000
_MEDIA = f"/download/storage/v1/b/{BUCKET}/o/"
_ABOUT = f"/storage/v1/b/{BUCKET}/o/"
_LIST = _ABOUT.rstrip("/")
_TALLY = "/tally"


@dataclass(slots=True)
class Tally:
    """What a server did since it was last asked."""

    downloads: int = 0
    others: int = 0
    peak: int = 0
    """Requests under way at once."""
    cpu_seconds: float = 0.0


class Folder:
    """The files below a folder as objects; those that are one file under many names are kept once."""

    def __init__(self, folder: Path) -> None:
        found: dict[int, tuple[bytes, dict[str, str]]] = {}
        self._objects: dict[str, tuple[bytes, dict[str, str]]] = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            number = path.stat().st_ino
            if number not in found:
                found[number] = _object(path)
            self._objects[path.relative_to(folder).as_posix()] = found[number]
        self._keys = sorted(self._objects)

    def answer(self, target: str) -> bytes:
        """Answer a GET of `target` with all that goes over the wire."""
        path, _, query = target.partition("?")
        if path.startswith(_MEDIA):
            media, about = self._objects.get(unquote(path[len(_MEDIA) :]), (_status("404 Not Found"), {}))
            wanted = dict(parse_qsl(query)).get("ifGenerationMatch")
            return media if wanted in (None, about.get("generation")) else _status("412 Precondition Failed")
        if path == _LIST:
            return _json(self._page(**dict(parse_qsl(query))))
        key = unquote(path.removeprefix(_ABOUT))
        return _json(self._about(key)) if key in self._objects else _status("404 Not Found")

    def _page(self, prefix: str = "", pageToken: str = "", **_: str) -> dict[str, Any]:  # noqa: N803 (Google's name)
        keys = [key for key in self._keys if key.startswith(prefix) and key > pageToken]
        page = {"items": [self._about(key) for key in keys[:_PAGE]]}
        return page | ({"nextPageToken": keys[_PAGE - 1]} if len(keys) > _PAGE else {})

    def _about(self, key: str) -> dict[str, str]:
        return {"bucket": BUCKET, "name": key, **self._objects[key][1]}


def _object(path: Path) -> tuple[bytes, dict[str, str]]:
    data, moment = path.read_bytes(), datetime.fromtimestamp(path.stat().st_mtime, UTC)
    check = base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()
    about = {"generation": f"{moment.timestamp() * 1e6:.0f}", "updated": f"{moment:%Y-%m-%dT%H:%M:%S.%fZ}"}
    headers = {"X-Goog-Generation": about["generation"], "X-Goog-Hash": f"crc32c={check}"}
    return _response("200 OK", data, **headers), about | {"size": str(len(data))}


def _response(status: str, body: bytes, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *(f"{name}: {headers[name]}" for name in headers)]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _status(status: str) -> bytes:
    return _response(status, b"")


def _json(value: Any) -> bytes:
    return _response("200 OK", json.dumps(value).encode(), **{"Content-Type": "application/json"})


class _Server:
    """Answers after `latency` seconds, and counts."""

    def __init__(self, folder: Folder, latency: float) -> None:
        self.tally = Tally()
        self._folder = folder
        self._latency = latency
        self._open = 0
        self._cpu = time.process_time()

    def take(self, target: str, transport: asyncio.Transport) -> None:
        """Begin an answer."""
        if target == _TALLY:
            transport.write(_json(asdict(self._told())))
            return
        if target.startswith(_MEDIA):
            self.tally.downloads += 1
        else:
            self.tally.others += 1
        self._open += 1
        self.tally.peak = max(self.tally.peak, self._open)
        asyncio.get_running_loop().call_later(self._latency, self._answer, target, transport)

    def _answer(self, target: str, transport: asyncio.Transport) -> None:
        self._open -= 1
        transport.write(self._folder.answer(target))

    def _told(self) -> Tally:
        told, now = self.tally, time.process_time()
        told.cpu_seconds, self._cpu = now - self._cpu, now
        self.tally = Tally()
        return told


class _Connection(asyncio.Protocol):
    """One client's connection; it sends the next request when it has the answer to the last."""

    _transport: asyncio.Transport

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._received.endswith(b"\r\n\r\n"):
            target, self._received = self._received.split(b" ", 2)[1].decode(), b""
            self._server.take(target, self._transport)


async def _serve(folder: Folder, latency: float) -> None:
    server = _Server(folder, latency)
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: _Connection(server), "127.0.0.1", 0, backlog=128)
    print(listening.sockets[0].getsockname()[1], flush=True)
    over = asyncio.Event()

    def wait() -> None:
        sys.stdin.buffer.read()  # whoever started this holds the other end and never writes
        loop.call_soon_threadsafe(over.set)

    threading.Thread(target=wait, daemon=True).start()
    await over.wait()


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A server that runs."""

    url: str

    def tally(self) -> Tally:
        """Tell what it did since it was last asked."""
        with urllib.request.urlopen(self.url + _TALLY) as answer:
            return Tally(**json.load(answer))


@contextlib.contextmanager
def serving(folder: Path, latency_ms: float) -> Iterator[ObjectStore]:
    """Serve a folder as the bucket `BUCKET` from another process."""
    command = [sys.executable, "-m", __name__, str(folder), "--latency-ms", str(latency_ms)]
    home = Path(__file__).parents[1]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=home, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield ObjectStore(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.stdin.close()


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what is below it is served")
    parser.add_argument("--latency-ms", type=float, default=50, help="how long each answer waits")
    options = parser.parse_args()
    asyncio.run(_serve(Folder(options.folder), options.latency_ms / 1000))


if __name__ == "__main__":
    main()
