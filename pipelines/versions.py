"""The versions of an index: which there are, and which of them is current."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from serving import storage
from serving.embedder import read_description
from serving.errors import FormatError, LookalikeError, NotFound, UsageError
from serving.manifest import FileEntry, IndexManifest, move_current, read_current
from serving.pointer import Current
from serving.storage import Entry
from transforms.verifying import check_version, shard_files

_PREFIX = 4
"""Characters that a version may be called by when they are its alone."""


@dataclass(frozen=True, slots=True)
class Version:
    """One folder below `INDEX/versions`: finished when it holds a manifest."""

    name: str
    files: tuple[Entry, ...]
    manifest: IndexManifest | None = None
    fault: str | None = None
    """What is wrong with its manifest."""
    back: int | None = None
    """How many publications ago it was current; 0: it is."""

    @property
    def finished(self) -> bool:
        """Tell whether it has a manifest, be it damaged."""
        return self.manifest is not None or self.fault is not None

    @property
    def size(self) -> int:
        """Return its bytes on storage."""
        return sum(file.size for file in self.files)

    @property
    def updated(self) -> int:
        """Return when its newest file was written, in microseconds since 1970."""
        return max(file.updated for file in self.files)


@dataclass(frozen=True, slots=True)
class Moved:
    """Where a pointer was, where it is now, and what was passed over on the way, each with a reason."""

    before: str | None
    now: str
    passed_over: tuple[str, ...] = ()


def folders(uri: str) -> dict[str, list[Entry]]:
    """List all objects below `uri` by the first name after it; files that stand there themselves are left out."""
    found: dict[str, list[Entry]] = {}
    with suppress(NotFound):
        for entry in storage.list_entries(uri):
            name, inside, _ = entry.uri.removeprefix(f"{uri}/").partition("/")
            if inside and entry.uri.startswith(f"{uri}/"):
                found.setdefault(name, []).append(entry)
    return found


def list_versions(index: str, current: Current | None = None) -> list[Version]:
    """Describe all versions of an index, the newest first; the unfinished are the last."""
    current = current or read_current(index, "version")
    published = [current.name, *current.previous] if current else []
    found = []
    for name, files in folders(storage.join(index, "versions")).items():
        manifest = fault = None
        if any(file.uri == _manifest_uri(index, name) for file in files):
            try:
                manifest = _load(index, name)
            except LookalikeError as error:
                fault = str(error)
        back = published.index(name) if name in published else None
        found.append(Version(name, tuple(files), manifest, fault, back))
    return sorted(found, key=_by_age, reverse=True)


def publish(index: str, version: str, verify: bool = False, guard: Callable[[], None] = lambda: None) -> Moved:
    """Point an index to a finished version, called by its name or by the beginning of it, once that is checked.

    Its files must be there and have their sizes; with `verify` every byte of them is compared. `guard` is called right
    before the pointer moves, and raises when it must not.
    """
    current = read_current(index, "version")
    name = resolve(version, list_versions(index, current), index)
    faults = list(check_version(index, _load(index, name)) if verify else missing_files(index, name))
    if faults:
        more = f" (and {len(faults) - 1} faults more)" if len(faults) > 1 else ""
        raise FormatError(f"version {name} is not published: {faults[0]}{more}")
    guard()
    move_current(index, "version", name, current.token if current else None)
    return Moved(current.name if current else None, name)


def rollback(index: str, guard: Callable[[], None] = lambda: None) -> Moved:
    """Point an index to what was current before and is still there whole.

    What is left is forgotten, so that the next one goes further back. `NotFound` when there is nothing to go back to.
    `guard` is called right before the pointer moves, and raises when it must not.
    """
    current = read_current(index, "version")
    if current is None:
        raise NotFound(f"{index} is not a published index: it has no CURRENT; there is nothing to go back from")
    passed_over: list[str] = []
    for place, name in enumerate(current.previous):
        fault = next(missing_files(index, name), None)
        if fault is None:
            guard()
            move_current(index, "version", name, current.token, previous=current.previous[place + 1 :])
            return Moved(current.name, name, tuple(passed_over))
        passed_over.append(f"{name}: {fault}")
    was = (
        f"of the {len(current.previous)} published before it none is there whole" if passed_over else "none was before"
    )
    raise NotFound(
        f"{index} cannot go back: version {current.name} is current, {was}; `lookalike versions` shows what there is, "
        "`lookalike publish` takes any of them"
    )


def resolve(version: str, versions: Iterable[Version], index: str) -> str:
    """Return the full name of the finished version that is called, or begins with, `version`."""
    names = [found.name for found in versions if found.finished]
    if version in names:
        return version
    matching = [name for name in names if name.startswith(version)]
    there_are = f"there are {', '.join(names)}" if names else "there is none; build one with `lookalike index`"
    if not matching:
        raise UsageError(f"{version} is no finished version of {index}; {there_are}")
    if len(version) < _PREFIX:
        raise UsageError(f"{version} is too short for a version's name; give {_PREFIX} characters or more: {there_are}")
    if len(matching) > 1:
        raise UsageError(f"{version} begins the versions {', '.join(matching)} of {index}; give more characters")
    return matching[0]


def missing_files(index: str, name: str) -> Iterator[str]:
    """Compare what stands of a version, and of its embedder, with the manifest by names and sizes alone."""
    folder = storage.join(index, "versions", name)
    try:
        manifest = _load(index, name)
        yield from _missing(folder, shard_files(manifest))
        embedder = storage.join(index, "embedders", manifest.embedder.fingerprint)
        yield from _missing(embedder, [read_description(embedder).model])
    except LookalikeError as error:
        yield str(error)


def _missing(folder: str, entries: Iterable[FileEntry]) -> Iterator[str]:
    sizes = {entry.uri: entry.size for entry in storage.list_entries(folder)}
    for entry in entries:
        uri = storage.join(folder, entry.name)
        if uri not in sizes:
            yield f"{uri} is missing"
        elif sizes[uri] != entry.size:
            yield f"{uri} is damaged: {sizes[uri]:,} bytes instead of {entry.size:,}"


def _load(index: str, name: str) -> IndexManifest:
    uri = _manifest_uri(index, name)
    manifest = IndexManifest.load(uri)
    if manifest.version != name:
        raise FormatError(f"{uri} is the manifest of version {manifest.version}; restore it")
    return manifest


def _manifest_uri(index: str, name: str) -> str:
    return storage.join(index, "versions", name, "manifest.json")


def _by_age(version: Version) -> tuple[bool, str, int, str]:
    created = version.manifest.created if version.manifest else ""
    return version.finished, created, version.updated, version.name
