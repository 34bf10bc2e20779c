"""What is needed stays whatever happens, what is not goes, and who is killed amid it breaks nothing."""

import random
import shutil
import threading
from pathlib import Path

import pytest
from histories import History
from signed import edit

from pipelines import garbage
from pipelines.garbage import Collected, GcRequest, run
from pipelines.lease import leased
from pipelines.versions import rollback
from serving import storage
from serving.errors import Conflict, FormatError, LeaseHeld, LeaseLost, NotFound, UsageError
from serving.manifest import move_current, read_current


def collect(history: History, store: bool = True, **options) -> Collected:
    request = GcRequest(history.index, history.store if store else None, **{"min_age": 0.0, **options})
    return run(request)


def removed(collected: Collected) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for pile in collected.removed:
        found.setdefault(pile.kind, set()).add(pile.name)
    return found


def part_names(history: History) -> set[str]:
    return {part.name.rpartition("/")[2] for part in history.run.parts}


def lived(history: History) -> list[str]:
    """Four versions of three runs, the last one of another embedder, and what broken-off jobs left."""
    history.commit(range(40))
    versions = [history.build()]
    history.commit(range(20, 70))
    versions += [history.build(), history.build(2)]
    history.crash(range(3), parts=2)
    history.build(3, until="describe")
    history.commit(range(30, 80), embedder=1)
    history.build(3, until="finish")
    versions.append(history.build())
    return versions


# What goes


def test_what_no_published_version_needs_goes(history):
    versions = lived(history)
    told = {version: history.answers(version) for version in versions[2:]}
    before = history.files()
    planned = collect(history, dry_run=True)
    assert history.files() == before
    assert collect(history) == planned
    assert history.finished() == {*versions[2:]}
    assert history.names(f"{history.index}/versions") == {*versions[2:]}
    assert history.names(f"{history.store}/runs") == {"run-2", "run-4"} == history.names(f"{history.store}/catalog")
    assert {version: history.answers(version) for version in told} == told
    assert history.faults() == {}
    assert before - history.files() == {
        file.uri.removeprefix(f"{history.root}/") for pile in planned.removed for file in pile.files
    }
    assert collect(history).removed == ()


def test_one_version_may_be_kept_and_takes_with_it_what_it_alone_needs(local):
    *_, last = lived(local)
    told = local.answers(last)
    collect(local, keep=1)
    assert local.finished() == {last}
    for root in (local.index, local.store):
        assert local.names(f"{root}/embedders") == {local.run.embedder.fingerprint}
    assert len(local.names(f"{local.index}/encoded")) == 1
    assert local.names(f"{local.store}/parts/{local.run.embedder.fingerprint}") == part_names(local)
    assert local.names(f"{local.store}/parts") == {local.run.embedder.fingerprint}
    assert local.answers(last) == told
    assert local.faults() == {}
    assert rollback_is_impossible(local)


def rollback_is_impossible(history: History) -> bool:
    with pytest.raises(NotFound, match="of the 3 published before it none is there whole"):
        rollback(history.index)
    return True


def test_partials_go_with_the_parts_that_no_run_lists(local):
    local.commit(range(40))
    local.build()
    local.commit(range(20, 60))
    local.build()
    (quantizer,) = local.names(f"{local.index}/encoded")
    partials = f"{local.index}/encoded/{quantizer}"
    before = local.names(partials)
    assert before > part_names(local)
    assert "partial" not in removed(collect(local, store=False))  # the first version is kept, and so is its run
    assert removed(collect(local, store=False, keep=1)).keys() == {"version", "partial"}
    assert local.names(partials) == part_names(local) | {"trained.faiss", "trained.json"}
    assert local.names(f"{local.store}/runs") == {"run-1", "run-2"}, "a store that is not named loses nothing"
    local.build(2)
    assert local.faults() == {}


def test_a_run_that_a_kept_version_was_made_from_stays(local):
    local.commit(range(30))
    version = local.build()
    for images in (range(10, 40), range(20, 50), range(30, 60)):
        local.commit(images)
    collect(local, keep=1)
    assert local.names(f"{local.store}/runs") == {"run-1", "run-4"}
    assert local.finished() == {version}
    assert local.faults() == {}


