"""Leases on every kind of storage, by a clock that the tests set and by the real one."""

import dataclasses
import json
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
import signed

from pipelines import lease as leases
from pipelines.lease import Clock, LeaseDocument, leased
from serving import storage
from serving.disk import DiskStorage
from serving.errors import FormatError, LeaseHeld, LeaseLost, StorageError, UsageError


class FakeClock(Clock):
    """A clock that stands still; `skew` is what its time of day is off by."""

    def __init__(self, skew: float = 0.0) -> None:
        self.at = 1000.0
        self.skew = skew

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.at + self.skew)

    def elapsed(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def found(root: str) -> LeaseDocument:
    return LeaseDocument.load(f"{root}/LEASE")


def take_over(root: str, **changes: object) -> None:
    """Put another run's lease in the place of the one that is there."""
    uri = f"{root}/LEASE"
    data, token = storage.of(uri).read_pointer(uri)
    body = {**json.loads(data), "holder": "another", "host": "elsewhere", "job": "index", **changes}
    storage.of(uri).swap_pointer(uri, signed.sign(body), token)


class TestOnEveryStorage:
    def test_a_lease_is_taken_kept_and_released(self, anywhere, clock):
        with leased(anywhere, "embed", 60, clock=clock) as lease:
            held = found(anywhere)
            assert (held.job, held.fence, held.released, lease.fence) == ("embed", 1, False, 1)
            assert datetime.fromisoformat(held.expires) - clock.now() == timedelta(seconds=60)
            lease.check()
        assert dataclasses.replace(held, released=True) == found(anywhere)
        with leased(anywhere, "index", 60, clock=clock) as lease:  # free at once
            assert (found(anywhere).job, lease.fence) == ("index", 2)
            assert found(anywhere).holder != held.holder

    def test_the_later_run_is_told_who_holds_it(self, anywhere, clock):
        with leased(anywhere, "embed", 60, clock=clock) as lease:
            with pytest.raises(LeaseHeld) as told, leased(anywhere, "index", 60, clock=clock):
                pass
            lease.check()
        said = str(told.value)
        assert said.startswith(f"{anywhere} is in use by `lookalike embed` on ")
        assert "since 2026-01-01 00:16:40 UTC, which holds it until 2026-01-01 00:17:40 UTC" in said
        assert f"--wait SECONDS (if that run is surely dead, delete {anywhere}/LEASE)" in said
        assert told.value.exit_code == 4

    def test_one_that_ran_out_is_taken_over_and_its_holder_told(self, anywhere, clock):
        with leased(anywhere, "embed", 60, clock=clock) as old:
            clock.at += 74  # clocks may differ by a quarter of a lease
            with pytest.raises(LeaseHeld), leased(anywhere, "index", 60, clock=clock):
                pass
            clock.at += 1
            with leased(anywhere, "index", 60, clock=clock) as new:
                assert new.fence == old.fence + 1
                with pytest.raises(LeaseLost, match=r"ran out 15 s ago, .*; nothing was published, run again"):
                    old.check()
                old._deadline = clock.at + 60  # even if its own clock had stood still
                with pytest.raises(
                    LeaseLost, match=r"was taken over by `lookalike index` on .* at 2026-01-01 00:17:55"
                ):
                    old.check()
                new.check()
        assert found(anywhere).job == "index"  # the old one released nothing but its own

    def test_of_many_at_once_one_gets_it(self, anywhere):
        got, refused, together = [], [], threading.Barrier(6)

        def run(number: int) -> None:
            together.wait()
            try:
                with leased(anywhere, f"job-{number}"):
                    got.append(number)
                    done.wait(20)
            except LeaseHeld as error:
                refused.append(str(error))
            if len(refused) == 5:
                done.set()

        done = threading.Event()
        threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(got), len(refused)) == (1, 5)
        assert all(f"in use by `lookalike job-{got[0]}`" in said for said in refused)

    def test_it_is_renewed_as_long_as_the_work_lasts(self, anywhere):
        with leased(anywhere, "embed", 0.9) as lease:
            first = found(anywhere)
            time.sleep(1.5)
            lease.check()
            assert found(anywhere).expires > first.expires
            with pytest.raises(LeaseHeld), leased(anywhere, "index"):
                pass
        assert found(anywhere).released


def test_a_run_that_waits_gets_what_is_released_meanwhile(tmp_path, clock):
    first = leased(str(tmp_path), "embed", 60, clock=clock)
    first.__enter__()

    class Waiting(FakeClock):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if self.at >= 1010:
                first.__exit__(None, None, None)

    waiting = Waiting()
    with leased(str(tmp_path), "index", 60, wait=30, clock=waiting) as lease:
        assert 1010 <= waiting.at < 1015
        lease.check()


