"""A labelled picture collection made on the spot, for `lookalike demo`.

A few thousand pictures of twelve kinds, told apart at a glance and varied within: something to search without a
download. Pictures depend on their seed and on the versions of Pillow and NumPy, not on the machine.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.canvas import Canvas, ramp
from jobs.drawing_kinds import PAINTERS
from serving.errors import Reason, UsageError

KINDS: tuple[str, ...] = tuple(PAINTERS)

_SIZES = ((320, 240), (240, 320), (300, 300), (340, 220), (320, 240))
# Squared distance from the middle: how a lens darkens.
_CORNERS = Image.radial_gradient("L").point([level * level // 255 for level in range(256)])


def draw(kind: str, seed: int, size: tuple[int, int] = _SIZES[0]) -> Image.Image:
    """Draw one picture of `size` (width, height); the same arguments give the same pixels.

    It is painted at twice the size and reduced, which smooths every edge.
    """
    if kind not in PAINTERS:
        raise UsageError(f"{kind!r} is no kind of drawing; there are {', '.join(KINDS)}")
    canvas = Canvas(np.random.default_rng([zlib.crc32(kind.encode()), seed]), (2 * size[0], 2 * size[1]))
    PAINTERS[kind](canvas)
    return _photograph(canvas)


def write_collection(folder: Path, count: int, seed: int = 0) -> Iterator[Path]:
    """Write `count` pictures as `folder/<kind>/<kind>-00001.jpg` and yield each path once its file is there.

    Kinds take turns. Files that exist are left alone, so an interrupted collection is completed by the same call.
    """
    if count < 0 or seed < 0:
        raise UsageError(f"a collection needs a count and a seed of 0 or more, not {count} and {seed}")
    for index in range(count):
        kind, number = KINDS[index % len(KINDS)], index // len(KINDS) + 1
        path = folder / kind / f"{kind}-{number:05}.{_format_of(number)}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, _encode(draw(kind, (seed << 32) + number, _SIZES[number % len(_SIZES)]), path.suffix))
        yield path


def write_faults(folder: Path) -> dict[str, Reason]:
    """Write files that cannot be used as pictures; return the reason to expect for each name."""
    picture = draw("sunset", 0)
    jpeg, png = _encode(picture, ".jpg"), _encode(picture, ".png")
    middle = len(png) // 2
    faults: dict[str, tuple[Reason, bytes]] = {
        "empty.jpg": ("empty", b""),
        "half.jpg": ("truncated", jpeg[: len(jpeg) // 2]),
        "half.png": ("truncated", png[:middle]),
        "note.jpg": ("not_an_image", b"This is a text whose name says that it is a picture.\n"),
        "not-found.png": ("not_an_image", b"<!doctype html><title>404</title><p>There is no such picture.</p>\n"),
        "outline.svg": ("unsupported_format", b'<svg xmlns="http://www.w3.org/2000/svg"><circle r="9"/></svg>\n'),
        "scratched.png": ("unreadable", png[:middle] + bytes(64) + png[middle + 64 :]),
        "dot.png": ("too_small", _encode(picture.resize((1, 1)), ".png")),
        "bomb.png": ("too_large", _bomb(60_000)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, data) in faults.items():
        if not (folder / name).exists():
            _write(folder / name, data)
    return {name: reason for name, (reason, _) in faults.items()}


def _photograph(canvas: Canvas) -> Image.Image:
    """Reduce the canvas and add what a camera adds: exposure, the light's warmth, dark corners, grain."""
    exposure, warmth, corners = canvas.between(0.85, 1.15), canvas.between(-0.06, 0.06), canvas.between(0, 0.4)
    gains = (exposure * (1 + warmth), exposure, exposure * (1 - warmth))
    picture = canvas.picture.reduce(2).point([level for gain in gains for level in ramp(gain)])
    shadow = _CORNERS.resize(picture.size, Image.Resampling.BILINEAR).point(ramp(corners))
    picture.paste((0, 0, 0), mask=shadow)
    grain = Image.fromarray(canvas.rng.integers(0, 256, (picture.height, picture.width), np.uint8))
    return Image.blend(picture, Image.merge("RGB", [grain] * 3), canvas.between(0, 0.04))


def _format_of(number: int) -> str:
    """Choose a suffix: one picture in twenty is a PNG, one a WebP."""
    return {7: "png", 13: "webp"}.get(number % 20, "jpg")


def _encode(picture: Image.Image, suffix: str) -> bytes:
    data = io.BytesIO()
    if suffix == ".png":
        picture.save(data, "PNG", compress_level=3)
    elif suffix == ".webp":
        picture.save(data, "WEBP", quality=85, method=1)
    else:
        picture.save(data, "JPEG", quality=85)
    return data.getvalue()


def _bomb(side: int) -> bytes:
    """Return a PNG of a hundred bytes that claims to be `side` pixels wide and high."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    framed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def _write(path: Path, data: bytes) -> None:
    # Not `storage.create`: that waits for the disk at every file, for pictures that can be drawn again.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
