"""The kinds of picture in the demo's collection: one painter each, over an empty canvas.

All that varies within a kind (colours, places, sizes, numbers, weather) comes from the canvas's random numbers.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from jobs.canvas import Canvas, Color, Point, faded, glow_mask, hsv, polar, ramp, shade

WHITE = (255, 255, 255)


def balloon(c: Canvas) -> None:
    """Paint hot-air balloons in a light sky."""
    hue = c.between(0.5, 0.66) if c.chance(0.7) else c.between(0.95, 1.12)
    zenith = hsv(hue, c.between(0.4, 0.8), c.between(0.6, 0.95))
    c.gradient([zenith, hsv(hue + 0.03, 0.25, 0.95), hsv(hue + 0.1, 0.12, 1)])
    for _ in range(c.count(1, 5)):
        c.cloud(c.place(0.2, 1), c.unit * c.between(0.1, 0.3))
    if c.chance(0.5):
        c.ridge(c.height * c.between(0.85, 0.95), c.unit * 0.03, hsv(c.between(0.2, 0.4), 0.45, c.between(0.35, 0.6)))
    for center, radius in c.spots(6, 0.18, 0.3):
        _one_balloon(c, center, radius)


def _one_balloon(c: Canvas, center: Point, radius: float) -> None:
    x, y = center
    gores = 2 * c.count(3, 6)
    colors = [hsv(c.between(0, 1), c.between(0.6, 1), c.between(0.75, 1)) for _ in range(c.count(2, 4))]
    mouth, basket = y + 1.35 * radius, y + 1.75 * radius
    for side in (-0.16, 0.16):
        c.pen.line((x + side * radius * 1.6, mouth, x + side * radius, basket), (70, 50, 40), 2)
    c.pen.rectangle((x - 0.17 * radius, basket, x + 0.17 * radius, basket + 0.24 * radius), (120, 78, 40))
    # Half the envelope's width from crown to mouth; the seams stand closer to the sides, as on a round body.
    outline = [
        (y + radius * (2.35 * t - 1), radius * math.sin(math.pi * t**0.8 * 0.93) ** 0.75)
        for t in (n / 20 for n in range(21))
    ]
    seams = [math.sin(math.pi * (n / gores - 0.5)) for n in range(gores + 1)]
    for n in range(gores):
        near = [(x + seams[n] * half, height) for height, half in outline]
        far = [(x + seams[n + 1] * half, height) for height, half in reversed(outline)]
        c.pen.polygon([*near, *far], shade(colors[n % len(colors)], 1.05 - 0.2 * abs(seams[n] + seams[n + 1] + 0.5)))
    if c.chance(0.4):
        top, half = outline[8]
        c.pen.rectangle((x - half, top, x + half, top + radius * 0.22), faded(shade(colors[0], 0.6), 0.8))


def citrus(c: Canvas) -> None:
    """Paint slices of lemon, lime, orange and grapefruit on a table."""
    hue, pale = c.between(0, 1), c.between(0.05, 0.6)
    c.gradient([hsv(hue, pale, c.between(0.75, 1)), hsv(hue + 0.05, pale, c.between(0.5, 1))])
    if c.chance(0.4):
        plank = c.unit * c.between(0.12, 0.3)
        for n in range(int(c.width / plank) + 1):
            c.pen.rectangle((n * plank, 0, (n + 1) * plank, c.height), faded(hsv(hue, 0.5, 0.3), c.between(0.02, 0.2)))
            c.pen.line((n * plank, 0, n * plank, c.height), faded(hsv(hue, 0.5, 0.2), 0.5), 3)
    fruits = [c.pick((0.01, 0.07, 0.1, 0.15, 0.26)) for _ in range(2)]
    for center, radius in c.spots(9, 0.22, 0.4):
        _one_slice(c, center, radius, c.pick(fruits))


def _one_slice(c: Canvas, center: Point, radius: float, hue: float) -> None:
    value, segments, turn = 0.95 if hue < 0.2 else 0.78, c.count(8, 11), c.between(0, 1)
    c.disc((center[0] + radius * 0.06, center[1] + radius * 0.09), radius * 1.02, (0, 0, 0, 70))
    c.disc(center, radius, hsv(max(hue, 0.08), 0.9, value * 0.95))
    c.disc(center, radius * 0.92, hsv(hue, 0.12, 0.98))
    step = 2 * math.pi / segments
    for n in range(segments):
        start = step * (n + turn)
        arc = [polar(center, start + step * t, radius * 0.84) for t in (0.12, 0.3, 0.5, 0.7, 0.88)]
        tip = polar(center, start + step / 2, radius * 0.12)
        c.pen.polygon([tip, *arc], hsv(hue, c.between(0.68, 0.85), value * c.between(0.95, 1.05)))
        for t in (0.3, 0.5, 0.7):
            ends = [polar(center, start + step * t, radius * reach) for reach in (0.4, 0.75)]
            c.pen.line(ends, faded(WHITE, 0.3), 2)


def city(c: Canvas) -> None:
    """Paint a skyline at night, half of them across the water."""
    hue = c.between(0.55, 0.85)
    shore = round(c.height * (c.between(0.72, 0.85) if c.chance(0.5) else 1))
    dusk = hsv(hue + c.between(0, 0.25), c.between(0.5, 0.8), c.between(0.4, 0.85))
    c.gradient([hsv(hue, 0.8, c.between(0.1, 0.25)), hsv(hue + 0.04, 0.7, c.between(0.25, 0.45)), dusk])
    c.specks(c.count(10, 70), (255, 255, 240), shore * 0.6, 1.5)
    if c.chance(0.5):
        moon, radius = c.place(0.1, 0.3), c.unit * c.between(0.04, 0.1)
        c.glow(moon, radius * 4, (255, 250, 220), 0.6)
        c.disc(moon, radius, (250, 245, 220))
    lamp, lit, high = c.between(0.08, 0.17), c.between(0.2, 0.55), c.height * c.between(0.25, 0.55)
    for far, near in ((0.7, 0.45), (0.0, 1.0)):  # two rows of towers, the farther one hazy and taller
        wall, x = hsv(hue + 0.02, 0.55, 0.12 + 0.25 * far), -c.between(0, 30)
        while x < c.width:
            wide = c.unit * c.between(0.08, 0.18)
            _tower(c, (x, shore), wide, high * c.between(0.5, 1.4) * (1 + 0.4 * far), wall, hsv(lamp, 0.5, near), lit)
            x += wide + c.unit * c.between(0, 0.03) * (1 + far)
    if shore < c.height:
        _reflect(c, shore, hsv(hue, 0.8, 0.2))


def _tower(c: Canvas, foot: Point, wide: float, high: float, wall: Color, lamp: Color, lit: float) -> None:
    x, roof, pitch = foot[0], foot[1] - high, c.unit * c.between(0.026, 0.042)
    c.pen.rectangle((x, roof, x + wide, foot[1]), wall)
    if c.chance(0.3):
        c.pen.polygon([(x, roof), (x + wide / 2, roof - wide * c.between(0.3, 1.2)), (x + wide, roof)], wall)
    rows, columns = max(1, int(high / pitch - 1)), max(1, int(wide / pitch - 0.5))
    margin = (wide - columns * pitch) / 2 + pitch * 0.25
    for row, column in np.argwhere(c.rng.random((rows, columns)) < lit).tolist():
        left, top = x + margin + column * pitch, roof + (row + 0.6) * pitch
        c.pen.rectangle((left, top, left + pitch * 0.45, top + pitch * 0.55), lamp)


def _reflect(c: Canvas, shore: int, water: Color) -> None:
    deep = c.height - shore
    above = c.picture.crop((0, shore - 2 * deep, c.width, shore)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    c.picture.paste(above.resize((c.width, deep)).point(ramp(0.7) * 3), (0, shore))
    for y in range(shore, c.height, 10):
        c.pen.line((0, y, c.width, y), faded(water, 0.4), 4)


def fish(c: Canvas) -> None:
    """Paint striped fish in clear water."""
    hue, bright = c.between(0.45, 0.62), c.between(0.65, 1)
    c.gradient([hsv(hue, 0.4, bright), hsv(hue + 0.03, 0.75, bright * 0.8), hsv(hue + 0.06, 0.85, bright * 0.5)])
    for _ in range(c.count(0, 5)):
        x, lean = c.between(0, 1.2) * c.width, c.between(0.1, 0.4) * c.width
        beam = [(x, 0), (x + 40, 0), (x + 90 - lean, c.height), (x - lean, c.height)]
        c.pen.polygon(beam, faded(WHITE, 0.08))
    for _ in range(c.count(0, 9)):
        x, tall, phase = c.between(0, 1) * c.width, c.unit * c.between(0.1, 0.4), c.between(0, 6)
        weed = [(x + math.sin(phase + n) * c.unit * 0.02, c.height - tall * n / 9) for n in range(10)]
        c.pen.line(weed, hsv(c.between(0.25, 0.42), 0.7, c.between(0.25, 0.5)), c.count(6, 12), "curve")
    body, stripe = c.between(0, 1), c.between(0, 1)
    for center, radius in c.spots(7, 0.24, 0.4):
        main = hsv(body + c.between(-0.05, 0.05), c.between(0.6, 1), c.between(0.8, 1))
        _one_fish(c, center, radius, main, hsv(stripe, c.between(0, 0.8), c.pick((0.15, 0.98))))


def _one_fish(c: Canvas, center: Point, radius: float, main: Color, stripe: Color) -> None:
    way, plump, stripes = c.pick((-1, 1)), c.between(0.4, 0.75), c.count(2, 5)

    def at(ahead: float, below: float) -> Point:
        return center[0] + way * radius * ahead, center[1] + radius * below

    def flank(start: float, end: float) -> list[Point]:
        steps = [start + (end - start) * n / 12 for n in range(13)]  # 0 is the nose, 1 the root of the tail
        half = [plump * math.sin(math.pi * (0.04 + 0.92 * t) ** 0.8) ** 0.8 for t in steps]
        outline = list(zip(steps, half, strict=True))
        return [*(at(1 - 2 * t, -h) for t, h in outline), *(at(1 - 2 * t, h) for t, h in reversed(outline))]

    spread = plump * c.between(0.6, 0.9)
    c.pen.polygon([at(-0.9, 0), at(-1.4, -spread), at(-1.2, 0), at(-1.4, spread)], stripe)
    c.pen.polygon([at(0.3, 0), at(-0.5, -plump * 1.35), at(-0.7, 0)], shade(main, 0.75))
    c.pen.polygon([at(0.1, 0), at(-0.4, plump * 1.25), at(-0.5, 0)], shade(main, 0.75))
    c.pen.polygon(flank(0, 1), main)
    for n in range(stripes):
        start = 0.25 + 0.68 * n / stripes
        c.pen.polygon(flank(start, start + 0.32 / stripes), stripe)
    c.disc(at(0.68, -plump * 0.2), radius * 0.1, WHITE)
    c.disc(at(0.7, -plump * 0.2), radius * 0.055, (10, 10, 20))


def flower(c: Canvas) -> None:
    """Paint blossoms before a blurred garden."""
    hue = c.between(0.2, 0.45) if c.chance(0.6) else c.between(0, 1)
    above, below = hsv(hue, c.between(0.2, 0.6), c.between(0.5, 1)), hsv(hue + 0.06, 0.55, c.between(0.25, 0.8))
    c.gradient([above, below])
    for _ in range(c.count(4, 14)):
        light = hsv(hue + c.between(-0.12, 0.12), 0.4, 0.95)
        c.disc(c.place(), c.unit * c.between(0.04, 0.16), faded(light, 0.15))
    tint, petals, slim, rings = c.between(0.75, 1.18), c.count(5, 13), c.between(0.6, 1.05), c.count(1, 2)
    for center, radius in c.spots(5, 0.27, 0.42):
        foot = (center[0] + c.between(-0.2, 0.2) * c.unit, c.height + 20.0)
        c.pen.line((center, foot), hsv(0.3, 0.6, 0.4), round(radius * 0.09))
        color, turn = hsv(tint + c.between(-0.04, 0.04), c.between(0.25, 0.9), c.between(0.85, 1)), c.between(0, 1)
        for ring in range(rings):
            for n in range(petals):
                angle, tone = 2 * math.pi * (n + turn + 0.5 * ring) / petals, 0.84 + 0.1 * (n % 2) + 0.12 * ring
                _petal(c, center, angle, radius * (1 - 0.35 * ring), slim * math.pi / petals, shade(color, tone))
        heart = hsv(c.between(0.07, 0.16), 0.85, c.between(0.5, 0.95))
        c.disc(center, radius * 0.24, shade(heart, 0.75))
        for n in range(24):  # seeds, turned by the golden angle
            c.disc(polar(center, n * 2.4, radius * 0.045 * n**0.5), radius * 0.03, shade(heart, 1.2))


def _petal(c: Canvas, center: Point, angle: float, reach: float, wide: float, color: Color) -> None:
    outline = [(0.0, 0.1), (0.35, 0.6), (0.6, 0.95), (0.75, 1.0), (0.88, 0.85), (0.96, 0.5), (1.0, 0.0)]
    near = [polar(center, angle + spread * wide, far * reach) for far, spread in outline]
    back = [polar(center, angle - spread * wide, far * reach) for far, spread in reversed(outline)]
    c.pen.polygon([*near, *back], color, shade(color, 0.75))
    c.pen.line((center, polar(center, angle, reach * 0.8)), faded(shade(color, 0.6), 0.5), 2)


def leaf(c: Canvas) -> None:
    """Paint veined leaves, green or autumnal, on paper, earth or stone."""
    hue = c.between(0.05, 0.15) if c.chance(0.6) else c.between(0, 1)
    ground = hsv(hue, c.between(0.03, 0.4), c.between(0.55, 1))
    c.gradient([ground, shade(ground, c.between(0.75, 0.95))])
    c.mist(shade(ground, 0.6), c.count(3, 40), c.between(0.05, 0.3))
    season = c.between(0.22, 0.36) if c.chance(0.5) else c.between(0, 0.13)
    slender, lobes, deep = c.between(0.28, 0.6), c.count(3, 6), c.pick((0, 1)) * c.between(0.1, 0.35)
    # Half the width at 0, 1/40, … of the length: a long oval with a pointed tip, wavy when it has lobes.
    halves = [
        slender * math.sin(math.pi * t**0.75) ** 0.9 * (1 - deep * (0.5 + 0.5 * math.cos(2 * math.pi * lobes * t)))
        for t in (n / 40 for n in range(41))
    ]
    for center, radius in c.spots(6, 0.34, 0.5):
        color = hsv(season + c.between(-0.04, 0.04), c.between(0.55, 0.9), c.between(0.45, 0.9))
        _one_leaf(c, center, radius, halves, color)


def _one_leaf(c: Canvas, center: Point, radius: float, halves: list[float], color: Color) -> None:
    angle, vein, steps = c.between(0, 2 * math.pi), shade(color, c.pick((0.6, 1.35))), len(halves) - 1

    def at(step: float, aside: float) -> Point:
        middle = polar(center, angle, radius * (2 * step / steps - 1))
        return polar(middle, angle + math.pi / 2, radius * aside)

    near = [at(n, half) for n, half in enumerate(halves)]
    far = [at(n, -half) for n, half in enumerate(halves)]
    c.pen.polygon([(x + 6, y + 9) for x, y in [*near, *reversed(far)]], (0, 0, 0, 60))
    c.pen.polygon(near, color)
    c.pen.polygon(far, shade(color, 0.85))
    c.pen.line((at(-7, 0.04), at(0, 0), at(steps - 1, 0)), vein, max(3, round(radius * 0.03)))
    for root in range(3, steps - 7, c.count(4, 8)):
        for side in (-0.85, 0.85):
            c.pen.line((at(root, 0), at(root + 5, side * halves[root + 5])), vein, 2)


def maze(c: Canvas) -> None:
    """Paint a labyrinth, with or without the way through it."""
    hue, columns = c.between(0, 1), c.count(8, 18)
    pitch = c.width / (columns + 1)
    rows = max(3, round(c.height / pitch) - 1)
    left, top = pitch / 2, (c.height - rows * pitch) / 2
    paper = hsv(hue, c.between(0.02, 0.35), c.between(0.85, 1))
    wall = hsv(hue + c.between(-0.2, 0.2), c.between(0.4, 0.9), c.between(0.1, 0.5))
    if c.chance(0.35):
        paper, wall = wall, paper
    c.gradient([paper, shade(paper, c.between(0.7, 1.1))])
    walls, way = _carve(c.rng, rows, columns)
    if c.chance(0.5):
        middle = [(left + (column + 0.5) * pitch, top + (row + 0.5) * pitch) for row, column in way]
        c.pen.line(middle, hsv(hue + 0.5, 0.8, 0.9), max(4, round(pitch * 0.3)), "curve")
    thick = max(3, round(pitch * c.between(0.12, 0.4)))
    for row, column, below in walls:
        x, y = left + (column + 1 - below) * pitch, top + (row + below) * pitch
        c.pen.line((x, y, x + below * pitch, y + (1 - below) * pitch), wall, thick)
    c.pen.rectangle((left, top, left + columns * pitch, top + rows * pitch), outline=wall, width=thick)


def _carve(
    rng: np.random.Generator, rows: int, columns: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """Return a maze's walls and the cells from its first corner to its last.

    A wall is the (row, column) of a cell and 1 when it stands below that cell, 0 when to its right.
    """
    walls = {(row, column, below) for row in range(rows) for column in range(columns) for below in (0, 1)}
    free = {(row, column) for row in range(rows) for column in range(columns)} - {(0, 0)}
    path, way = [(0, 0)], [(0, 0)]
    while path:
        row, column = path[-1]
        if (row, column) == (rows - 1, columns - 1):
            way = list(path)
        steps = [(row, column + 1), (row, column - 1), (row + 1, column), (row - 1, column)]
        steps = [step for step in steps if step in free]
        if not steps:
            path.pop()
            continue
        step = steps[int(rng.integers(len(steps)))]
        walls.discard((min(row, step[0]), min(column, step[1]), int(step[0] != row)))
        free.discard(step)
        path.append(step)
    return sorted(walls), way


def mountain(c: Canvas) -> None:
    """Paint snowy peaks above a lake or a meadow, with or without woods."""
    hue = c.between(0.5, 0.65) if c.chance(0.7) else c.between(0.85, 1.08)
    c.gradient([hsv(hue, c.between(0.3, 0.7), c.between(0.6, 1)), hsv(hue, 0.15, 0.97), hsv(hue + 0.1, 0.1, 1)])
    if c.chance(0.5):
        c.cloud(c.place(0.1, 0.3), c.unit * c.between(0.1, 0.25))
    rock = hsv(c.between(0.55, 0.75), c.between(0.1, 0.4), c.between(0.35, 0.65))
    foot, sun, peaks = c.height * c.between(0.7, 0.88), c.count(0, 1), c.count(2, 5)
    for n in c.rng.permutation(peaks).tolist():
        top = (c.width * (n + c.between(0.2, 0.8)) / peaks, c.height * c.between(0.12, 0.42))
        _peak(c, top, foot + c.unit * 0.06, c.width * c.between(0.25, 0.45), rock, sun)
    if c.chance(0.4):
        c.gradient([hsv(hue, 0.4, 0.9), hsv(hue, 0.7, 0.5)], foot)
        for row in range(round(foot) + 8, c.height, 12):
            c.pen.line((c.between(0, 0.6) * c.width, row, c.between(0.4, 1) * c.width, row), faded(WHITE, 0.24), 3)
    else:
        c.ridge(foot, c.unit * 0.02, hsv(c.between(0.2, 0.4), c.between(0.3, 0.6), c.between(0.25, 0.6)))
    pine = hsv(c.between(0.3, 0.45), 0.6, c.between(0.15, 0.3))
    for _ in range(c.count(0, 22)):
        (x, y), tall = c.place(0.92, 1.05), c.unit * c.between(0.1, 0.25)
        for up, half in ((0.5, 0.27), (0.25, 0.2), (0.0, 0.12)):
            low, tip = y - tall * (0.6 - up), y - tall * (1.2 - up * 0.8)
            c.pen.polygon([(x, tip), (x - tall * half, low), (x + tall * half, low)], pine)


def _peak(c: Canvas, top: Point, foot: float, wide: float, rock: Color, sun: int) -> None:
    """Draw two slopes that meet in a jagged edge; `sun` is the lit one, 0 the left."""
    steps, snow, high = range(10), c.count(3, 6), foot - top[1]
    jags = [c.unit * 0.035 * c.between(-1, 1) * (step > 0) for step in steps]
    edge = [(top[0] + 2 * jags[n], top[1] + high * n / 9) for n in steps]
    for side, way in enumerate((-1, 1)):
        slope = [(top[0] + way * (wide * n / 9 + 0.6 * jags[-n]), top[1] + high * n / 9) for n in steps]
        lit = side == sun
        c.pen.polygon([*slope, *reversed(edge)], shade(rock, 1.15 if lit else 0.75))
        (outer, low), inner = slope[snow], edge[snow][0]
        fringe = [(outer + (inner - outer) * t, low + c.unit * 0.06 * c.between(-1, 1)) for t in (0.2, 0.4, 0.6, 0.8)]
        cap = [*slope[: snow + 1], *fringe, *reversed(edge[: snow + 1])]
        c.pen.polygon(cap, shade((236, 240, 248), 1.08 if lit else 0.85))


def plaid(c: Canvas) -> None:
    """Weave a tartan, straight or on the bias, with folds in it."""
    hue, value = c.between(0, 1), c.between(0.4, 0.95)
    spread = c.between(0, 0.5)
    dyes = [hsv(hue + spread * n, c.between(0.3, 0.9), value * c.between(0.4, 1.3)) for n in range(c.count(2, 4))]
    dyes.append((240, 236, 224) if c.chance(0.6) else hsv(hue + 0.5, 0.3, 0.2))
    threads = [c.count(0, len(dyes) - 1) for _ in range(c.count(4, 7))]
    sett = np.repeat(threads, [round(c.unit * c.pick((0.012, 0.03, 0.06, 0.12))) + 4 for _ in threads]).astype(np.uint8)
    sett = np.concatenate([sett, sett[::-1]])
    angle = c.pick((0, 0, math.pi / 4, c.between(-0.3, 0.3)))
    x, y = np.arange(c.width, dtype=np.float32), np.arange(c.height, dtype=np.float32)[:, None]
    across = (x * math.cos(angle) + y * math.sin(angle)).astype(np.int32)
    along = (y * math.cos(angle) - x * math.sin(angle)).astype(np.int32)
    twill = np.where((across + along) & 4, across, along)  # the diagonal of threads that lie on top
    cloth = Image.fromarray(sett.take(twill, mode="wrap"))
    cloth.putpalette(np.array(dyes, np.uint8).tobytes())
    c.picture.paste(cloth.convert("RGB"))
    c.mist((0, 0, 0), c.count(2, 5), c.between(0.1, 0.45))


def planet(c: Canvas) -> None:
    """Paint a banded planet and its rings among stars."""
    space, hue = c.between(0.55, 0.95), c.between(0, 1)
    c.gradient([hsv(space, 0.8, c.between(0.03, 0.15)), hsv(space + 0.1, 0.8, c.between(0.05, 0.3))])
    if c.chance(0.6):
        c.mist(hsv(space + c.between(-0.2, 0.3), 0.8, 0.6), c.count(3, 6), c.between(0.3, 0.8))
    c.specks(c.count(30, 140), (255, 255, 245), c.height, 3)
    center = (c.between(0.3, 0.7) * c.width, c.between(0.32, 0.68) * c.height)
    radius, tilt, flat = c.unit * c.between(0.16, 0.33), c.between(-0.7, 0.7), c.between(0.12, 0.4)

    def orbit(reach: float, start: float) -> list[Point]:
        turns = [math.pi * (start + n / 30) for n in range(31)]
        return [
            polar(polar(center, tilt, reach * math.cos(turn)), tilt + math.pi / 2, reach * flat * math.sin(turn))
            for turn in turns
        ]

    rings = [(radius * c.between(1.3, 2.1), radius * c.between(0.06, 0.22)) for _ in range(c.count(1, 4))]
    dust = hsv(hue + c.between(-0.1, 0.1), 0.35, c.between(0.6, 1))
    for start in (1, 0):  # the half behind the globe, then the half before it
        for reach, wide in rings:
            c.pen.polygon([*orbit(reach, start), *reversed(orbit(reach + wide, start))], faded(dust, 0.85))
        if start:
            _globe(c, center, radius, tilt, hue)
    for _ in range(c.count(0, 3)):
        c.disc(c.place(), c.unit * c.between(0.012, 0.04), hsv(c.between(0, 1), 0.2, 0.85))


def _globe(c: Canvas, center: Point, radius: float, tilt: float, hue: float) -> None:
    side, corner = round(2 * radius), (round(center[0] - radius), round(center[1] - radius))
    face, level = Canvas(c.rng, (side, side)), -radius
    while level < radius:
        place = polar((radius, radius), tilt + math.pi / 2, level)
        top = [polar(place, tilt, -radius), polar(place, tilt, radius)]
        bottom = [polar(point, tilt + math.pi / 2, radius) for point in reversed(top)]
        tone = hsv(hue + c.between(-0.06, 0.06), c.between(0.3, 0.8), c.between(0.6, 1))
        face.pen.polygon([*top, *bottom], tone)
        level += radius * c.between(0.08, 0.4)
    disc, sunlight = Image.new("L", (side, side)), Image.new("L", (side, side))
    ImageDraw.Draw(disc).ellipse((0, 0, side - 1, side - 1), 255)
    sun = polar((radius, radius), c.between(0, 2 * math.pi), radius * 0.8)
    sunlight.paste(glow_mask(radius * 2.4), (round(sun[0] - radius * 2.4), round(sun[1] - radius * 2.4)))
    c.picture.paste(face.picture, corner, disc)
    c.picture.paste((0, 0, 10), corner, ImageChops.subtract(disc, sunlight.point(ramp(2.2))).point(ramp(0.9)))


def sailboat(c: Canvas) -> None:
    """Paint boats under sail on a rippled sea."""
    hue, day, evening = c.between(0.5, 0.62), c.between(0.7, 1), c.chance(0.3)
    horizon = c.height * c.between(0.4, 0.65)
    zenith = hsv(c.between(0.9, 1.1) if evening else hue, c.between(0.25, 0.6), day)
    c.gradient([zenith, hsv(0.1 if evening else hue, 0.18, 1)], 0, horizon)
    c.gradient([hsv(hue, 0.45, day * 0.9), hsv(hue + 0.04, 0.8, day * c.between(0.4, 0.7))], horizon)
    for _ in range(c.count(0, 3)):
        c.cloud((c.between(0, 1) * c.width, horizon * c.between(0.2, 0.9)), c.unit * c.between(0.08, 0.2))
    for _ in range(c.count(20, 60)):
        near = c.between(0.02, 1)
        x, y, wide = c.between(0, 1) * c.width, horizon + (c.height - horizon) * near, c.unit * 0.1 * (0.3 + near)
        c.pen.arc((x - wide, y, x + wide, y + wide * 0.3), 200, 340, faded(WHITE, 0.35), 3)
    paint, cloth = c.between(0, 1), c.between(0, 1)
    for near in sorted(c.rng.random(c.count(1, 4)).tolist()):
        place = (c.between(0.15, 0.85) * c.width, horizon + (c.height - horizon) * (0.06 + 0.6 * near))
        hull = hsv(paint + 0.3 * near, c.between(0, 0.9), c.between(0.3, 0.9))
        _one_boat(c, place, c.unit * (0.13 + 0.3 * near), hull, hsv(cloth, c.pick((0.04, 0.04, 0.7)), 0.97))


def _one_boat(c: Canvas, place: Point, size: float, hull: Color, sail: Color) -> None:
    heel, way = c.between(-0.12, 0.12), c.pick((-1, 1))

    def at(ahead: float, up: float) -> Point:
        return place[0] + way * size * (ahead + heel * up), place[1] - size * (up - heel * ahead * 0.5)

    c.pen.polygon([at(-0.5, -0.2), at(0.5, -0.2), at(0.2, -1), at(-0.2, -0.9)], faded(sail, 0.18))
    c.pen.line((at(0, 0), at(0, 1.65)), (90, 60, 40), max(3, round(size * 0.03)))
    c.pen.polygon([at(-0.04, 1.6), at(-0.3, 0.9), at(-0.62, 0.16), at(-0.04, 0.2)], sail)
    c.pen.polygon([at(0.04, 1.45), at(0.3, 0.75), at(0.66, 0.14), at(0.04, 0.22)], shade(sail, 0.87))
    if c.chance(0.4):
        c.pen.polygon([at(-0.04, 0.9), at(-0.3, 0.9), at(-0.42, 0.62), at(-0.04, 0.66)], hull)
    c.pen.polygon([at(-0.72, 0.1), at(0.85, 0.14), at(0.6, -0.2), at(-0.55, -0.2)], hull)
    c.pen.line((at(-0.72, 0.08), at(0.83, 0.11)), (250, 250, 250), max(2, round(size * 0.035)))


def sunset(c: Canvas) -> None:
    """Paint a low sun over hills in the haze."""
    hue = c.between(-0.06, 0.1)
    zenith = hsv(hue - c.between(0.05, 0.35), c.between(0.4, 0.7), c.between(0.3, 0.85))
    c.gradient([zenith, hsv(hue, c.between(0.5, 0.8), 0.97), hsv(hue + 0.07, c.between(0.3, 0.6), 1)])
    sun = (c.between(0.1, 0.9) * c.width, c.between(0.3, 0.65) * c.height)
    radius = c.unit * c.between(0.05, 0.16)
    c.glow(sun, radius * c.between(3, 6), hsv(hue + 0.1, 0.3, 1), 0.9)
    c.disc(sun, radius, hsv(hue + c.between(0.02, 0.12), c.between(0.05, 0.7), 1))
    for _ in range(c.count(0, 9)):
        (x, y), wide = c.place(0.08, 0.6), c.unit * c.between(0.1, 0.45)
        streak = hsv(hue - 0.05, c.between(0.2, 0.7), c.between(0.5, 1))
        c.pen.ellipse((x - wide, y, x + wide, y + wide * c.between(0.05, 0.16)), faded(streak, 0.45))
    for _ in range(c.count(0, 6)):
        (x, y), span = c.place(0.1, 0.5), c.unit * c.between(0.015, 0.035)
        c.pen.line([(x - span, y - span * 0.4), (x, y), (x + span, y - span * 0.4)], (40, 20, 30), 3)
    hills, land, haze, top = c.count(2, 5), hue - c.between(0, 0.4), c.between(0.55, 0.8), c.between(0.6, 0.75)
    for n in range(hills):
        near = (n + 1) / hills
        color = hsv(land, 0.35 + 0.4 * near, haze * (1 - 0.85 * near) + 0.06)
        c.ridge(c.height * (top + (0.95 - top) * n / hills), c.unit * c.between(0.02, 0.07), color)


PAINTERS: dict[str, Callable[[Canvas], None]] = {
    "balloon": balloon,
    "citrus": citrus,
    "city": city,
    "fish": fish,
    "flower": flower,
    "leaf": leaf,
    "maze": maze,
    "mountain": mountain,
    "plaid": plaid,
    "planet": planet,
    "sailboat": sailboat,
    "sunset": sunset,
}
