"""Recall against latency, one line a system, as a PNG: drawn by Pillow, which the extra `images` brings."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Curve = list[tuple[float, float]]
"""Microseconds and recall."""

_WIDTH, _HEIGHT = 1400, 860
_LEFT, _TOP, _RIGHT, _BOTTOM = 110, 80, 320, 100
"""Margins; the legend stands in the right one."""
_COLOURS = (
    "#d1242f",
    "#0969da",
    "#1a7f37",
    "#8250df",
    "#bf8700",
    "#0b7285",
    "#bf3989",
    "#57606a",
    "#7f4f24",
    "#24292f",
)
_INK, _GRID = "#24292f", "#d0d7de"
_LEAST = 0.5
"""Recall at the foot of the plot, unless nothing reaches it."""


class Axes:
    """Where a latency and a recall lie in the picture: the first on a logarithmic scale."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        points = [point for curve in curves for point in curve]
        self.fastest = min((us for us, _ in points), default=10.0) / 1.15
        self.slowest = max((us for us, _ in points), default=1000.0) * 1.15
        best = max((share for _, share in points), default=1.0)
        self.least = _LEAST if best > _LEAST else 0.0

    def place(self, us: float, share: float) -> tuple[float, float]:
        """Return pixels from the left and from the top."""
        along = math.log(us / self.fastest) / math.log(self.slowest / self.fastest)
        up = (share - self.least) / (1 - self.least)
        return _LEFT + along * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    def latencies(self) -> Iterator[float]:
        """Yield the marks of the axis: 1, 2, 3 and 5 times powers of ten."""
        for power in range(math.floor(math.log10(self.fastest)), math.ceil(math.log10(self.slowest)) + 1):
            yield from (mark for mark in (10.0**power * step for step in (1, 2, 3, 5)) if self._shows(mark))

    def recalls(self) -> list[float]:
        """Return the marks of the other axis."""
        steps = 10
        return [self.least + (1 - self.least) * step / steps for step in range(steps + 1)]

    def _shows(self, mark: float) -> bool:
        return self.fastest <= mark <= self.slowest


def draw(curves: Mapping[str, Curve], title: str, target: float, file: Path) -> None:
    """Write the picture; `target` is a dashed line."""
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen, axes = ImageDraw.Draw(picture), Axes(list(curves.values()))
    _frame(pen, axes, title, target)
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        shown = [axes.place(us, share) for us, share in curve if share >= axes.least]
        pen.line(shown, colour, width=3)
        for x, y in shown:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        x, y = _WIDTH - _RIGHT + 30, _TOP + 10 + 34 * number
        pen.line((x, y, x + 36, y), colour, width=4)
        pen.text((x + 48, y), name, _INK, _font(19), anchor="lm")
    picture.save(file)


def _frame(pen: ImageDraw.ImageDraw, axes: Axes, title: str, target: float) -> None:
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    for mark in axes.latencies():
        x, _ = axes.place(mark, axes.least)
        pen.line((x, top, x, bottom), _GRID)
        pen.text((x, bottom + 12), f"{mark:,.10g}", _INK, _font(18), anchor="mt")
    for share in axes.recalls():
        _, y = axes.place(axes.fastest, share)
        pen.line((left, y, right, y), _GRID)
        pen.text((left - 12, y), f"{share:.2f}", _INK, _font(18), anchor="rm")
    _, y = axes.place(axes.fastest, target)
    for x in range(left, right, 16):
        pen.line((x, y, x + 8, y), _INK, width=2)
    pen.rectangle((left, top, right, bottom), outline=_INK)
    pen.text((left, top - 24), title, _INK, _font(24), anchor="ls")
    pen.text(((left + right) / 2, bottom + 48), "microseconds a query, p50, one thread", _INK, _font(20), anchor="mt")
    pen.text((left - 12, top - 24), "recall@10", _INK, _font(18), anchor="rs")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
