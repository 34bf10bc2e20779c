"""Bring a store and its index up to date with a bucket: embed, build, measure, pass the gate, publish.

What did not change is not touched. A version that is worse than the current one is kept beside it, unpublished.
"""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from pipelines import embed
from pipelines.drift import choose_quantizer
from pipelines.embed import EmbedRequest
from pipelines.gate import Tolerance, failed, judge, recall_check, record, refusal
from pipelines.index import build_version, is_made_of, publish, train_and_build
from pipelines.lease import Guard, leased
from pipelines.lineage import Origin
from pipelines.report import Report
from pipelines.runner import Runner
from pipelines.training import IndexRequest
from serving.errors import GateFailed, TargetMissed, UsageError
from serving.manifest import IndexManifest, RunManifest, load_index_manifest, read_current

JOB = "reindex"


@dataclass(frozen=True, slots=True)
class ReindexRequest:
    """What to bring up to date, and how much worse the index may become by it."""

    embed: EmbedRequest
    index: IndexRequest
    tolerance: Tolerance = field(default_factory=Tolerance)
    max_drift: float = 0.1
    """Share by which the distortion of new rows may be above that of those trained on."""
    force: bool = False
    """Publish what fails the gate, too."""
    wait: float = 0.0
    """Seconds to wait for another run to end."""

    def __post_init__(self) -> None:
        if self.embed.store != self.index.store:
            raise UsageError(f"{self.embed.store} is to be filled and {self.index.store} to be indexed; name one store")
        if self.index.index == self.index.store:
            raise UsageError(f"--index is the store {self.index.store}; name another place")
        if not 0 <= self.max_drift < math.inf:
            raise UsageError(f"--max-drift is {self.max_drift:g}; take 0 or more")


def run(request: ReindexRequest, runner: Runner, report: Report) -> None:
    """Do all that is to be done, and note it in `report`.

    Raises `LeaseHeld` when another run is at work, `LeaseLost` when one took over, `GateFailed` when the version is
    not good enough: `CURRENT` stays then.
    """
    with ExitStack() as held:
        with report.stage("lease"):
            until = time.monotonic() + request.wait
            store = held.enter_context(leased(request.index.store, JOB, wait=request.wait))
            left = max(0.0, until - time.monotonic())
            index = held.enter_context(leased(request.index.index, JOB, wait=left))
        with report.stage("embed"):
            report.embedded = embed.run(request.embed, runner, store.check)
        index.check()  # before the work, too
        _bring_up_to_date(request, report.embedded.manifest, runner, report, index.check)


def _bring_up_to_date(
    request: ReindexRequest, source: RunManifest, runner: Runner, report: Report, guard: Guard
) -> None:
    pointer = read_current(request.index.index, "version")
    current = load_index_manifest(request.index.index, pointer[0]) if pointer else None
    report.parent = current.version if current else None
    if current is not None and is_made_of(current, source, request.index):
        report.candidate, report.why = current, "nothing changed"
        return
    with report.stage("build"):
        candidate = report.candidate = _build(request, source, current, runner)
    if current is not None and candidate.version == current.version:
        report.why = "what changed makes no other version"
        return
    with report.stage("gate"):
        report.checks = judge(request.index.index, candidate, current, request.tolerance, request.index.target_recall)
        report.forced = bool(failed(report.checks)) and request.force
    if failed(report.checks) and not request.force:
        raise refusal(candidate.version, report.checks)
    with report.stage("publish"):
        guard()  # before anything says that it was published
        record(request.index.index, candidate.version, report.parent, report.checks, report.forced)
        publish(request.index.index, candidate.version, pointer[1] if pointer else None, guard)
    report.published = True
    report.why = "the gate was overruled" if report.forced else "it passed the gate"


def _build(
    request: ReindexRequest, source: RunManifest, current: IndexManifest | None, runner: Runner
) -> IndexManifest:
    """Build and measure with the quantizer at hand, or with a new one where that does not do."""
    choice = choose_quantizer(request.index, source, current, request.max_drift)
    origin = choice.origin
    if choice.trained is not None:
        try:
            candidate = build_version(request.index, source, choice.trained, runner, origin)
        except TargetMissed as error:
            lost = f"used again, it missed the target: {error}"
        else:
            check = recall_check(candidate, current, request.tolerance.max_recall_drop, request.index.target_recall)
            if check.passed:
                return candidate
            lost = f"used again, it gave {check}"
        origin = Origin(current, why=lost, drift=origin.drift)
    try:
        return train_and_build(request.index, source, runner, origin)
    except TargetMissed as error:
        raise GateFailed(str(error)) from error
