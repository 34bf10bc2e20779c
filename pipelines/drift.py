"""Decide whether the quantizer of the current version serves the next one, too, or is to be trained anew."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipelines.lineage import Origin
from pipelines.training import TRAINED_FOR, IndexRequest, TrainedDocument, load_trained
from serving.errors import NotFound, UsageError
from serving.manifest import IndexManifest, RunManifest, load_run_manifest
from transforms.catalog import read_catalog
from transforms.comparing import fresh
from transforms.designing import Design, designs
from transforms.encoding import load_quantizer
from transforms.sampling import LiveRows, sample_stream
from transforms.schema import CatalogRow

_SALT = 0x6472_6966_74
_SAMPLE = 1000
_ENOUGH = 50
"""New rows below which their mean distortion says little: of so many it is known to some 5 %."""
_SLACK = 0.1
"""Share of its rows by which a collection may be past the size where another shape would be chosen.

One that hovers about that size is not to be trained for anew every night.
"""


@dataclass(frozen=True, slots=True)
class Choice:
    """The quantizer to use again, or None to train one; and what the lineage is to say of that."""

    trained: TrainedDocument | None
    origin: Origin


def choose_quantizer(request: IndexRequest, run: RunManifest, parent: IndexManifest | None, max_drift: float) -> Choice:
    """Take the quantizer of the version `parent` again, unless it does not fit or what is new drifted from it.

    It drifted when the distortion of rows that came since it was trained is more than `max_drift`, as a share, above
    that of the rows it was measured on.
    """
    if parent is None:
        return Choice(None, Origin(why="no version was published before"))
    try:
        trained = load_trained(request.index, parent.quantizer)
    except NotFound:
        return Choice(None, Origin(parent, why="what the last one was trained for is not there any more"))
    unfit = _unfit(request, run, trained)
    if unfit:
        return Choice(None, Origin(parent, why=unfit))
    drift = _drift(request, run, parent, trained)
    if drift["new"] >= _ENOUGH and drift["distortion_new"] > drift["distortion_trained"] * (1 + max_drift):
        why = (
            f"the distortion of {drift['new']:,} new rows is {drift['distortion_new']:g}, more than {max_drift:.0%} "
            f"above the {drift['distortion_trained']:g} it was trained to"
        )
        return Choice(None, Origin(parent, why=why, drift=drift))
    return Choice(trained, Origin(parent, reused=True, why="it fits", drift=drift))


def _unfit(request: IndexRequest, run: RunManifest, trained: TrainedDocument) -> str | None:
    """Say what a quantizer was trained for that is not asked for now."""
    if trained.embedder != run.embedder.fingerprint:
        return "the embedder is another"
    others = [name for name in TRAINED_FOR if getattr(trained, name) != getattr(request, name)]
    if others:
        return f"it was trained with another --{others[0].replace('_', '-')}"
    if not _still_chosen(request, run, trained.design):
        return f"{run.live:,} vectors take another shape than the {trained.rows:,} it was trained for"
    return None


def _still_chosen(request: IndexRequest, run: RunManifest, design: Design) -> bool:
    for rows in (run.live, round(run.live * (1 - _SLACK)), round(run.live * (1 + _SLACK))):
        with suppress(UsageError):  # fewer rows may be too few for the lists asked for
            if any(_alike(design, other) for other in designs(max(1, rows), run.dim, request.wishes)):
                return True
    return False


def _alike(one: Design, other: Design) -> bool:
    if "custom" in (one.kind, other.kind):  # whose own key says the rest
        return one.factory == other.factory
    return (one.kind, one.dim, one.nlist) == (other.kind, other.dim, other.nlist)


def _drift(request: IndexRequest, run: RunManifest, parent: IndexManifest, trained: TrainedDocument) -> dict[str, Any]:
    """Return the distortion that a quantizer was trained to, that of a sample of newer rows, and the sample's size."""
    told = trained.distortion if trained.distortion is not None else parent.measured.get("distortion", 0.0)
    if not told:  # the vectors themselves are kept, or nobody measured
        return {"new": 0}
    new = _new_rows(request, run, parent, trained)
    found = load_quantizer(request.index, trained.quantizer).distortion(new.vectors())
    return {"new": len(new), "distortion_trained": round(told, 5), "distortion_new": round(found, 5)}


def _new_rows(request: IndexRequest, run: RunManifest, parent: IndexManifest, trained: TrainedDocument) -> LiveRows:
    """Sample the rows that came since a quantizer was trained; of all rows, where nobody can tell any more."""
    for earlier in (trained.run, str(parent.lineage.get("run"))):
        with suppress(NotFound):  # it was cleaned up
            before = read_catalog(request.store, load_run_manifest(request.store, earlier))
            return _sample(request.store, run, before)
    return _sample(request.store, run, ())


def _sample(store: str, run: RunManifest, before: Iterable[CatalogRow]) -> LiveRows:
    return sample_stream(store, run, fresh(read_catalog(store, run), before), _SAMPLE, _SALT)
