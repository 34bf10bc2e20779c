"""Where an index version comes from: the version before it, its run, its quantizer, and what changed in between."""

from dataclasses import asdict, dataclass, field
from typing import Any

from serving.errors import NotFound
from serving.manifest import IndexManifest, RunManifest, load_run_manifest
from transforms.catalog import read_catalog
from transforms.comparing import Changes, compare


@dataclass(frozen=True, slots=True)
class Origin:
    """What a version follows, and how it came by its quantizer."""

    parent: IndexManifest | None = None
    """The version that was current when this one was begun."""
    reused: bool = False
    """Whether the quantizer is an earlier version's."""
    why: str = "trained for this version"
    drift: dict[str, Any] = field(default_factory=dict)
    """What was measured to decide on the quantizer."""


def lineage(store: str, run: RunManifest, origin: Origin) -> dict[str, Any]:
    """Return what a version's manifest says of its origin; `changes` are None where the parent's run is gone."""
    parent = origin.parent
    changes = None if parent is None else _changes(store, run, parent)
    return {
        "store": store,
        "run": run.run_id,
        "images": list(run.images),
        "parent": parent.version if parent else None,
        "parent_run": parent.lineage.get("run") if parent else None,
        "embedder": run.embedder.fingerprint,
        "quantizer": {"reused": origin.reused, "why": origin.why, **origin.drift},
        "changes": asdict(changes) if changes else None,
    }


def _changes(store: str, run: RunManifest, parent: IndexManifest) -> Changes | None:
    """Compare two runs of a store; None where it does not hold the earlier one (any more)."""
    try:
        before = load_run_manifest(store, str(parent.lineage.get("run")))
        same = before.embedder.fingerprint == run.embedder.fingerprint
        return compare(read_catalog(store, run), read_catalog(store, before), same)
    except NotFound:
        return None
