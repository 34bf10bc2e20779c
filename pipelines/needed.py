"""Tell what of an index and its store is needed from what is not.

Nothing points from a file to those that need it: everything is listed, and the manifests that stay tell what is needed.
Of the rest, what is young may belong to a job whose manifest is yet to come, and stays too.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from pipelines.sorting import Sorted, split
from pipelines.versions import Version, folders, list_versions
from serving import storage
from serving.errors import FormatError, LookalikeError, NotFound, UsageError
from serving.manifest import RunManifest, load_run_manifest
from serving.pointer import Current
from serving.storage import Entry
from transforms.verifying import Origin

_PART = ".parquet"


def sort_index(index: str, current: Current, keep: int, store: str | None, found: Sorted) -> list[Version]:
    """Sort what is below an index, and return the finished versions that stay."""
    kept, under_way = _sort_versions(index, current, keep, found)
    encoded = folders(storage.join(index, "encoded"))
    at_work = [_quantizer_of(version, encoded) for version in under_way]
    unknown = [version.name for version, quantizer in zip(under_way, at_work, strict=True) if quantizer is None]
    if unknown:
        found.left.append(
            f"quantizers, partials and embedders of {index} are left: version {unknown[0]} is unfinished, "
            f"{found.young}, and does not tell which of them it is made with"
        )
    used = {version.manifest.quantizer for version in kept if version.manifest}
    embedders = {version.manifest.embedder.fingerprint for version in kept if version.manifest}
    listed = _listed_parts(index, store, kept, found)
    for name, files in encoded.items():
        if name in used:
            _sort_partials(name, files, None if unknown else listed, found)
        elif found.sort("quantizer", name, files, "may be in use" if unknown or name in at_work else ""):
            embedders |= _embedder_of(index, name)
    for name, files in folders(storage.join(index, "embedders")).items():
        found.sort("embedder", name, files, "in use" if name in embedders else "may be in use" if unknown else "")
    return kept


def _sort_versions(index: str, current: Current, keep: int, found: Sorted) -> tuple[list[Version], list[Version]]:
    """Return the finished versions that stay, and the unfinished."""
    versions = list_versions(index, current)
    ever = {version.back: version for version in versions if version.finished and version.back is not None}
    if 0 not in ever:
        raise NotFound(
            f"{index}: version {current.name} is current and not there, or was never finished; publish one that is "
            "before anything is removed"
        )
    published = [ever[back] for back in sorted(ever)][:keep]
    finished, under_way = [], []
    for version in versions:
        if not version.finished:
            if found.sort("unfinished version", version.name, version.files, ""):
                under_way.append(version)
        elif version in published or (_is_newer(version, ever[0]) and not found.are_old(version.files)):
            why = f"newer than the current one, {found.young}" if version.back is None else "published before"
            found.keep("version", version.name, version.files, "current" if version.back == 0 else why)
            finished.append(version)
        else:
            found.remove("version", version.name, version.files)
    for version in finished:
        if version.manifest is None:
            raise FormatError(f"nothing is removed, as it cannot be told what is needed: {version.fault}")
    return finished, under_way


def _is_newer(version: Version, current: Version) -> bool:
    """Tell a version that may be about to be published: finished after the current one, and never its predecessor."""
    return version.back is None and version.updated > current.updated


def _quantizer_of(version: Version, encoded: Iterable[str]) -> str | None:
    """Return the quantizer that an unfinished version is made with; None as long as it does not tell."""
    trained = [file.uri for file in version.files if storage.name_of(file.uri) == "trained.faiss"]
    try:
        digest = storage.sha256(storage.read(trained[0])) if trained else ""
    except NotFound:  # removed meanwhile
        return None
    return next((name for name in encoded if digest.startswith(name)), None)


def _embedder_of(index: str, quantizer: str) -> set[str]:
    """Return the embedder whose vectors a quantizer was trained on; nothing while that is being written."""
    try:
        return {Origin.load(storage.join(index, "encoded", quantizer, "trained.json")).embedder}
    except LookalikeError:
        return set()


def _sort_partials(quantizer: str, files: Iterable[Entry], listed: set[str] | None, found: Sorted) -> None:
    """Sort a used quantizer's partials by the parts that are listed; None: nobody knows which."""

    def stays(file: Entry) -> bool:
        name = storage.name_of(file.uri)
        return listed is None or name in listed or not name.endswith(_PART) or not found.is_old(file)

    kept, gone = split(files, stays)
    found.keep("quantizer", quantizer, kept, "in use")
    found.remove("partial", quantizer, gone)


def _listed_parts(index: str, store: str | None, kept: Sequence[Version], found: Sorted) -> set[str] | None:
    """Return the names of all parts that the store's current run, or the run of a kept version, lists."""
    made_from = [(str(lineage.get("store", "")), str(lineage.get("run", ""))) for lineage in _lineages(kept)]
    try:
        runs = [load_run_manifest(root) for root in sorted({store} if store else {root for root, _ in made_from})]
        runs += [_run_of(root, run, store) for root, run in made_from]
    except LookalikeError as error:
        ask = "" if store else "; name the store with --store"
        found.left.append(f"partials of quantizers in use in {index} are left: {error}{ask}")
        return None
    return {storage.name_of(part.name) for run in runs for part in run.parts}