def test_the_ancestors_of_the_current_run_are_kept_in_number(local):
    for first in range(0, 50, 10):
        local.commit(range(first, first + 30))
    local.build()
    collect(local, keep=3)
    assert local.names(f"{local.store}/runs") == {"run-3", "run-4", "run-5"}
    collect(local, keep=2)
    assert local.names(f"{local.store}/runs") == {"run-4", "run-5"}
    assert local.faults() == {}


def test_what_killed_writers_left_goes_and_so_do_empty_folders(local):
    local.commit(range(30))
    gone, kept = local.build(), local.build(2)
    left = [
        "index/.CURRENT.0123456789ab.tmp",
        "store/.LEASE.0123456789ab.tmp",
        f"index/versions/{kept}/.x.0123456789ab.tmp",
    ]
    left += ["store/parts/f/.x.parquet.0123456789ab.tmp", "index/encoded/q/.x.parquet.0123456789ab.tmp"]
    mine = ["index/.mine.tmp", "index/notes/.x.0123456789ab.tmp", "store/parts/notes.txt"]
    for name in left + mine:
        Path(local.root, name).parent.mkdir(parents=True, exist_ok=True)
        Path(local.root, name).write_bytes(b"half")
    Path(local.root, "store/parts/empty/one").mkdir(parents=True)
    assert "temporary file" not in removed(collect(local, keep=2, min_age=1))
    collected = collect(local, keep=1)
    assert sum(len(pile.files) for pile in collected.removed if pile.kind == "temporary file") == 4
    assert not any(Path(local.root, name).exists() for name in left)
    assert all(Path(local.root, name).read_bytes() == b"half" for name in mine)
    for folder in (f"index/versions/{gone}", "index/encoded/q", "store/parts/f", "store/parts/empty"):
        assert not Path(local.root, folder).exists(), folder
    assert not [path for path in Path(local.root).rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert local.faults() == {}


# What stays


def test_what_is_young_may_be_a_jobs_at_work_and_stays(local):
    versions = lived(local)
    local.crash(range(10, 13), parts=1, embedder=2)
    before = local.files()
    collected = collect(local, min_age=24)
    assert removed(collected) == {"version": {*versions[:2]}}
    assert before - local.files() == {
        name for name in before if any(name.startswith(f"index/versions/{version}/") for version in versions[:2])
    }
    assert local.faults() == {}


def test_the_clock_decides_what_is_young(local, monkeypatch):
    lived(local)
    clock = garbage._now()
    monkeypatch.setattr(garbage, "_now", lambda: clock + 23 * garbage._HOUR)
    assert removed(collect(local, min_age=24)).keys() == {"version"}
    monkeypatch.setattr(garbage, "_now", lambda: clock + 25 * garbage._HOUR)
    kinds = removed(collect(local, min_age=24))
    assert kinds.keys() == {"unfinished version", "run", "unfinished run", "catalog", "part", "partial"}
    assert local.faults() == {}


def test_a_finished_version_that_is_yet_to_be_published_stays_while_it_is_young(local):
    local.commit(range(30))
    current = local.build()
    local.age(48)
    waiting = local.build(2, publish=False)
    assert not collect(local, min_age=24).removed
    assert local.finished() == {current, waiting}
    assert removed(collect(local)) == {"version": {waiting}}


def test_a_version_that_was_rolled_back_from_goes_when_it_is_old(local):
    local.commit(range(30))
    first, second = local.build(), local.build(2)
    rollback(local.index)
    assert not collect(local, min_age=24).removed
    local.age(25)
    assert removed(collect(local, min_age=24)) == {"version": {second}}
    assert local.published == [first]
    assert local.faults() == {}


def test_a_long_run_whose_plan_is_old_and_parts_are_young_stays(local):
    local.commit(range(30))
    local.build()
    running = local.crash(range(5), parts=3)
    dead = local.crash(range(10, 15), parts=3)
    local.age(48)
    fingerprint = local.run.embedder.fingerprint
    storage.create(f"{local.store}/parts/{fingerprint}/{3:032}.parquet", b"just written")
    kinds = removed(collect(local, min_age=24))
    assert kinds == {"unfinished run": {dead}, "part": {fingerprint}}
    assert {f"{number:032}.parquet" for number in range(4)} <= local.names(f"{local.store}/parts/{fingerprint}")
    assert running in local.names(f"{local.store}/runs")


def test_an_embedder_stays_while_a_young_run_has_images_to_embed(local):
    local.commit(range(30), embedder=1)
    local.commit(range(30))
    local.build()
    earlier = local.names(f"{local.store}/embedders")
    local.age(48)
    local.crash(range(5), embedder=1)
    collect(local, keep=1, min_age=24)
    assert local.names(f"{local.store}/embedders") == earlier
    local.age(48)
    collect(local, keep=1, min_age=24)
    assert local.names(f"{local.store}/embedders") == {local.run.embedder.fingerprint}


def test_a_quantizer_that_is_being_used_stays(local):
    """Trained long ago: only the unfinished version is young, and it tells its quantizer when it is described."""
    local.commit(range(30), embedder=1)
    local.build()
    local.commit(range(30))
    kept = local.build()
    local.age(48)
    move_current(local.store, "run", "run-1", read_current(local.store, "run").token)  # somebody merges it again
    unfinished = local.build(5, until="describe")
    before = local.files()
    collected = collect(local, store=False, keep=1, min_age=24)
    assert removed(collected).keys() == {"version"}
    assert f"version {unfinished} is unfinished" in collected.left[0]
    assert local.names(f"{local.index}/encoded") == {name.split("/")[2] for name in before if "/encoded/" in name}

    local.build(5, until="finish")
    assert not collect(local, store=False, keep=1, min_age=24).left
    assert len(local.names(f"{local.index}/encoded")) == 2 == len(local.names(f"{local.index}/embedders"))

    local.age(48)
    assert removed(collect(local, store=False, keep=1, min_age=24)).keys() == {
        *("unfinished version", "quantizer", "embedder")
    }
    assert local.finished() == {kept}


def test_partials_stay_while_a_version_is_merged_with_nobody_knows_which(local):
    local.commit(range(40))
    local.build()
    local.commit(range(20, 60))
    local.build()
    local.age(48)
    local.build(5, until="describe")
    assert removed(collect(local, keep=1, min_age=24)).keys() == {"version", "run", "catalog", "part"}
    local.build(5, until="finish")
    assert removed(collect(local, keep=1, min_age=24)).keys() == {"partial"}


def test_an_embedder_of_young_parts_stays(local):
    """Of a run whose plan somebody removed, say."""
    local.commit(range(30), embedder=1)
    local.commit(range(30))
    local.build()
    fingerprint = next(iter(local.names(f"{local.store}/embedders") - {local.run.embedder.fingerprint}))
    local.age(48)
    storage.create(f"{local.store}/parts/{fingerprint}/{0:032}.parquet", b"just written")
    collect(local, keep=1, min_age=24)
    assert local.names(f"{local.store}/runs") == {"run-2"}
    assert fingerprint in local.names(f"{local.store}/embedders")


def test_a_quantizer_that_was_just_trained_stays(local):
    local.commit(range(30))
    local.build()
    local.commit(range(30), embedder=1)
    local.age(48)
    quantizer = local.build(until="encode")
    assert "quantizer" not in removed(collect(local, min_age=24))
    assert quantizer in local.names(f"{local.index}/encoded")
    local.build()
    assert local.faults() == {}


def test_files_that_are_not_ours_stay_where_they_are(local):
    local.commit(range(30))
    local.build()
    mine = ["index/versions/notes.txt", "index/encoded/notes.txt", "store/notes/a.txt", "index/mine.json"]
    for name in mine:
        Path(local.root, name).parent.mkdir(exist_ok=True)
        Path(local.root, name).write_text("mine")
    assert not collect(local).removed
    assert all(Path(local.root, name).read_text() == "mine" for name in mine)


# What cannot be told


def test_partials_are_left_where_no_store_can_be_read(local, tmp_path):
    local.commit(range(30))
    local.build()
    local.commit(range(20, 50))
    local.build()
    local.age(48)
    shutil.move(local.store, tmp_path / "moved")
    collected = collect(local, store=False, keep=1)
    assert removed(collected).keys() == {"version"}
    assert collected.left == (
        f"partials of quantizers in use in {local.index} are left: {local.store} is not an embedding store: it has no "
        "CURRENT; fill one with `lookalike embed`; name the store with --store",
    )
    moved = run(GcRequest(local.index, str(tmp_path / "moved"), keep=1))
    assert "partial" in removed(moved)
    assert not moved.left
    shutil.move(tmp_path / "moved", local.store)
    assert local.faults() == {}


def test_partials_are_left_where_a_kept_versions_run_is_gone(local):
    local.commit(range(30))
    local.build()
    shutil.rmtree(f"{local.store}/runs/run-1")
    (Path(local.store) / "CURRENT").unlink()
    local.commit(range(30))
    collected = collect(local)
    assert "partial" not in removed(collected)
    assert "runs/run-1/manifest.json does not exist" in collected.left[0]
    assert "--store" not in collected.left[0]


@pytest.mark.parametrize("damage", ["CURRENT", "nowhere", "manifest", "older manifest", "a store", "run"])
def test_nothing_is_removed_where_it_cannot_be_told_what_is_needed(local, damage):
    versions = lived(local)
    if damage == "CURRENT":
        Path(local.index, "CURRENT").unlink()
    elif damage == "nowhere":
        move_current(local.index, "version", "nowhere", read_current(local.index, "version").token)
    elif damage == "a store":
        Path(local.index, "CURRENT").write_text('{"run": "run-1"}')
    elif damage == "run":
        Path(local.store, "runs", local.run.run_id, "manifest.json").unlink()
    else:
        edit(Path(local.index, "versions", versions[-1 if damage == "manifest" else -2], "manifest.json"), shards=3)
    before = local.files()
    said = {
        "CURRENT": (NotFound, "is not a published index: it has no CURRENT, and so nothing tells what is needed"),
        "nowhere": (NotFound, "version nowhere is current and not there, or was never finished; publish one that is"),
        "a store": (UsageError, "is an embedding store, not an index"),
        "run": (NotFound, "run run-4 is current and not there, or was never finished; restore it"),
    }.get(damage, (FormatError, "nothing is removed, as it cannot be told what is needed: .*manifest.json is damaged"))
    with pytest.raises(said[0], match=said[1]):
        collect(local)
    assert local.files() == before


def test_a_store_without_a_run_is_one_clear_sentence(local):
    lived(local)
    with pytest.raises(NotFound, match="/empty is not an embedding store: it has no CURRENT"):
        run(GcRequest(local.index, f"{local.root}/empty"))


def test_a_store_that_the_index_is_not_made_from_loses_nothing(local, tmp_path):
    lived(local)
    other = History(str(tmp_path / "other"), runs=10)
    for first in (0, 10, 20):
        other.commit(range(first, first + 20))
    before = other.files(), local.files()
    with pytest.raises(UsageError, match=f"--store {other.store} is another store than the index is made from"):
        run(GcRequest(local.index, other.store, min_age=0))
    assert (other.files(), local.files()) == before


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"keep": 0}, "--keep is 0; keep 1 version, the current one, or more"),
        ({"min_age": -1.0}, "--min-age is -1; take 0 hours or more"),
        ({"min_age": float("nan")}, "--min-age is nan"),
        ({"min_age": float("inf")}, "--min-age is inf"),
    ],
)
def test_wrong_wishes_are_refused(wrong, said):
    with pytest.raises(UsageError, match=said):
        GcRequest("index", **wrong)


