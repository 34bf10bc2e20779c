"""The gate: what a new version must measure up to before it is published."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from serving import storage
from serving.errors import GateFailed, NotFound, UsageError
from serving.index import Index
from serving.manifest import Document, IndexManifest, now
from transforms.planting import share_found

PLANTED = "planted queries"

_PLANTED_LEAST = 0.9
_PLANTED_DROP = 0.05
_FEW = 2
"""Queries that may go the other way without meaning anything, however few there are."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """By how much a version may be worse than the current one."""

    max_shrink: float = 0.2
    max_recall_drop: float = 0.01
    max_precision_drop: float = 0.02

    def __post_init__(self) -> None:
        for name in ("max_shrink", "max_recall_drop", "max_precision_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name):g}; take 0 to 1")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was compared: the candidate passes when it is not below the limit."""

    name: str
    candidate: float
    current: float | None
    limit: float
    passed: bool

    def __str__(self) -> str:
        beside = "" if self.current is None else f", the current version's is {self.current:g}"
        return f"{self.name} {self.candidate:g} where {self.limit:g} is the least{beside}"


@dataclass(frozen=True, slots=True)
class GateDocument(Document):
    """What the gate said of a version, `versions/<version>/gate.json`; written once, just before it is published."""

    version: str
    parent: str | None
    checks: tuple[Check, ...]
    forced: bool
    """Whether it was published though it failed."""
    created: str

    @classmethod
    def find(cls, index: str, version: str) -> "GateDocument | None":
        """Load a version's document; None for one that was published without a gate."""
        try:
            return cls.load(_uri(index, version))
        except NotFound:
            return None


def judge(
    index: str,
    candidate: IndexManifest,
    current: IndexManifest | None,
    tolerance: Tolerance,
    target_recall: float | None = None,
) -> list[Check]:
    """Compare a finished version with the one that is current, if any, and with the recall that was asked for."""
    checks = [recall_check(candidate, current, tolerance.max_recall_drop, target_recall)]
    if current is not None:
        checks.append(_check("rows", candidate.rows, current.rows, current.rows * (1 - tolerance.max_shrink)))
    by_label = None if current is None else _precision_check(candidate, current, tolerance.max_precision_drop)
    checks.append(by_label or _planted_check(index, candidate, current))
    return checks


def recall_check(
    candidate: IndexManifest, current: IndexManifest | None, max_drop: float, target_recall: float | None
) -> Check:
    """Compare recall@10, against the reference that the candidate was tuned to.

    The settings are the cheapest that reach the target that was looked for: how far above it they come out is chance,
    and no more than the target is held against a candidate.
    """
    name = "recall_at_10_raw" if candidate.parameters.get("recall_against") == "raw" else "recall_at_10"
    before = None if current is None else current.measured.get(name)
    least = 0.0 if target_recall is None else target_recall
    if before is not None:
        least = max(least, min(before, float(candidate.parameters["target_recall"])) - max_drop)
    return _check("recall@10", candidate.measured[name], before, least)


def record(index: str, version: str, parent: str | None, checks: Sequence[Check], forced: bool) -> None:
    """Write what the gate said of a version that is about to be published."""
    document = GateDocument(version, parent, tuple(checks), forced, now())
    storage.create(_uri(index, version), document.to_json())


def failed(checks: Iterable[Check]) -> list[Check]:
    """Return the checks that failed."""
    return [check for check in checks if not check.passed]


def refusal(version: str, checks: Iterable[Check]) -> GateFailed:
    """Return the error that names what failed."""
    said = "; ".join(map(str, failed(checks)))
    return GateFailed(
        f"version {version} did not pass the gate and was not published: {said}. CURRENT stays; look into it, then run "
        f"again, with --force to publish all the same (or `lookalike publish`)"
    )


def _precision_check(candidate: IndexManifest, current: IndexManifest, max_drop: float) -> Check | None:
    found, before = candidate.measured["precision_at_1"], current.measured.get("precision_at_1")
    if found is None or before is None:
        return None
    queries = min(candidate.measured["queries"], current.measured["queries"])
    return _check("P@1 by label", found, before, before - max(max_drop, _FEW / max(1, queries)))


def _planted_check(index: str, candidate: IndexManifest, current: IndexManifest | None) -> Check:
    before = None
    document = None if current is None else GateDocument.find(index, current.version)
    for check in document.checks if document else ():
        if check.name == PLANTED:
            before = check.candidate
    mode = "mmap" if storage.scheme_of(index) == "file" else "memory"
    found = round(share_found(Index(index, candidate, mode=mode)), 4)
    least = _PLANTED_LEAST if before is None else max(_PLANTED_LEAST, before - _PLANTED_DROP)
    return _check(PLANTED, found, before, least)


def _check(name: str, candidate: float, current: float | None, limit: float) -> Check:
    return Check(name, candidate, current, round(limit, 4), candidate >= limit - 1e-9)


def _uri(index: str, version: str) -> str:
    return storage.join(index, "versions", version, "gate.json")
