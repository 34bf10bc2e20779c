"""The arithmetic of the building benchmark, what it watches, and a whole small run of its merges."""

import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import build, builders, merges, watching
from benchmarks.builders import Built
from benchmarks.collection import Collection
from benchmarks.peers.environments import PeerFailed
from benchmarks.rounds import Measured
from benchmarks.watching import Peak

LOG = """\
2026-11-20 [INFO]: \t\t-> Training the index with 5000 vectors of dim 64 11/20/2026, 10:00:00
2026-11-20 [INFO]: \t\t>>> Finished "-> Extract training vectors" in 1.5000 secs
2026-11-20 [INFO]: \t\t>>> Finished "-> Training the index with 5000 vectors of dim 64" in 20.0000 secs
2026-11-20 [INFO]: \t>>> Finished "Computing best hyperparameters for index /x/index" in 3.0000 secs
2026-11-20 [INFO]: \t>>> Finished "Compute fast metrics" in 4.0000 secs
2026-11-20 [INFO]: \t>>> Finished "Saving the index on local disk" in 0.5000 secs
2026-11-20 [INFO]: \t\t>>> Finished "-> Adding the vectors to the index" in 10.0000 secs
2026-11-20 [INFO]: >>> Finished "Launching the whole pipeline" in 32.0000 secs
"""


def built(**more):
    found = Measured(
        opened={"resident_anonymous_bytes": 17_000},
        tuned={"setting": {"nprobe": 3}, "reached": True},
        recall=0.71234,
        p50=[30.0, 50.0, 40.0],
    )
    stages = {"train": 5.0, "encode": 2.0, "measure": 10.0}
    whole = {"peak": Peak(123.4, 20.0), "stages": stages, "shape": "flat", "bytes_a_vector": 168, "found": found}
    return Built("ours", **(whole | more))


def test_stages_are_split_by_what_they_were_for():
    events = [("sample", 1, 3), ("train", 3, 7), ("encode", 8, 10), ("merge", 10, 11), ("search exactly", 11, 12)]
    assert builders.split(events, 20) == {"train": 6, "encode": 2, "merge": 1, "measure": 9}


def test_a_shape_that_missed_the_target_is_measured_until_the_next_is_begun():
    events = [("train", 0, 4), ("search exactly", 5, 6), ("train", 9, 10), ("search exactly", 10, 11)]
    assert builders.split(events, 12) == {"train": 5, "measure": 6}


def test_a_clock_remembers_stages():
    clock = builders.Clock()
    clock.start("train", 1, "quantizer")
    clock.update(1, 0)
    clock.finish()
    [(stage, began, ended)] = clock.events
    assert (stage, 0 <= ended - began < 1) == ("train", True)


def test_a_log_of_the_peer_is_split_and_nothing_counted_twice():
    assert builders.split_log(LOG.splitlines()) == {"train": 21.5, "encode": 2.5, "save": 0.5, "measure": 7}


@pytest.mark.parametrize(
    ("bytes_a_vector", "count", "width", "key", "bytes_of_it"),
    [
        # The peer's rules chose these themselves for 128 and 32 bytes of codes.
        (136, 200_000, 1280, "OPQ128_896,IVF2048_HNSW32,PQ128x8", 136),
        (40, 10_000, 256, "OPQ32_224,IVF512,PQ32x8", 40),
        (168, 1_000_000, 1280, "OPQ160_1120,IVF16384_HNSW32,PQ160x8", 168),
        (168, 10_000_000, 1280, "OPQ160_1120,IVF65536_HNSW32,PQ160x8", 168),
        (88, 10_000, 64, "OPQ63_126,IVF512,PQ63x8", 71),  # it takes no more codes than there are dimensions
    ],
)
def test_a_key_of_equal_bytes(bytes_a_vector, count, width, key, bytes_of_it):
    assert builders.key_of(bytes_a_vector, count, width) == key
    assert builders.bytes_of(key) == bytes_of_it


@pytest.mark.parametrize(("key", "size"), [("IVF64,PQ15x4", 16), ("OPQ8_16,IVF64,PQ8", 16), ("HNSW32", None)])
def test_bytes_of_other_keys(key, size):
    assert builders.bytes_of(key) == size


def test_rows_of_stages_count_vectors_on_each_core():
    assert build.stage_rows(built(), 1000, 2) == [
        ("ours", "train", 5.0, 100),
        ("ours", "encode", 2.0, 250),
        ("ours", "all else", 3.0, 167),
        ("ours", "all but measuring", 10.0, 50),
        ("ours", "measure", 10.0, 50),
        ("ours", "in all", 20.0, 25),
    ]


