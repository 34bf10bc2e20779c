"""Check again everything that an index or a store says of itself.

    lookalike verify index/
    lookalike verify store/

Every version or run is read whole. Each fault is one line; the exit code is 1 when there is any.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobs import cli
from jobs.options import parse, positional
from serving import storage
from serving.errors import FormatError, LookalikeError, NotFound
from serving.manifest import IndexManifest, RunManifest
from transforms.verifying import check_run, check_version


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `lookalike verify`."""

    uri: str = positional("an index or an embedding store", "INDEX|STORE")


def main(argv: Sequence[str]) -> int:
    """Run the job."""
    options, _ = parse(Options, argv, "verify", __doc__ or "")
    root = storage.normalize(options.uri)
    faults = 0
    for name, found in verify(root):
        for fault in found:
            print(f"{name}: {fault}")
            faults += 1
        if not found:
            print(f"{name}: good")
    print(f"{faults} faults" if faults else "everything is as it says")
    return 1 if faults else 0


def verify(root: str) -> Iterator[tuple[str, list[str]]]:
    """Check every version of an index, or every run of a store; yield each one's name and faults."""
    kind, current = _what(root)
    folder = storage.join(root, "versions" if kind == "version" else "runs")
    names = [entry.uri for entry in storage.list_entries(folder) if entry.uri.endswith("/manifest.json")]
    if storage.join(folder, current, "manifest.json") not in names:
        yield f"CURRENT → {current}", [f"{folder}/{current} is missing, or was never finished"]
    for uri in names:
        name = f"{kind} {storage.name_of(uri.removesuffix('/manifest.json'))}"
        try:
            yield name, list(_check(root, uri, kind))
        except LookalikeError as error:
            yield name, [str(error)]


def _check(root: str, uri: str, kind: str) -> Iterator[str]:
    if kind == "run":
        return check_run(root, RunManifest.load(uri))
    return check_version(root, IndexManifest.load(uri))


def _what(root: str) -> tuple[str, str]:
    """Tell an index from a store by its pointer: the kind of thing it points to, and that one's name."""
    pointer = storage.join(root, "CURRENT")
    try:
        target = json.loads(storage.read(pointer))
        return next((kind, str(target[kind])) for kind in ("version", "run") if kind in target)
    except NotFound:
        raise NotFound(f"{root} is neither an index nor a store: it has no CURRENT") from None
    except (ValueError, StopIteration, TypeError):
        raise FormatError(f"{pointer} is damaged: it names neither a version nor a run") from None


if __name__ == "__main__":
    sys.exit(cli.main(["verify", *sys.argv[1:]]))
