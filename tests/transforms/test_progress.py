import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from transforms import progress
from transforms.progress import Heartbeat, stop, tally, watch


@pytest.fixture
def hasty(monkeypatch):
    """Look and write every few milliseconds."""
    monkeypatch.setattr(progress, "_EVERY", 0.005)


def in_threads(count, work):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_heartbeat_counts_from_many_threads(tmp_path):
    heartbeat = Heartbeat(str(tmp_path))

    def work():
        for number in range(500):
            heartbeat.add(2, rejected=number % 5 == 0)

    in_threads(8, work)
    heartbeat.flush()
    assert tally(tmp_path) == (8 * 1000, 8 * 100)


def test_heartbeats_add_up(tmp_path):
    for number in range(1, 6):
        heartbeat = Heartbeat(str(tmp_path))
        heartbeat.add(number * 10, number)
        heartbeat.flush()
        heartbeat.add(0)
    assert len(list(tmp_path.iterdir())) == 5
    assert tally(tmp_path) == (150, 15)


def test_a_heartbeat_writes_now_and_then_and_when_told(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    heartbeat = Heartbeat(str(tmp_path))
    heartbeat.add(1)
    heartbeat.add(1)
    assert tally(tmp_path) == (1, 0), "the second is too soon after the first"
    clock[0] += progress._EVERY
    heartbeat.add(1)
    assert tally(tmp_path) == (3, 0)
    heartbeat.add(1, 1)
    heartbeat.flush()
    assert tally(tmp_path) == (4, 1)


def test_a_heartbeat_without_a_folder_is_silent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heartbeat = Heartbeat(None)
    heartbeat.add(5, 1)
    heartbeat.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_removed_stops_nobody(tmp_path):
    heartbeat = Heartbeat(str(tmp_path / "gone"))
    heartbeat.add(5)
    heartbeat.flush()
    assert not (tmp_path / "gone").exists()


def test_a_heartbeat_that_was_told_to_stop_does_so_at_its_next_item(tmp_path):
    heartbeat = Heartbeat(str(tmp_path))
    heartbeat.add(1)
    stop(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        heartbeat.add(1)
    heartbeat.flush()
    assert tally(tmp_path) == (2, 0)


def test_where_there_is_no_folder_nobody_is_told_to_stop(tmp_path):
    stop(None)
    stop(str(tmp_path / "gone"))
    assert not (tmp_path / "gone").exists()


def test_a_file_being_rewritten_is_passed_over(tmp_path):
    for name, text in {"whole": "3 1", "empty": "", "half": "12", "other": "4 0"}.items():
        (tmp_path / name).write_text(text)
    assert tally(tmp_path) == (7, 1)


def test_an_empty_folder_has_nothing_done(tmp_path):
    assert tally(tmp_path) == (0, 0)


def test_watching_reports_once_when_the_body_ends_at_once(tmp_path):
    Heartbeat(str(tmp_path)).add(3, 1)
    reports = []
    with watch(tmp_path, lambda *numbers: reports.append(numbers)):
        pass
    assert reports == [(3, 1)]


@pytest.mark.usefixtures("hasty")
def test_watching_reports_while_the_body_runs(tmp_path):
    reports, seen = [], threading.Event()

    def report(done, rejected):
        reports.append((done, rejected))
        if done >= 2:
            seen.set()

    with watch(tmp_path, report):
        heartbeat = Heartbeat(str(tmp_path))
        heartbeat.add(2, 1)
        heartbeat.flush()
        assert seen.wait(10)
        heartbeat.add(5)
        heartbeat.flush()
    assert (2, 1) in reports
    assert reports[-1] == (7, 1)
    assert reports == sorted(reports)


@pytest.mark.usefixtures("hasty")
def test_reports_never_go_back(tmp_path):
    """A file caught half-written must not make the bar jump."""
    reports, looks = [], threading.Semaphore(0)

    def report(done, rejected):
        reports.append((done, rejected))
        looks.release()

    def look_twice():
        assert all(looks.acquire(timeout=10) for _ in range(2))

    with watch(tmp_path, report):
        (tmp_path / "one").write_text("10 2")
        look_twice()
        (tmp_path / "one").write_text("")
        look_twice()
        (tmp_path / "one").write_text("11 2")
    assert reports == sorted(reports)
    assert reports[-1] == (11, 2)
    assert (10, 2) in reports


@pytest.mark.usefixtures("hasty")
def test_many_workers_are_watched_to_the_end(tmp_path):
    reports = []

    def work():
        heartbeat = Heartbeat(str(tmp_path))
        for _ in range(200):
            heartbeat.add(1)
        heartbeat.flush()

    with watch(tmp_path, lambda *numbers: reports.append(numbers)):
        in_threads(6, work)
    assert reports == sorted(reports)
    assert reports[-1] == (1200, 0)


def test_watching_ends_with_the_body_though_it_fails(tmp_path):
    reports = []
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), watch(tmp_path, lambda *numbers: reports.append(numbers)):
        raise ZeroDivisionError
    assert reports == [(0, 0)]
    assert threading.active_count() == before


def test_files_of_one_process_have_names_of_their_own(tmp_path):
    names = {Heartbeat(str(tmp_path))._path for _ in range(100)}
    assert len(names) == 100
    assert {Path(name).parent for name in names if name} == {tmp_path}
