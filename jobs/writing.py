"""Write a text file for people or schedulers, in the place of an older one."""

import secrets
from contextlib import suppress
from pathlib import Path

from serving import storage
from serving.errors import Conflict, LookalikeError, StorageError

_ATTEMPTS = 5


def write_text(where: str, text: str, flag: str) -> None:
    """Write a whole file, or an object of a store, at once; `flag` is the option that errors name."""
    uri = storage.normalize(where)
    if storage.scheme_of(uri) == "file":
        _write_file(Path(uri), text, flag)
    else:
        _write_object(uri, text.encode(), flag)


def _write_file(path: Path, text: str, flag: str) -> None:
    temporary = path.with_name(f".lookalike.{secrets.token_hex(6)}.tmp")
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_text(text, encoding="utf-8")  # through a link, or to a device: nothing to put in its place
            return
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise StorageError(f"{flag} {path} cannot be written: {error.strerror or error}") from None


def _write_object(uri: str, data: bytes, flag: str) -> None:
    store = storage.of(uri)
    try:
        for _ in range(_ATTEMPTS):
            found = store.read_pointer(uri)
            with suppress(Conflict):  # another wrote it meanwhile: the last one stays
                store.swap_pointer(uri, data, found[1] if found else None)
                return
    except LookalikeError as error:
        raise StorageError(f"{flag} {uri} cannot be written: {error}") from None
    raise StorageError(f"{flag} {uri} cannot be written: others keep writing it")