def _run_of(root: str, run: str, store: str | None) -> RunManifest:
    """Load the run that a version was made from; its store may have been moved to `store`."""
    if store is not None:
        with suppress(NotFound):
            return load_run_manifest(store, run)
    return load_run_manifest(root, run)


def _lineages(versions: Iterable[Version]) -> Iterator[dict[str, object]]:
    return (version.manifest.lineage for version in versions if version.manifest)


def sort_store(store: str, current: Current, keep: int, versions: Sequence[Version], found: Sorted) -> None:
    """Sort what is below a store; `versions` are the index's that stay."""
    parts = folders(storage.join(store, "parts"))
    part_of = {_stem(file): file for files in parts.values() for file in files}
    runs = _sort_runs(store, current, keep, versions, part_of, found)
    listed = {storage.join(store, part.name) for run in runs.finished for part in run.parts}
    used = {run.embedder.fingerprint for run in runs.finished}

    def is_used(file: Entry) -> bool:
        return file.uri in listed or _stem(file) in runs.units or not file.uri.endswith(_PART)

    for name, files in parts.items():
        in_use, others = split(files, is_used)
        gone, young = split(others, found.is_old)
        found.keep("part", name, in_use, "in use")
        found.keep("part", name, young, found.young)
        found.remove("part", name, gone)
        if in_use or young:
            used.add(name)
    for name, files in folders(storage.join(store, "embedders")).items():
        found.sort("embedder", name, files, "in use" if name in used else "may be in use" if runs.waiting else "")


@dataclass(frozen=True, slots=True)
class _Run:
    """What stands of one run."""

    name: str
    plan: list[Entry]
    catalog: list[Entry]
    finished: bool

    @property
    def units(self) -> set[str]:
        """Return the names of the units that it has planned, which are those of their parts."""
        return {
            _stem(file).removeprefix("unit-") for file in self.plan if storage.name_of(file.uri).startswith("unit-")
        }

    @property
    def is_planned(self) -> bool:
        """Tell whether its plan is complete."""
        return any(file.uri.endswith("/plan/plan.json") for file in self.plan)


@dataclass(slots=True)
class _Needs:
    """What the runs that stay need."""

    finished: list[RunManifest] = field(default_factory=list)
    units: set[str] = field(default_factory=set)
    """Planned by runs that may be at work."""
    waiting: bool = False
    """Whether such a run may have something to embed yet."""


def _sort_runs(
    store: str, current: Current, keep: int, versions: Sequence[Version], part_of: dict[str, Entry], found: Sorted
) -> _Needs:
    runs = _list_runs(store)
    reasons = _reasons(store, current, keep, versions, {run.name for run in runs if run.finished})
    needs = _Needs()
    for run in runs:
        done = [part_of[unit] for unit in run.units if unit in part_of]
        files = [*run.plan, *run.catalog]
        # The plan of a long run is old; the parts that it is writing are not.
        young = "" if found.are_old(files if run.finished else [*files, *done]) else found.young
        reason = (run.finished and reasons.get(run.name)) or young
        kind = "run" if run.finished else "unfinished run"
        if not reason:
            found.remove(kind, run.name, run.plan)
            found.remove("catalog", run.name, run.catalog)
            continue
        found.keep(kind, run.name, files, reason)
        if run.finished:
            needs.finished.append(load_run_manifest(store, run.name))
        else:
            needs.units |= run.units
            needs.waiting |= not run.is_planned or len(done) < len(run.units)
    return needs


def _list_runs(store: str) -> list[_Run]:
    plans, catalogs = folders(storage.join(store, "runs")), folders(storage.join(store, "catalog"))
    return [
        _Run(name, plans.get(name, []), catalogs.get(name, []), _is_finished(store, name, plans.get(name, [])))
        for name in sorted({*plans, *catalogs})
    ]


def _is_finished(store: str, run: str, plan: Iterable[Entry]) -> bool:
    manifest = storage.join(store, "runs", run, "manifest.json")
    return any(file.uri == manifest for file in plan)


def _reasons(
    store: str, current: Current, keep: int, versions: Sequence[Version], finished: set[str]
) -> dict[str, str]:
    """Say why finished runs stay, whatever their age."""
    if current.name not in finished:
        raise NotFound(
            f"{store}: run {current.name} is current and not there, or was never finished; restore it before anything "
            "is removed"
        )
    # Told by name alone, which is unique: the store may have been moved since.
    why = {str(lineage.get("run")): "a kept version is made from it" for lineage in _lineages(versions)}
    if not finished & why.keys() and store not in {lineage.get("store") for lineage in _lineages(versions)}:
        raise UsageError(
            f"--store {store} is another store than the index is made from: it has none of the runs that the kept "
            "versions name; give that one"
        )
    why |= dict.fromkeys(islice(_line(store, current.name, finished), keep), "an ancestor of the current one")
    return why | {current.name: "current"}


def _line(store: str, run: str | None, finished: set[str]) -> Iterator[str]:
    """Yield a run and its ancestors, as far as they are there."""
    while run is not None and run in finished:
        yield run
        run = load_run_manifest(store, run).parent


def _stem(file: Entry) -> str:
    return storage.name_of(file.uri).removesuffix(_PART)
