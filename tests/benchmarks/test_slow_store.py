import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import object_store, slow_store
from benchmarks.object_store import Folder, Tally, serving
from benchmarks.slow_store import Round, Run
from serving import storage
from serving.errors import Changed, NotFound


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one two.jpg").write_bytes(b"one")
    (tmp_path / "two.jpg").write_bytes(b"second")
    os.link(tmp_path / "two.jpg", tmp_path / "three.jpg")
    return tmp_path


def test_the_server_is_a_store(folder, monkeypatch):
    with serving(folder, 0) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        storage._client.cache_clear()
        entries = {entry.uri: entry for entry in storage.list_entries("gs://photos")}
        assert list(entries) == ["gs://photos/a/one two.jpg", "gs://photos/three.jpg", "gs://photos/two.jpg"]
        for entry in entries.values():
            path = folder / entry.uri.removeprefix("gs://photos/")
            assert storage.read(entry.uri, entry.etag) == path.read_bytes()
            assert (entry.size, entry.updated // 1000) == (path.stat().st_size, path.stat().st_mtime_ns // 1_000_000)
        one = next(iter(entries.values()))
        assert list(storage.list_entries(one.uri)) == [one]
        assert list(storage.list_entries("gs://photos/a")) == [one]
        with pytest.raises(Changed):
            storage.read(one.uri, "7")
        with pytest.raises(NotFound):
            storage.read("gs://photos/none.jpg")
        told = server.tally()
        assert (told.downloads, told.others) == (5, 4)
        assert told.cpu_seconds > 0
        assert server.tally().downloads == 0
    storage._client.cache_clear()


def test_pages_are_in_the_order_of_keys(folder, monkeypatch):
    monkeypatch.setattr(object_store, "_PAGE", 2)
    store = Folder(folder)
    keys, token = [], ""
    while True:
        body = store.answer(f"/storage/v1/b/photos/o?pageToken={token}&fields=x").partition(b"\r\n\r\n")[2]
        page = json.loads(body)
        keys += [item["name"] for item in page["items"]]
        if "nextPageToken" not in page:
            break
        token = page["nextPageToken"]
    assert keys == ["a/one two.jpg", "three.jpg", "two.jpg"]


def test_every_answer_waits_and_none_for_another(folder, monkeypatch):
    with serving(folder, 200) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        storage._client.cache_clear()
        client = storage.of("gs://photos")
        started = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda _: client.read("gs://photos/two.jpg"), range(8))) == [b"second"] * 8
        assert 0.2 <= time.monotonic() - started < 1.6
        assert server.tally().peak == 8
    storage._client.cache_clear()


def test_the_server_ends_with_who_started_it(folder):
    command = [sys.executable, "-m", "benchmarks.object_store", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert int(process.stdout.readline()) > 0
        process.stdin.close()
        assert process.wait(10) == 0


def test_a_small_comparison(artifact, tmp_path, monkeypatch):
    monkeypatch.delenv("LOOKALIKE_PHOTOS", raising=False)
    [found] = slow_store.compare(tmp_path, 12, 20, 1, artifact)
    assert found.tally.downloads == 12
    assert found.store.read_ms >= 20
    assert found.disk.read_ms < found.store.read_ms
    assert found.ratio > 0


def test_rows_tell_shares_and_figures_by_image():
    found = [
        Round(Run(100.0, 7.0, 0.5), Run(80.0, 8.0, 60.0), Tally(downloads=50, others=2, peak=32, cpu_seconds=0.01))
    ]
    assert slow_store.rows(found, 50) == [
        (1, "disk", 100.0, 1, 7.0, 0.5, "", "", ""),
        (1, "store", 80.0, 0.8, 8.0, 60.0, 1.0, 32, 0.2),
    ]
    assert len(slow_store.rows(found, 50)[0]) == len(slow_store.HEADERS)


def test_the_table_is_printed(capsys, monkeypatch, artifact):
    monkeypatch.setattr(slow_store, "_export", lambda _work: (artifact, "random"))
    one = Round(Run(100.0, 7.0, 0.5), Run(80.0, 8.0, 60.0), Tally())
    monkeypatch.setattr(slow_store, "compare", lambda *_: [one])
    monkeypatch.setattr(sys, "argv", ["slow_store", "--images", "5", "--latency-ms", "20"])
    slow_store.main()
    said = capsys.readouterr().out
    assert "20 ms an answer" in said
    assert said.rstrip().endswith("median ratio 0.800")
