"""Versions are listed, published and rolled back by one move of a pointer each."""

from pathlib import Path

import pytest
from histories import History

from pipelines.versions import list_versions, publish, rollback
from serving import Index, storage
from serving.errors import Conflict, FormatError, NotFound, UsageError
from serving.manifest import move_current, read_current


def three(history: History) -> list[str]:
    """Publish three versions of one run."""
    history.commit(range(30))
    return [history.build(shards) for shards in (1, 2, 3)]


def test_versions_are_told_newest_first_and_the_unfinished_last(history):
    first, second, third = three(history)
    unfinished = history.build(4, until="finish")
    waiting = history.build(5, publish=False)
    found = list_versions(history.index)
    assert [(version.name, version.back, version.finished) for version in found] == [
        (waiting, None, True),
        (third, 0, True),
        (second, 1, True),
        (first, 2, True),
        (unfinished, None, False),
    ]
    assert [version.manifest.rows for version in found[:-1]] == [30] * 4
    for version in found:
        stored = [entry.size for entry in storage.list_entries(f"{history.index}/versions/{version.name}")]
        assert version.size == sum(stored)


def test_publishing_takes_a_name_or_the_beginning_of_one(history):
    first, second, third = three(history)
    moved = publish(history.index, first)
    assert (moved.before, moved.now) == (third, first)
    assert history.published == [first, third, second]
    assert Index.open(history.index).info.version == first
    before = storage.of(history.index).stat(f"{history.index}/CURRENT")
    assert publish(history.index, first).before == first
    assert storage.of(history.index).stat(f"{history.index}/CURRENT") == before
    waiting = history.build(5, publish=False)
    assert publish(history.index, waiting[:-1] + "5", verify=True).now == waiting
    assert history.published == [waiting, first, third, second]


def test_an_index_that_was_never_published_is(local):
    local.commit(range(30))
    version = local.build(publish=False)
    assert publish(local.index, version[:4]).before is None
    assert local.published == [version]


def test_a_name_that_does_not_tell_is_one_clear_sentence(local):
    names = three(local)
    told = f"there are {names[2]}, {names[1]}, {names[0]}"
    local.build(4, until="finish")
    for wrong, said in {
        "0123": f"0123 is no finished version of {local.index}; {told}",
        names[0][:-1] + "4": f"{names[0][:-1]}4 is no finished version of {local.index}; {told}",
        "fff": f"fff is too short for a version's name; give 4 characters or more: {told}",
        "ffff": f"ffff begins the versions {names[2]}, {names[1]}, {names[0]} of {local.index}; give more characters",
    }.items():
        with pytest.raises(UsageError) as raised:
            publish(local.index, wrong)
        assert str(raised.value) == said
    with pytest.raises(UsageError, match="there is none; build one with `lookalike index`"):
        publish(f"{local.root}/nowhere", "0123")
    assert local.published == names[::-1]


@pytest.mark.parametrize("what", ["shard file", "short file", "manifest", "model", "embedder", "other"])
def test_a_version_that_is_not_whole_is_not_published(local, what):
    first, *_, third = three(local)
    folder = Path(local.index, "versions", first)
    shard = folder / "records-00000-of-00001.arrow"
    embedder = Path(local.index, "embedders", local.run.embedder.fingerprint)
    if what == "shard file":
        shard.unlink()
        (folder / "trained.faiss").unlink()
        said = rf"version {first} is not published: {folder}/trained.faiss is missing \(and 1 faults more\)"
    elif what == "short file":
        size = shard.stat().st_size
        shard.write_bytes(shard.read_bytes()[:-1])
        said = f"{shard} is damaged: {size - 1:,} bytes instead of {size:,}"
    elif what == "manifest":
        (folder / "manifest.json").write_bytes(b"{}")
        said = "manifest.json is not a manifest of this project"
    elif what == "other":
        (folder / "manifest.json").write_bytes((folder.parent / third / "manifest.json").read_bytes())
        said = f"{folder}/manifest.json is the manifest of version {third}; restore it"
    else:
        (embedder / {"model": "model.tflite", "embedder": "embedder.json"}[what]).unlink()
        said = rf"{embedder}/{'model.tflite is missing' if what == 'model' else 'embedder.json does not exist'}"
    with pytest.raises(FormatError, match=said):
        publish(local.index, first)
    assert local.published[0] == third


def test_only_verifying_sees_a_byte_that_was_flipped(local):
    first, *_ = three(local)
    path = Path(local.index, "versions", first, "records-00000-of-00001.arrow")
    data = path.read_bytes()
    path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    with pytest.raises(FormatError, match=f"version {first} is not published: {path} is damaged: its bytes are not"):
        publish(local.index, first, verify=True)
    assert publish(local.index, first).now == first


def test_rolling_back_goes_further_back_each_time(history):
    first, second, third = three(history)
    moved = rollback(history.index)
    assert (moved.before, moved.now, moved.passed_over) == (third, second, ())
    assert history.published == [second, first]
    assert rollback(history.index).now == first
    assert history.published == [first]
    with pytest.raises(NotFound, match=f"cannot go back: version {first} is current, none was before; `look"):
        rollback(history.index)
    assert history.published == [first]
    publish(history.index, third)
    assert history.published == [third, first]


def test_what_is_gone_or_broken_is_passed_over(local):
    local.commit(range(30))
    names = [local.build(shards) for shards in (1, 2, 3, 4)]
    Path(local.index, "versions", names[2], "manifest.json").unlink()
    Path(local.index, "versions", names[1], "trained.faiss").unlink()
    moved = rollback(local.index)
    assert moved.now == names[0]
    assert [said.partition(": ")[0] for said in moved.passed_over] == [names[2], names[1]]
    assert "manifest.json does not exist" in moved.passed_over[0]
    assert "trained.faiss is missing" in moved.passed_over[1]
    assert local.published == [names[0]]


def test_nothing_whole_to_go_back_to_leaves_everything(local):
    first, second, third = three(local)
    for name in (first, second):
        Path(local.index, "versions", name, "manifest.json").unlink()
    with pytest.raises(NotFound, match="of the 2 published before it none is there whole"):
        rollback(local.index)
    assert local.published == [third, second, first]


def test_an_index_without_a_current_version_cannot_go_back(tmp_path):
    with pytest.raises(NotFound, match=f"{tmp_path} is not a published index: it has no CURRENT"):
        rollback(str(tmp_path))


@pytest.mark.parametrize("move", [rollback, lambda index, guard: publish(index, "f" * 14 + "11", guard=guard)])
def test_a_move_amid_another_is_a_conflict(local, move):
    three(local)

    def overtake() -> None:
        move_current(local.index, "version", "other", read_current(local.index, "version").token)

    with pytest.raises(Conflict, match="CURRENT was moved by another run"):
        move(local.index, guard=overtake)
    assert local.published[0] == "other"
