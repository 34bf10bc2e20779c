"""What a person watching a job sees: a bar, or now and then a line, and tables."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

_LINE_EVERY = 30.0  # seconds between lines where the output is no terminal


class Bar:
    """A `pipelines.runner.Progress`: a live bar on a terminal, a plain line every 30 seconds elsewhere."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._stage = ""
        self._total = 0
        self._unit = ""
        self._started = self._last = 0.0

    def start(self, stage: str, total: int, unit: str) -> None:
        """Begin a stage of `total` items."""
        self._stage, self._total, self._unit = stage, total, unit
        self._started = self._last = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm  # which whoever prints tables alone does without

            self._bar = tqdm(total=total, desc=stage, unit=unit, smoothing=0.1, dynamic_ncols=True)

    def update(self, done: int, rejected: int) -> None:
        """Show how far the stage has come."""
        if self._bar is not None:
            if rejected:
                self._bar.set_postfix(rejected=rejected, refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._last >= _LINE_EVERY:
            self._last = time.monotonic()
            rate = done / (self._last - self._started)
            left = f", {(self._total - done) / rate:.0f} s left" if rate else ""
            print(
                f"{self._stage}: {done:,} of {self._total:,} {self._unit}, {rate:.1f}/s, {rejected:,} rejected{left}",
                file=sys.stderr,
                flush=True,
            )

    def finish(self) -> None:
        """End the stage."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def table(rows: Iterable[Sequence[object]], headers: Sequence[str] = ()) -> str:
    """Lay out rows in columns: numbers to the right, text to the left."""
    body = [[_cell(value) for value in row] for row in rows]
    lines = ([list(headers)] if headers else []) + body
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    if headers:
        lines.insert(1, ["─" * width for width in widths])
    rights = [bool(body) and all(_is_number(line[column]) for line in body) for column in range(len(widths))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, rights, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _is_number(cell: str) -> bool:
    return cell == "–" or cell.replace(",", "").replace(".", "").replace("-", "").isdigit()