# Others at work


class Killed(BaseException):
    """The end of a process."""


class Deletes:
    """Counts deletes of the storage of a root, and ends the process, as it were, at one of them."""

    def __init__(self, root: str, monkeypatch: pytest.MonkeyPatch, kill_at: int | None = None, at_first=None) -> None:
        self.count, self._kill_at, self._at_first = 0, kill_at, at_first
        self._lock, self._store = threading.Lock(), storage.of(root)
        self._delete = self._store.delete
        monkeypatch.setattr(self._store, "delete", self)

    def __call__(self, uri: str) -> None:
        with self._lock:
            self.count += 1
            if self.count == 1 and self._at_first:
                self._at_first()
            if self._kill_at is not None and self.count >= self._kill_at:
                raise Killed
        self._delete(uri)


def test_a_version_published_meanwhile_ends_it(local, monkeypatch):
    versions = lived(local)
    with monkeypatch.context() as patch:

        def publish() -> None:
            move_current(local.index, "version", versions[0], read_current(local.index, "version").token)

        Deletes(local.root, patch, at_first=publish)
        with pytest.raises(Conflict, match=r"CURRENT was moved while gc was at work; .* run it again"):
            collect(local)
    assert versions[0] in local.finished()
    assert local.faults() == {}
    collect(local)
    assert local.finished() == {versions[0], versions[3]}
    assert local.faults() == {}