def test_a_run_that_waits_in_vain_waits_no_longer_than_asked(tmp_path, clock):
    with leased(str(tmp_path), "embed", 600, clock=clock):
        waiting = FakeClock()
        with pytest.raises(LeaseHeld, match="in use by"), leased(str(tmp_path), "index", 60, wait=30, clock=waiting):
            pass
        assert waiting.at == pytest.approx(1030)


def test_a_lease_that_nobody_renews_is_taken_over_whatever_the_clock_of_its_holder_said(tmp_path, clock):
    root, months_ahead = str(tmp_path), FakeClock(skew=1e7)
    with leased(root, "embed", 60, clock=months_ahead), leased(root, "index", 60, wait=200, clock=clock) as lease:
        assert clock.at == pytest.approx(1000 + 75, abs=7)
        lease.check()


def test_a_lease_that_ran_out_is_not_revived(tmp_path, clock):
    with leased(str(tmp_path), "embed", 60, clock=clock) as lease:
        clock.at += 60
        with pytest.raises(LeaseLost, match="ran out 0 s ago"):
            lease._renew()
        with pytest.raises(LeaseLost):
            lease.check()
        assert found(str(tmp_path)).expires == "2026-01-01T00:17:40.000+00:00"


def test_a_renewal_that_takes_longer_than_the_lease_lasts_comes_too_late(tmp_path, clock, monkeypatch):
    with leased(str(tmp_path), "embed", 60, clock=clock) as lease:
        swap = DiskStorage.swap_pointer

        def slowly(self, *arguments):
            clock.at += 61
            swap(self, *arguments)

        monkeypatch.setattr(DiskStorage, "swap_pointer", slowly)
        with pytest.raises(LeaseLost, match="ran out 1 s ago"):
            lease._renew()


def test_a_store_that_fails_for_a_while_costs_no_lease_and_for_long_it_does(tmp_path, monkeypatch):
    swap, failing = DiskStorage.swap_pointer, threading.Event()

    def sometimes(self, *arguments):
        if failing.is_set():
            raise StorageError("the store is busy")
        swap(self, *arguments)

    monkeypatch.setattr(DiskStorage, "swap_pointer", sometimes)
    with leased(str(tmp_path), "embed", 1.2) as lease:
        failing.set()
        time.sleep(0.6)
        lease.check()
        failing.clear()
        time.sleep(0.9)
        lease.check()
        failing.set()
        time.sleep(1.3)
        with pytest.raises(LeaseLost, match="its store does not answer"):
            lease.check()
        failing.clear()
        time.sleep(0.2)
        with pytest.raises(LeaseLost):
            lease.check()


def test_a_lease_that_was_deleted_is_lost(tmp_path, clock):
    with leased(str(tmp_path), "embed", 60, clock=clock) as lease:
        (tmp_path / "LEASE").unlink()
        with pytest.raises(LeaseLost, match="LEASE was deleted under this run"):
            lease.check()


def test_a_store_that_cannot_be_asked_lets_nothing_pass(tmp_path, clock, monkeypatch):
    with leased(str(tmp_path), "embed", 60, clock=clock) as lease:
        with monkeypatch.context() as broken:

            def fail(*_):
                raise StorageError("the store is busy")

            broken.setattr(DiskStorage, "read_pointer", fail)
            with pytest.raises(StorageError, match="busy"):
                lease.check()
        lease.check()


def test_another_run_is_never_released(tmp_path, clock):
    with leased(str(tmp_path), "embed", 60, clock=clock):
        take_over(str(tmp_path))
    assert (found(str(tmp_path)).holder, found(str(tmp_path)).released) == ("another", False)


def test_a_damaged_lease_is_one_clear_sentence(tmp_path):
    (tmp_path / "LEASE").write_text("{}")
    with pytest.raises(FormatError, match="LEASE is not a manifest of this project"), leased(str(tmp_path), "embed"):
        pass


@pytest.mark.parametrize("wait", [-1.0, float("nan")])
def test_no_time_is_negative(wait, tmp_path):
    with pytest.raises(UsageError, match="--wait is"), leased(str(tmp_path), "embed", wait=wait):
        pass
    assert not list(tmp_path.iterdir())


def test_an_error_inside_releases_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), leased(str(tmp_path), "embed"):
        raise KeyboardInterrupt
    assert found(str(tmp_path)).released


def test_the_real_clock_goes_on():
    clock = leases.Clock()
    before = clock.elapsed()
    clock.sleep(0.01)
    assert 0.01 <= clock.elapsed() - before < 10
    assert abs((clock.now() - datetime.now(UTC)).total_seconds()) < 10