def test_an_instant_has_no_rate():
    rows = build.stage_rows(built(stages={"save": 0.001}), 1000, 1)
    assert rows[0] == ("ours", "save", 0.0, None)


def test_a_row_of_an_index():
    row = build.index_row(built(reduced=0.95678), 100)
    assert row == ("ours", "flat", 123, 168, 170, "nprobe 3", 0.712, 0.957, 40)
    assert len(row) == len(build.INDEXES)


def test_rows_of_a_system_that_is_absent():
    absent = Built("peer", absent="it cannot be installed")
    assert build.stage_rows(absent, 100, 1) == [("peer", "absent", None, None)]
    assert build.index_row(absent, 100) == ("peer", "absent", *[None] * 7)


def test_memory_of_a_whole_family_is_watched():
    child = "import time; held = b'x' * (60 << 20); time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    peak = watching.watch([sys.executable, "-c", parent])
    assert 60 < peak.mib < 120
    assert 1 < peak.seconds <= time.monotonic() - started


def test_a_command_that_ends_badly():
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        watching.watch([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_child_that_fails_is_told_in_its_last_words(tmp_path):
    with pytest.raises(SystemExit, match=r"benchmarks.builders ended with 1: .*/none"):
        watching.ask("benchmarks.builders", tmp_path / "log", tmp_path / "none", tmp_path / "index", 0.95)


@pytest.fixture
def collection(tmp_path):
    (tmp_path / "raw").mkdir()
    np.save(tmp_path / "raw" / "vectors.npy", np.eye(8, dtype=np.float32))
    return Collection(tmp_path, "eight", [])


def test_a_peer_that_cannot_be_installed(collection, monkeypatch):
    def refuse(name):
        raise PeerFailed(f"{name} cannot be installed: no network")

    monkeypatch.setattr(builders.environments, "python", refuse)
    its = builders.build_its(collection, "Flat", 168, 1, "8G")
    assert its.absent == "autofaiss cannot be installed: no network"


@pytest.mark.parametrize(("status", "why"), [(0, "it built nothing: too little"), (7, "it ended with 7: too little")])
def test_a_peer_that_builds_nothing(collection, monkeypatch, tmp_path, status, why):
    tool = tmp_path / "autofaiss"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho too little\nexit {status}\n')
    tool.chmod(0o755)
    monkeypatch.setattr(builders.environments, "python", lambda _name: tmp_path / "python")
    assert builders.build_its(collection, "IVF1,Flat", 168, 1, "8G").absent == why
    asked = (tmp_path / "asked").read_text()
    assert "--max_index_memory_usage=1344B" in asked
    assert '--index_key="IVF1,Flat"' in asked


def test_rows_are_taken_of_a_file_and_the_next_ones_for_queries(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(1, 121, dtype=np.float32).reshape(40, 3))
    taken = build.take(tmp_path / "work", tmp_path / "x.npy", 30, 10)
    rows, asked = (np.load(path) for path in (taken.raw.vectors, taken.raw.queries))
    assert (rows.shape, asked.shape) == ((30, 3), (10, 3))
    assert np.allclose(asked[0] * np.sqrt(91**2 + 92**2 + 93**2), [91, 92, 93])
    assert np.allclose(np.linalg.norm(rows, axis=1), 1)
    with pytest.raises(SystemExit, match="has 40 rows; 35 and 10 queries"):
        build.take(tmp_path / "work", tmp_path / "x.npy", 35, 10)


def test_few_parts_hold_as_many_rows_each_as_many_do():
    parts = [(f"{number:02}", number) for number in range(64)]
    rows = dict(parts)
    for wanted in (4, 16, 64):
        chosen = merges.evenly(parts, wanted)
        assert len(set(chosen)) == wanted
        assert sum(rows[name] for name in chosen) / wanted == pytest.approx(31.5, abs=1)


def test_growth_from_the_first_row_to_the_last():
    rows = [(4, 100, 1, 0.5, 200, 20.0, 1.0), (16, 400, 4, 3.0, 133, 30.0, 1.0)]
    said = merges.growth(rows)
    assert said.startswith("from 4 to 16 partials: rows × 4.0, seconds × 6.0, peak × 1.5;")


def test_merges_of_ever_more_partials(tmp_path):
    random = np.random.default_rng(3)
    rows = np.abs(random.standard_normal((2000, 16)).astype(np.float32)) + 0.1
    np.save(tmp_path / "x.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    few, many = merges.merge_rows(tmp_path, tmp_path / "x.npy", (4, 16), rounds=1)
    assert (few[0], few[2], many[0], many[2]) == (4, 4, 16, 4)
    assert many[1] == pytest.approx(4 * few[1], rel=0.2)
    assert all(figure >= 0 for row in (few, many) for figure in row)
    assert not (tmp_path / "merging").exists()
