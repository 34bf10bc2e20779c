"""The local disk as a `Storage`."""

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from operator import itemgetter
from typing import BinaryIO

from serving.errors import AccessDenied, Changed, Conflict, NotFound, StorageError
from serving.storage import Entry, normalize, sha256

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_ATTEMPTS = 10


class DiskStorage:
    """Plain files. A file appears under its final name complete, or not at all."""

    def list(self, uri: str) -> Iterator[Entry]:
        """Walk the folder in the order of full paths, holding one directory's names at a time."""
        root = normalize(uri)
        with _sentences(root):
            info = os.stat(root)
        if not stat.S_ISDIR(info.st_mode):
            yield _entry(_spelled(root), _regular(root, info))
            return
        yield from _walk(root, _spelled(root).rstrip("/") + "/", frozenset([(info.st_dev, info.st_ino)]))

    def stat(self, uri: str) -> Entry:
        """Describe one file."""
        path = normalize(uri)
        with _sentences(path):
            info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            raise NotFound(f"{path} is a folder, not a file")
        return _entry(_spelled(path), _regular(path, info))

    def read(self, uri: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        """Read a file or a range of it; the etag is compared on the open file."""
        path = normalize(uri)
        with open_file(path) as file, _sentences(path):
            if etag is not None and _etag(os.fstat(file.fileno())) != etag:
                raise Changed(f"{path} has changed since it was listed")
            if start:
                file.seek(start)
            return file.read(-1 if length is None else length)

    def create(self, uri: str, data: bytes) -> bool:
        """Write to a hidden neighbour, then link it to its name: the link fails if the name is taken."""
        path = normalize(uri)
        if os.path.exists(path):
            return False
        with _sentences(path):
            temporary = _write_beside(path, data)
            try:
                return _link_once(temporary, path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)

    def read_pointer(self, uri: str) -> tuple[bytes, str] | None:
        """Read the file; its token is the hash of its bytes."""
        try:
            data = self.read(uri)
        except NotFound:
            return None
        return data, sha256(data)

    def swap_pointer(self, uri: str, data: bytes, token: str | None) -> None:
        """Compare and rename under a lock that the system drops with the process."""
        path = normalize(uri)
        with _sentences(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(f"{path}.lock", "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                present = self.read_pointer(path)
                if (present[1] if present else None) != token:
                    raise Conflict(f"{path} was moved by another run; look at it, then run again")
                os.replace(_write_beside(path, data), path)

    def delete(self, uri: str) -> None:
        """Remove a file; a missing one is no error."""
        path = normalize(uri)
        with _sentences(path), suppress(FileNotFoundError):
            os.unlink(path)


def is_temporary(uri: str) -> bool:
    """Tell whether a file is one that a writer renames or removes as its last step."""
    return _TEMPORARY.fullmatch(os.path.basename(uri)) is not None


def temporaries_beside(uri: str) -> Iterator[Entry]:
    """Yield the temporary files of all writers of one file."""
    folder, name = os.path.split(normalize(uri))
    with suppress(NotFound), _sentences(folder), os.scandir(folder) as scan:
        for entry in scan:
            if entry.name.startswith(f".{name}.") and is_temporary(entry.name):
                with suppress(FileNotFoundError):  # renamed or removed since its name was read
                    yield _entry(entry.path, entry.stat())


def prune(uri: str) -> None:
    """Remove a folder and those below it that hold no file; a missing one is no error."""
    path = normalize(uri)
    for folder, _, _ in os.walk(path, topdown=False):
        with suppress(OSError):  # it is not empty, or somebody was quicker
            os.rmdir(folder)


def open_file(uri: str) -> BinaryIO:
    """Open a file for reading."""
    path = normalize(uri)
    with _sentences(path):
        return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    # A pipe would have us wait for a writer, and a device may give bytes without end.
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    try:
        _regular(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _regular(path: str, info: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):  # the system says it of folders itself
        raise StorageError(f"{path} is no regular file but a pipe, a socket or a device")
    return info


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[Entry]:
    with _sentences(folder), os.scandir(folder) as scan:
        # A folder sorts as "name/", which makes a depth-first walk the order of whole paths.
        named = ((name + "/" * _is_folder(entry), entry) for name, entry in _spelled_apart(scan))
        children = sorted(named, key=itemgetter(0))
    for name, child in children:
        info = _described(child)
        if info is None:
            continue
        if not name.endswith("/"):
            if stat.S_ISREG(info.st_mode) or stat.S_ISLNK(info.st_mode):  # no pipes, sockets and devices
                yield _entry(prefix + name, info)
        elif (info.st_dev, info.st_ino) not in above:  # a link to a folder above would never end
            yield from _walk(child.path, prefix + name, above | {(info.st_dev, info.st_ino)})


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _described(child: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return child.stat()
    except OSError:
        with suppress(FileNotFoundError):  # removed since its name was read
            return child.stat(follow_symlinks=False)  # a dangling link is listed, and rejected when read
    return None


def _spelled(path: str) -> str:
    # A name that is no UTF-8 has no URI; its escaped spelling is listed, and rejected when it cannot be read.
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _spelled_apart(scan: Iterable[os.DirEntry[str]]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Spell the names of one folder, no two alike: an escaped spelling may be the very name of another file."""
    odd = []
    for entry in scan:
        name = _spelled(entry.name)
        if name == entry.name:
            yield name, entry
        else:
            odd.append((name, entry))
    taken = set()
    for name, entry in sorted(odd, key=itemgetter(0)):
        while name in taken or os.path.lexists(os.path.join(os.path.dirname(entry.path), name)):
            name = name.replace("\\", "\\\\")
        taken.add(name)
        yield name, entry


def _entry(uri: str, info: os.stat_result) -> Entry:
    return Entry(uri, info.st_size, _etag(info), info.st_mtime_ns // 1000)


def _etag(info: os.stat_result) -> str:
    return f"{info.st_mtime_ns:x}-{info.st_size:x}"


def _write_beside(path: str, data: bytes) -> str:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")
    try:
        with _create_below(folder, temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return temporary


def _create_below(folder: str, path: str) -> BinaryIO:
    for _ in range(_ATTEMPTS):
        # An empty folder may be pruned before there is a file in it.
        with suppress(FileNotFoundError):
            os.makedirs(folder, exist_ok=True)
            return open(path, "xb")
    os.makedirs(folder, exist_ok=True)
    return open(path, "xb")


def _link_once(temporary: str, path: str) -> bool:
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
    # A file system without hard links: look and rename, with the other writers locked out of the folder.
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if os.path.lexists(path):
            return False
        os.replace(temporary, path)
        return True
    finally:
        os.close(folder)


class _sentences:  # noqa: N801 (reads as a verb: with _sentences(path))
    """Turn the system's errors into ours, naming the path."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise NotFound(f"{self._path} does not exist") from error
        if isinstance(error, PermissionError):
            raise AccessDenied(f"{self._path}: permission denied") from error
        if isinstance(error, OSError):
            raise StorageError(f"{self._path}: {error.strerror or error}") from error
