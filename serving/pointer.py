"""Which version of an index, or run of a store, is current: `ROOT/CURRENT`, moved by compare-and-swap.

An index's pointer also says what was published before: `{"version": V, "previous": [newest first]}`. That of a store
is `{"run": R}`, as runs name their parents.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from serving import storage
from serving.errors import Conflict, FormatError, UsageError

_REMEMBERED = 20
_POINTED = {"version": "an index", "run": "an embedding store"}
"""Whose pointer has which key."""


class Current(NamedTuple):
    """Where a pointer stands: `token` moves it from there, `previous` is what was current before, newest first."""

    name: str
    token: str
    previous: tuple[str, ...] = ()


def read_current(root: str, key: str) -> Current | None:
    """Read `root`/CURRENT, which names something under `key`; None when there is none.

    `UsageError` when `root` is a store where an index was asked for, or the reverse.
    """
    uri = storage.join(root, "CURRENT")
    found = storage.of(uri).read_pointer(uri)
    if found is None:
        return None
    try:
        body = _checked(dict, json.loads(found[0]))
        other = "run" if key == "version" else "version"
        if key not in body and other in body:
            raise UsageError(f"{root} is {_POINTED[other]}, not {_POINTED[key]}; name {_POINTED[key]}")
        previous = (_checked(str, name) for name in _checked(list, body.get("previous", [])))
        return Current(_checked(str, body[key]), found[1], tuple(previous))
    except (ValueError, KeyError, TypeError):
        raise FormatError(f"{uri} is damaged: it should be JSON with the key {key!r}") from None


def move_current(root: str, key: str, name: str, token: str | None, *, previous: Sequence[str] | None = None) -> None:
    """Point `root`/CURRENT to `name`, or raise `Conflict` when it moved since `token` was read.

    What an index's pointer left is put before what it left earlier, unless the caller says what is `previous` from now
    on. Moving to where the pointer stands is no move.
    """
    uri = storage.join(root, "CURRENT")
    body: dict[str, Any] = {key: name}
    if key == "version":
        current = read_current(root, key)
        if current is not None and current.name == name:
            return
        if (current.token if current else None) != token:
            raise Conflict(f"{uri} was moved by another run; look at it, then run again")
        if previous is None and current is not None:
            previous = [current.name, *(earlier for earlier in current.previous if earlier != name)]
        body["previous"] = list(previous or ())[:_REMEMBERED]
    storage.of(uri).swap_pointer(uri, (json.dumps(body) + "\n").encode(), token)


def _checked(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} where a {kind.__name__} belongs")
    return value
