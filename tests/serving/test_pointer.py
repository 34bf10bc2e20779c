"""CURRENT moves from the state that was read, and an index's remembers what it named before."""

import json

import pytest

from serving import storage
from serving.errors import Conflict, FormatError, UsageError
from serving.pointer import move_current, read_current


@pytest.fixture(params=["disk", "gcs_server", "s3_server"])
def root(request, tmp_path):
    return str(tmp_path / "index") if request.param == "disk" else f"{request.getfixturevalue(request.param)}/index"


def move(root: str, name: str, **more: object) -> None:
    current = read_current(root, "version")
    move_current(root, "version", name, current.token if current else None, **more)


def body(root: str) -> dict:
    return json.loads(storage.read(f"{root}/CURRENT"))


def test_a_pointer_moves_from_the_state_that_was_read(root):
    assert read_current(root, "version") is None
    move_current(root, "version", "one", None)
    name, token, previous = read_current(root, "version")
    assert (name, previous) == ("one", ())
    move_current(root, "version", "two", token)
    for stale in (token, None, "nonsense"):
        with pytest.raises(Conflict, match="CURRENT was moved by another run"):
            move_current(root, "version", "three", stale)
    assert read_current(root, "version").name == "two"


def test_an_index_remembers_what_was_current_newest_first(root):
    for name in ("a", "b", "c", "b"):
        move(root, name)
    assert body(root) == {"version": "b", "previous": ["c", "a"]}
    assert read_current(root, "version").previous == ("c", "a")


def test_the_caller_may_say_what_was_before(root):
    for name in ("a", "b", "c"):
        move(root, name)
    move(root, "b", previous=("a",))
    assert body(root) == {"version": "b", "previous": ["a"]}


def test_twenty_are_remembered(tmp_path):
    for number in range(30):
        move(str(tmp_path), f"v{number}")
    assert read_current(str(tmp_path), "version").previous == tuple(f"v{number}" for number in range(28, 8, -1))


def test_moving_to_where_it_stands_is_no_move(root):
    for name in ("a", "b"):
        move(root, name)
    before = read_current(root, "version")
    for token in (before.token, None, "stale"):
        move_current(root, "version", "b", token)
    assert read_current(root, "version") == before


def test_a_pointer_of_before_there_was_a_history_is_read_and_moved(root):
    storage.create(f"{root}/CURRENT", b'{"version": "a"}\n')
    assert read_current(root, "version")[::2] == ("a", ())
    move(root, "b")
    assert body(root) == {"version": "b", "previous": ["a"]}


def test_the_pointer_of_a_store_has_no_history(root):
    move_current(root, "run", "one", None)
    move_current(root, "run", "two", read_current(root, "run").token)
    assert body(root) == {"run": "two"}


def test_a_move_amid_another_is_refused(tmp_path, monkeypatch):
    """Somebody moves the pointer after it was read for its history."""
    root = str(tmp_path)
    move(root, "a")
    token = read_current(root, "version").token
    store = storage.of(root)
    swap = store.swap_pointer

    def overtaken(uri, data, given):
        monkeypatch.undo()
        swap(uri, b'{"version": "other"}', given)
        swap(uri, data, given)

    monkeypatch.setattr(store, "swap_pointer", overtaken)
    with pytest.raises(Conflict):
        move_current(root, "version", "b", token)
    assert body(root) == {"version": "other"}


@pytest.mark.parametrize(
    "content",
    [
        *("", "garbage", "[]", "3", "null", '"version"', '["run"]', "{}", '{"version": 3}', "\udcff"),
        *(
            '{"version": "a", "previous": "abc"}',
            '{"version": "a", "previous": [3]}',
            '{"version": "a", "previous": null}',
        ),
    ],
)
def test_a_damaged_pointer_is_refused(tmp_path, content):
    (tmp_path / "CURRENT").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(FormatError, match=f"{tmp_path}/CURRENT is damaged: it should be JSON with the key 'version'"):
        read_current(str(tmp_path), "version")


def test_a_store_is_not_taken_for_an_index(tmp_path):
    move_current(str(tmp_path), "run", "one", None)
    for action in (lambda root: read_current(root, "version"), lambda root: move_current(root, "version", "a", None)):
        with pytest.raises(UsageError, match="is an embedding store, not an index; name an index"):
            action(str(tmp_path))