def test_a_run_committed_meanwhile_ends_it(local, monkeypatch):
    lived(local)
    with monkeypatch.context() as patch:
        Deletes(local.root, patch, at_first=lambda: local.commit(range(90)))
        with pytest.raises(Conflict, match="store/CURRENT was moved while gc was at work"):
            collect(local)
    collect(local)
    assert local.faults() == {}


@pytest.mark.parametrize("what", ["index", "store"])
def test_it_waits_for_jobs_at_work(local, what):
    lived(local)
    before = local.files()
    with leased(f"{local.root}/{what}", "embed"):
        with pytest.raises(LeaseHeld, match=f"{local.root}/{what} is in use by `lookalike embed`"):
            collect(local)
        assert local.files() == before
        planned = collect(local, dry_run=True)
    assert collect(local, wait=1.0) == planned
    with pytest.raises(UsageError, match="--wait is -1; take 0 seconds or more"):
        collect(local, wait=-1.0)


def test_a_lease_that_was_lost_ends_it(local, monkeypatch):
    versions = lived(local)
    with monkeypatch.context() as patch:
        Deletes(local.root, patch, at_first=lambda: Path(local.store, "LEASE").unlink())
        with pytest.raises(LeaseLost, match="store/LEASE was deleted under this run"):
            collect(local)
    assert versions[0] in local.finished()
    assert local.faults() == {}


