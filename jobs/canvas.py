"""A canvas that draws at random: what the painters of `jobs.drawing_kinds` share.

Lengths are in canvas pixels, two to a pixel of the finished picture; angles are in radians, clockwise from the right;
hues are in turns.
"""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Point = tuple[float, float]

# Bright in the middle, black from the inscribed circle on (level 181 of Pillow's), fading slowly at the end.
_GLOW = Image.radial_gradient("L").point([round(255 * max(0.0, 1 - level / 181) ** 1.6) for level in range(256)])


def hsv(hue: float, saturation: float, value: float) -> Color:
    """Return a colour; the hue wraps around, the others are clipped to [0, 1]."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return round(red * 255), round(green * 255), round(blue * 255)


def shade(color: Color, factor: float) -> Color:
    """Return `color` with its brightness multiplied by `factor`."""
    red, green, blue = (min(255, round(channel * factor)) for channel in color)
    return red, green, blue


def faded(color: Color, alpha: float) -> tuple[int, int, int, int]:
    """Return `color` for drawing over what is there: 0 is invisible, 1 covers."""
    return (*color, round(alpha * 255))


def polar(center: Point, angle: float, distance: float) -> Point:
    """Return the point at `distance` from `center` in the direction `angle`."""
    return center[0] + distance * math.cos(angle), center[1] + distance * math.sin(angle)


def ramp(factor: float, start: int = 0) -> list[int]:
    """Return a lookup table that multiplies levels from `start` on, and makes those below it 0."""
    levels: list[int] = ((np.arange(256) - start).clip(0) * factor).round().clip(max=255).astype(int).tolist()
    return levels


class Canvas:
    """An empty picture, a pen that blends, and the random numbers to draw it with."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng = rng
        self.width, self.height = size
        self.unit = min(size)
        self.picture = Image.new("RGB", size)
        self.pen = ImageDraw.Draw(self.picture, "RGBA")

    def between(self, low: float, high: float) -> float:
        """Return a number from the range."""
        return low + (high - low) * float(self.rng.random())

    def count(self, low: int, high: int) -> int:
        """Return a whole number, `high` included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        """Throw a coin."""
        return bool(self.rng.random() < probability)

    def pick(self, choices: Sequence[float]) -> float:
        """Choose one."""
        return choices[int(self.rng.integers(len(choices)))]

    def place(self, top: float = 0, bottom: float = 1) -> Point:
        """Return a point anywhere across, between two fractions of the height."""
        return self.between(0, 1) * self.width, self.between(top, bottom) * self.height

    def gradient(self, colors: Sequence[Color], top: float = 0, bottom: float | None = None) -> None:
        """Fill the rows from `top` to `bottom` with colours that run into each other."""
        start = round(top)
        rows = (self.height if bottom is None else round(bottom)) - start
        column = Image.fromarray(np.array(colors, np.uint8)[:, None]).resize((1, rows), Image.Resampling.BICUBIC)
        self.picture.paste(column.resize((self.width, rows), Image.Resampling.NEAREST), (0, start))

    def disc(self, center: Point, radius: float, fill: tuple[int, ...]) -> None:
        """Draw a filled circle."""
        x, y = center
        self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill)

    def glow(self, center: Point, radius: float, color: Color, strength: float) -> None:
        """Lay a soft round light over the picture."""
        mask = glow_mask(radius).point(ramp(strength))
        self.picture.paste(color, (round(center[0] - radius), round(center[1] - radius)), mask)

    def mist(self, color: Color, puffs: int, strength: float) -> None:
        """Lay cloudy noise of about `puffs` across over the whole picture."""
        noise = self.rng.integers(0, 256, (max(2, puffs * self.height // self.width), puffs), np.uint8)
        mask = Image.fromarray(noise).resize(self.picture.size, Image.Resampling.BICUBIC)
        self.picture.paste(color, mask=mask.point(ramp(1.5 * strength, start=90)))

    def specks(self, number: int, color: Color, bottom: float, largest: float) -> None:
        """Scatter dots above `bottom`, most of them small."""
        for x, y, size in self.rng.random((number, 3)).tolist():
            self.disc((x * self.width, y * bottom), 0.8 + size**3 * largest, faded(color, 0.4 + 0.6 * size))

    def cloud(self, center: Point, size: float) -> None:
        """Draw a heap of white puffs, flat below."""
        for _ in range(7):
            x, radius = center[0] + self.between(-1, 1) * size, size * self.between(0.2, 0.45)
            box = (x - radius * 1.5, center[1] - radius * 1.5, x + radius * 1.5, center[1] + radius * 0.3)
            self.pen.ellipse(box, (255, 255, 255, 170))

    def ridge(self, base: float, swing: float, color: Color) -> None:
        """Draw rolling ground down to the lower edge."""
        waves = [(self.between(0, 7), self.between(3, 6.6) * 2**n / self.width, swing / 2**n) for n in range(3)]
        columns = [self.width * n / 48 for n in range(49)]
        line = [(x, base + sum(high * math.sin(phase + pace * x) for phase, pace, high in waves)) for x in columns]
        self.pen.polygon([*line, (self.width, self.height), (0, self.height)], color)

    def spots(self, most: int, low: float, high: float) -> list[tuple[Point, float]]:
        """Choose places and radii for up to `most` subjects that hardly overlap, small ones first.

        A single one gets a radius of `low` to `high` units, more of them get less.
        """
        number = self.count(1, most)
        scale = self.unit * (1.4 / (0.4 + number)) ** 0.5
        found: list[tuple[Point, float]] = []
        for _ in range(30):
            radius = scale * self.between(low, high)
            place = (self.between(0.12, 0.88) * self.width, self.between(0.15, 0.85) * self.height)
            if all(math.dist(place, other) > 0.85 * (radius + its) for other, its in found):
                found.append((place, radius))
            if len(found) == number:
                break
        return sorted(found, key=lambda spot: spot[1])


def glow_mask(radius: float) -> Image.Image:
    """Return a round light as a mask of twice `radius` on a side."""
    side = max(1, round(2 * radius))
    return _GLOW.resize((side, side), Image.Resampling.BILINEAR)
