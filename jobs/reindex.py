"""Bring an index up to date with a bucket, and publish it if it measures up: the one command for every night.

    lookalike reindex --images gs://bucket/photos --store gs://bucket/store --index gs://bucket/index --report run.json

What is new or changed is embedded, what did not change is not touched. The new version is measured and compared with
the current one; one that is worse stays beside it, unpublished. One run at a time works on a store or an index.

exit codes:
  0    published, or nothing to do
  1    failed; what was finished is kept, the next run goes on there
  2    wrong usage
  3    built, but refused at the gate: what was published before stays
  4    another run is at work on this store or index
  130  interrupted by Ctrl-C
  143  ended by SIGTERM
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs import cli, console, embed, index
from jobs.options import option, parse
from jobs.writing import write_text
from pipelines.gate import Tolerance
from pipelines.reindex import ReindexRequest, run
from pipelines.report import Report, Timed
from pipelines.runner import Runner
from serving import storage
from serving.errors import LookalikeError, UsageError

_REPORT = "--report"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(embed.Options, index.Options):
    """Options of `lookalike reindex`: those of `embed` and `index`, and what the gate lets through."""

    max_shrink: float = option("refuse a version that lost a larger share of its images", Tolerance().max_shrink)
    max_recall_drop: float = option("refuse one whose recall@10 is lower by more", Tolerance().max_recall_drop)
    max_precision_drop: float = option("refuse one whose P@1 by label is lower by more", Tolerance().max_precision_drop)
    max_drift: float = option("train anew when the distortion of new vectors is higher by a larger share", 0.1)
    force: bool = option("publish what the gate refuses, too", False)
    report: str | None = option("write what was done, as JSON, to this file or object", None, metavar="FILE")


def main(argv: Sequence[str]) -> int:
    """Run the job."""
    options, beam_arguments = parse(Options, argv, "reindex", __doc__ or "", beam=True)
    _check_report(options.report)
    report = Report(storage.normalize(options.store), storage.normalize(options.index))
    try:
        _run(options, beam_arguments, report)
    except BaseException as error:
        report.end(error)
        try:
            _write(options.report, report)
        except LookalikeError as unwritten:
            print(f"lookalike reindex: {unwritten}", file=sys.stderr)
        raise
    report.end()
    try:
        _write(options.report, report)
    finally:
        print(summary(report))
    return 0


def _run(options: Options, beam_arguments: Sequence[str], report: Report) -> None:
    runner = Runner(beam_arguments, Timed(console.Bar(), report))
    asked = index.request(options)
    with report.stage("prepare"):
        images = embed.request(options, runner)
    tolerance = Tolerance(options.max_shrink, options.max_recall_drop, options.max_precision_drop)
    run(ReindexRequest(images, asked, tolerance, options.max_drift, options.force, options.wait), runner, report)


def summary(report: Report) -> str:
    """Say what a run did."""
    embedded, version = report.embedded, report.candidate
    assert embedded is not None  # a run that got to its end has both
    assert version is not None
    manifest = embedded.manifest
    if not report.published and embedded.changed:
        return f"run {manifest.run_id} makes no other version than {version.version}, which is current"
    if not report.published:
        return (
            f"nothing to do: all {manifest.rows:,} images are as run {manifest.run_id} left them, and version "
            f"{version.version} is made of them"
        )
    counts = manifest.accounting
    quantizer, changes = version.lineage["quantizer"], version.lineage["changes"] or {}
    rows: list[tuple[str, object]] = [
        ("run", manifest.run_id),
        ("listed", counts.listed),
        ("embedded", counts.embedded if embedded.changed else 0),
        ("rejected", counts.rejects if embedded.changed else 0),
        ("version", version.version),
        ("images", version.rows),
        *((name, count) for name, count in changes.items() if count and name != "rejected"),
        ("quantizer", f"{'used again' if quantizer['reused'] else 'trained'}: {quantizer['why']}"),
        *((check.name, _verdict(check.candidate, check.current, check.passed)) for check in report.checks),
        ("published", f"in place of {report.parent}" if report.parent else "as the first version"),
        ("seconds", f"{sum(report.seconds.values()):.1f}"),
    ]
    lines = [console.table(rows)]
    if report.forced:
        lines.append("the gate was overruled by --force")
    if version.embedder.untrained:
        lines.append(embed.UNTRAINED)
    return "\n".join(lines)


def _verdict(found: float, before: float | None, passed: bool) -> str:
    said = f"{found:,g}" if before is None else f"{found:,g}, was {before:,g}"
    return said if passed else f"{said}: too low"


def _check_report(where: str | None) -> None:
    """Refuse a report that could not be written, before the work rather than after it."""
    if where is None:
        return
    uri = storage.normalize(where)
    if storage.scheme_of(uri) == "file" and not Path(uri).parent.is_dir():
        raise UsageError(f"{_REPORT} {where} cannot be written: the folder {Path(uri).parent} does not exist; make it")


def _write(where: str | None, report: Report) -> None:
    if where is not None:
        write_text(where, report.to_json(), _REPORT)


if __name__ == "__main__":
    sys.exit(cli.main(["reindex", *sys.argv[1:]]))