def check_survivors(history: History, told: dict) -> None:
    """What was published answers as before, and everything that claims to be finished is."""
    assert history.published[0] in told
    assert {version: history.answers(version) for version in told} == told
    assert history.faults() == {}


def test_killed_at_any_delete_it_breaks_nothing_and_the_next_one_finishes(tmp_path, monkeypatch):
    whole = History(str(tmp_path / "whole"))
    versions = lived(whole)
    done = History(str(tmp_path / "done"))
    shutil.copytree(whole.root, done.root)
    _rebase(done)
    with monkeypatch.context() as patch:
        deletes = Deletes(done.root, patch)
        collect(done)
    assert deletes.count > 40
    for number in range(1, deletes.count + 1):
        one = History(str(tmp_path / str(number)))
        shutil.copytree(whole.root, one.root)
        _rebase(one)
        told = {version: one.answers(version) for version in versions[2:]}
        with monkeypatch.context() as patch:
            Deletes(one.root, patch, kill_at=number)
            with pytest.raises(Killed):
                collect(one)
        assert one.files() > done.files()
        check_survivors(one, told)
        collect(one)
        assert one.files() == done.files()
        check_survivors(one, told)
        shutil.rmtree(one.root)


def _rebase(new: History) -> None:
    """Manifests name their store by its place."""
    for path in Path(new.index).glob("versions/*/manifest.json"):
        edit(path, lineage={"store": new.store})


@pytest.mark.parametrize("server", ["gcs_server", "s3_server"])
def test_killed_again_and_again_on_an_object_store_it_comes_to_an_end(request, server, monkeypatch):
    history = History(request.getfixturevalue(server))
    versions = lived(history)
    told = {version: history.answers(version) for version in versions[2:]}
    planned = collect(history, dry_run=True).removed
    left = history.files() - {file.uri.removeprefix(f"{history.root}/") for pile in planned for file in pile.files}
    step = 1
    while history.files() != left:
        with monkeypatch.context() as patch:
            Deletes(history.root, patch, kill_at=step)
            try:
                collect(history)
            except Killed:
                check_survivors(history, told)
        step += 7
    assert step > 20
    assert not collect(history).removed
    check_survivors(history, told)


