"""The peers' protocol, with exact FAISS from the project's own environment and with fakes where a fault is injected."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import environments, worker
from benchmarks.peers.client import Peer
from benchmarks.peers.environments import PeerFailed
from benchmarks.peers.libraries import LIBRARIES

EXECUTABLE = Path(sys.executable)
COUNT, WIDTH, ASKED = 600, 16, 40


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Vectors, queries, the truth by a matrix product, and an index of them."""
    where = tmp_path_factory.mktemp("peer")
    random = np.random.default_rng(5)
    vectors = unit(random.standard_normal((COUNT, WIDTH)))
    queries = unit(vectors[:ASKED] + 0.1 * random.standard_normal((ASKED, WIDTH)))
    truth = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    for name, array in {"x": vectors, "q": queries, "t": truth.astype(np.int64), "wrong": truth + COUNT}.items():
        np.save(where / f"{name}.npy", array)
    with Peer("faiss", where, EXECUTABLE) as peer:
        built = peer.ask({"do": "build", "vectors": where / "x.npy", "params": {"threads": 1}})
    assert built["build_seconds"] > 0
    assert COUNT * WIDTH * 4 < built["disk_bytes"] < COUNT * WIDTH * 4 + 1000
    return where


@pytest.fixture(scope="module")
def opened(folder):
    with Peer("faiss", folder, EXECUTABLE) as peer:
        answer = peer.ask({"do": "open"})
        assert answer["open_seconds"] > 0
        assert answer["resident_bytes"] >= answer["resident_anonymous_bytes"] > -(2**20)
        yield peer


def tune(peer, folder, truth="t"):
    return peer.ask({"do": "tune", "queries": folder / "q.npy", "truth": folder / f"{truth}.npy", "timed": 30})


def test_exact_search_reaches_everything(opened, folder):
    found = tune(opened, folder)
    assert (found["setting"], found["recall"], found["reached"], len(found["curve"])) == ({}, 1.0, True, 1)


def test_a_target_out_of_reach_is_said(opened, folder):
    found = tune(opened, folder, "wrong")
    assert (found["recall"], found["reached"]) == (0.0, False)


def test_a_round_times_each_query_from_the_start_again(opened, folder):
    us = opened.ask({"do": "round", "queries": folder / "q.npy", "count": ASKED + 7})["us"]
    assert len(us) == ASKED + 7
    assert min(us) > 0


def test_a_batch_and_the_memory_after_it(opened, folder):
    assert opened.ask({"do": "batch", "queries": folder / "q.npy"})["queries_per_second"] > 0
    assert set(opened.ask({"do": "memory"})) == {"resident_bytes", "resident_anonymous_bytes"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ({"do": "dance"}, "faiss cannot dance: ValueError: there is no command dance"),
        ({"do": "round", "queries": "/no/such.npy"}, "faiss cannot round: FileNotFoundError: .*/no/such.npy"),
        ({"do": "batch"}, "faiss cannot batch: TypeError: .*queries"),
    ],
)
def test_an_error_is_answered_and_the_worker_goes_on(opened, folder, command, message):
    with pytest.raises(PeerFailed, match=message):
        opened.ask(command)
    assert len(opened.ask({"do": "round", "queries": folder / "q.npy", "count": 3})["us"]) == 3


def test_nothing_is_searched_before_opening(folder):
    with Peer("faiss", folder, EXECUTABLE) as peer, pytest.raises(PeerFailed, match="nothing is open yet"):
        peer.ask({"do": "batch", "queries": folder / "q.npy"})


def test_a_library_that_is_not_installed(tmp_path):
    with Peer("svs", tmp_path, EXECUTABLE) as peer, pytest.raises(PeerFailed, match=r"svs cannot open: .*'svs'"):
        peer.ask({"do": "open"})


def test_a_worker_that_dies_has_its_last_words_quoted(tmp_path):
    with (
        Peer("no-such-peer", tmp_path, speaking(tmp_path, "print('a library gives up', file=sys.stderr)")) as peer,
        pytest.raises(PeerFailed, match="no-such-peer died with 3: a library gives up"),
    ):
        peer.ask({"do": "open"})


def test_a_worker_that_quit_is_dead(folder):
    with Peer("faiss", folder, EXECUTABLE) as peer, pytest.raises(PeerFailed, match="faiss died with 0"):
        peer.ask({"do": "quit"})


def test_a_worker_that_does_not_answer_is_ended(tmp_path):
    with Peer("slow", tmp_path, speaking(tmp_path, "import time; time.sleep(60)")) as peer:
        with pytest.raises(PeerFailed, match=r"slow did not answer open within 0\.1 s"):
            peer.ask({"do": "open"}, timeout=0.1)
        with pytest.raises(PeerFailed, match="slow died with -9"):
            peer.ask({"do": "open"})