def test_what_is_half_removed_can_be_built_again(tmp_path, monkeypatch):
    """However far gc came with a version: who builds it again finds no shard that says it is finished and is not."""
    whole = History(str(tmp_path / "whole"))
    whole.commit(range(60))
    gone = whole.build(3)
    told = whole.answers(gone)
    whole.build(2)
    for number in range(1, 20):
        one = History(str(tmp_path / str(number)), runs=1)
        shutil.copytree(whole.root, one.root)
        _rebase(one)
        with monkeypatch.context() as patch:
            Deletes(one.root, patch, kill_at=number)
            try:
                collect(one, keep=1)
            except Killed:
                assert gone not in one.finished() or number == 1
                assert one.build(3, publish=False) == gone
                assert one.answers(gone) == told
                assert one.faults() == {}
            else:
                break
    assert number > 8


# Any history


def test_whatever_happened_what_is_needed_stays(tmp_path):
    for seed in range(12):
        history = History(str(tmp_path / str(seed)))
        wheel = random.Random(seed)
        happened = live(history, wheel)
        keep, hours = wheel.choice([1, 2, 3]), wheel.choice([0.0, 24.0])
        published = [version for version in history.published if version in history.finished()][:keep]
        told = {version: history.answers(version) for version in published}
        young = {name for name in history.files() if _age(history, name) < hours}
        before = history.files()
        assert history.faults() == {}, happened
        planned = collect(history, keep=keep, min_age=hours, dry_run=True)
        assert history.files() == before
        collected = collect(history, keep=keep, min_age=hours)
        assert collected == planned
        assert history.published[:1] == published[:1]
        assert {*published} <= history.finished(), happened
        assert {version: history.answers(version) for version in told} == told, happened
        assert history.faults() == {}, happened
        lost = {name for name in before - history.files() if name in young}
        finished = {f"index/versions/{pile.name}" for pile in collected.removed if pile.kind == "version"}
        assert {"/".join(name.split("/")[:3]) for name in lost} <= finished, happened
        if not hours:
            assert history.finished() == {*published}
        assert not collect(history, keep=keep, min_age=hours).removed
        history.commit(range(50, 130))
        history.build(2)
        assert history.faults() == {}, happened


EVENTS = ["commit", "build", "build", "unpublished", "unfinished", "crash", "rollback", "publish", "age"]


def live(history: History, wheel: random.Random) -> list[str]:
    happened = []
    history.commit(range(30))
    history.build()
    for _ in range(wheel.randrange(4, 12)):
        what = wheel.choice(
            ["commit", "build", "build", "unpublished", "unfinished", "crash", "rollback", "publish", "age"]
        )
        happened.append(what)
        first = wheel.randrange(100)
        if what == "commit":
            history.commit(range(first, first + wheel.randrange(1, 60)), embedder=wheel.choice([0, 0, 0, 1]))
        elif what == "build":
            history.build(wheel.randrange(1, 4))
        elif what == "unpublished":
            history.build(wheel.randrange(1, 4), publish=False)
        elif what == "unfinished":
            history.build(wheel.randrange(4, 6), until=wheel.choice(["encode", "describe", "finish"]))
        elif what == "crash":
            history.crash(range(first, first + 4), parts=wheel.randrange(5), embedder=wheel.choice([0, 1, 2]))
        elif what == "rollback" and len(history.published) > 1:
            rollback(history.index)
        elif what == "publish":
            version = wheel.choice(sorted(history.finished()))
            move_current(history.index, "version", version, read_current(history.index, "version").token)
        elif what == "age":
            history.age(wheel.choice([6, 20]))
    return happened


def _age(history: History, name: str) -> float:
    return (garbage._now() - storage.of(history.root).stat(f"{history.root}/{name}").updated) / garbage._HOUR