def speaking(folder, code):
    """An interpreter that runs other code and ends with 3, whatever it is asked to run."""
    script = folder / "python"
    script.write_text(f"#!{EXECUTABLE}\nimport sys\nsys.stdin.readline()\n{code}\nsys.exit(3)\n")
    script.chmod(0o755)
    return script


def test_what_a_library_prints_is_no_answer(tmp_path):
    """Through Python and through the file descriptor."""
    (tmp_path / "faiss.py").write_text("import os\nprint('hello')\nos.write(1, b'{}\\n')\n")
    code = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_module('benchmarks.peers.worker')"
    code = code.replace("worker')", "worker', run_name='__main__', alter_sys=False)")
    done = subprocess.run(
        [sys.executable, "-c", code, "faiss", str(tmp_path)],
        input='{"do": "batch"}\n{"do": "quit"}\n',
        capture_output=True,
        text=True,
        cwd=Path(worker.__file__).parents[2],
        check=True,
    )
    assert json.loads(done.stdout) == {"error": "ValueError: nothing is open yet: ask to open first"}
    assert "hello" in done.stderr


@pytest.mark.parametrize("least", [1, 2, 3, 10, 31, 33, 64, 100, 777, 1000])
def test_the_least_value_that_reaches_is_found(least):
    tried = []
    found = worker._least(lambda value: tried.append(value) or value >= least, 1, 1000)
    assert least <= found <= least * 1.04
    assert len(tried) == len(set(tried)) < 18
    assert all(low < high for low, high in pairwise(value for value in tried if value < least))


def test_no_value_reaches():
    tried = []
    assert worker._least(lambda value: bool(tried.append(value)), 10, 100) is None
    assert tried == [10, 20, 40, 80, 100]


class TwoKnobs:
    """Recall is 1 where depth times width is 48 or more; only width costs time."""

    knobs = {"depth": (1, 64), "width": (1, 3, 50)}  # noqa: RUF012

    def set_effort(self, depth, width):
        self.depth, self.width = depth, width

    def search(self, query, k):  # noqa: ARG002
        for _ in range(self.width * 200):
            pass
        return np.arange(k) if self.depth * self.width >= 48 else np.arange(k) + k

    def search_batch(self, queries, k):
        return np.stack([self.search(query, k) for query in queries])


def test_of_several_ways_to_reach_the_fastest_is_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(LIBRARIES, "fake", TwoKnobs)
    np.save(tmp_path / "q.npy", np.zeros((8, 2), np.float32))
    np.save(tmp_path / "t.npy", np.tile(np.arange(10), (8, 1)))
    fake = worker.Worker("fake", tmp_path)
    found = fake.tune(str(tmp_path / "q.npy"), str(tmp_path / "t.npy"), timed=5)
    assert (found["setting"], found["reached"], found["recall"]) == ({"depth": 48, "width": 1}, True, 1.0)
    assert ({"depth": 16, "width": 3}, 1.0) in [(setting, recall) for setting, recall, _ in found["curve"]]
    assert (fake._library.depth, fake._library.width) == (48, 1)


def test_every_peer_has_requirements_that_are_pinned():
    assert set(environments.REQUIREMENTS) == set(LIBRARIES)
    assert all("==" in each for pins in environments.REQUIREMENTS.values() for each in pins)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """What would be run, and the step that is to fail."""
    ran, fails = [], {}

    def run(command, **_):
        ran.append(command)
        failed = next((words for part, words in fails.items() if part in command), None)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, failed is not None, "", failed or "")

    monkeypatch.setenv("LOOKALIKE_PEERS", str(tmp_path / "peers"))
    monkeypatch.setattr(environments.subprocess, "run", run)
    return ran, fails


def test_an_environment_is_made_once(commands, tmp_path, monkeypatch):
    ran, _ = commands
    interpreter = environments.python("annoy")
    assert interpreter == tmp_path / "peers" / "annoy" / "bin" / "python"
    assert [command[0] for command in ran] == [sys.executable, str(interpreter)]
    assert ran[1][-2:] == list(environments.REQUIREMENTS["annoy"])
    assert environments.python("annoy") == interpreter
    assert len(ran) == 2
    monkeypatch.setitem(environments.REQUIREMENTS, "annoy", ["annoy==9"])
    environments.python("annoy")
    assert len(ran) == 4


def test_a_failed_installation_is_one_sentence_and_is_tried_again(commands):
    ran, fails = commands
    fails["install"] = "Collecting annoy\nERROR: No matching distribution found for annoy\n\n"
    for _ in range(2):
        with pytest.raises(PeerFailed) as caught:
            environments.python("annoy")
        said = "annoy cannot be installed: ERROR: No matching distribution found for annoy"
        assert str(caught.value) == said
    assert len(ran) == 4


def test_an_unknown_peer():
    with pytest.raises(PeerFailed, match="there is no peer named nobody: choose from faiss, hnswlib"):
        environments.python("nobody")
