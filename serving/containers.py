"""What a file's own structure tells: its format, what opening it would fill, and whether it was cut short.

Nothing here decodes, or needs more than the standard library. Surveys and checks follow the numbers in the file
wherever they lead; beyond the end of the data that is an error of `_BEYOND`, which `survey` and `is_whole` catch.
"""

import re
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

from serving.errors import ImageRejected

_BEYOND = (IndexError, struct.error, OverflowError)


class Area(NamedTuple):
    """Pixels that opening or decoding a file sets memory aside for: the whole picture, or one tile of it."""

    width: int
    height: int
    is_tile: bool = False


def recognise(data: bytes, readable: Collection[str]) -> str:
    """Name the format by the first bytes, one of `readable`; raise `ImageRejected` for any other."""
    for kind, known in _FORMATS.items():
        if kind in readable and known.signature.match(data):
            return kind
    for name, signature in _UNSUPPORTED.items():
        if signature.match(data):
            raise ImageRejected("unsupported_format", f"{name} is not read")
    raise ImageRejected("not_an_image", f"starts with {data[:12]!r}")


def survey(kind: str, data: bytes) -> Iterator[Area]:
    """Yield the areas to judge before opening a file: where that already costs memory, or its header is not all.

    Raises `ImageRejected` for what no limit would let pass.
    """
    with suppress(*_BEYOND):  # a damaged file; what is wrong with it, if anything, opening it will tell
        yield from _FORMATS[kind].survey(data)


def is_whole(kind: str, data: bytes) -> bool | None:
    """Tell, of a file that failed, one that is corrupt from one that was cut short; None if the container cannot."""
    try:
        return _FORMATS[kind].is_whole(data)
    except _BEYOND:
        return False


def _starts(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


def _survey_nothing(_: bytes) -> Iterator[Area]:
    return iter(())


_JPEG_MARKER = _starts(rb"\xff([^\0\x01\xd0-\xd7\xff])")  # those that stand in the entropy-coded data left out


def _is_whole_jpeg(data: bytes) -> bool:
    """Walk the segments to the end marker; that of a thumbnail is inside a segment and does not count."""
    at = 2
    while marker := _JPEG_MARKER.search(data, at):
        if marker[1] == b"\xd9":
            return True
        at = marker.end() + int(struct.unpack_from(">H", data, marker.end())[0])
    return False


def _is_whole_png(data: bytes) -> bool:
    at, name = 8, b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", data, at)
        if not name.isalpha():  # corrupt: where the file ought to end is no longer known
            return True
        at += 12 + length
    return at <= len(data)


def _survey_gif(data: bytes) -> Iterator[Area]:
    """Tell the screen, widened to the first frame: opening a GIF may fill it."""
    for at in islice(_gif_frames(data), 1):
        left, top, width, height = struct.unpack_from("<4H", data, at)
        screen_width, screen_height = struct.unpack_from("<2H", data, 6)
        yield Area(max(screen_width, left + width), max(screen_height, top + height))


def _is_whole_gif(data: bytes) -> bool:
    return all(_gif_frames(data))


def _gif_frames(data: bytes) -> Iterator[int]:
    """Yield where each frame is described, up to the trailer."""
    at = 13 + _gif_palette(data[10])
    while (block := data[at]) != 0x3B:
        at += 1
        if block not in (0x21, 0x2C):  # stray bytes are skipped, as Pillow does
            continue
        if block == 0x2C:
            yield at
            at += 9 + _gif_palette(data[at + 8])
        at += 1
        while length := data[at]:
            at += 1 + length
        at += 1


def _gif_palette(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _survey_webp(data: bytes) -> Iterator[Area]:
    """Tell the canvas of the extended header: opening a WebP reserves it, and fails where that is too much."""
    if data[12:16] == b"VP8X" and len(data) >= 30:
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        yield Area(width, height)


def _is_whole_webp(data: bytes) -> bool:
    return bool(8 + struct.unpack_from("<I", data, 4)[0] <= len(data))


def _is_whole_bmp(data: bytes) -> bool | None:
    return None if struct.unpack_from("<I", data, 2)[0] <= len(data) else False  # some writers leave a zero there


_TIFF_TYPES = dict(enumerate("BBBHIQbBhiqfdI")) | {16: "Q", 17: "q", 18: "Q"}  # by number, as struct writes them
_TIFF_OFFSETS, _TIFF_LENGTHS = (273, 324), (279, 325)  # of strips, of tiles
_TIFF_TILE_SIDES = (322, 323)
_TIFF_MOST_VALUES = 2**18  # the longest sensible list is the palette of 16 bits, three quarters of this


def _survey_tiff(data: bytes) -> Iterator[Area]:
    """Tell the tiles, decoded whole however small the picture is; refuse long lists, which become Python objects."""
    tile = dict.fromkeys(_TIFF_TILE_SIDES, 0)
    for tag, form, count, place in _tiff_entries(data):
        size = struct.calcsize(form)
        if count > _TIFF_MOST_VALUES and size > 1:
            raise ImageRejected("too_large", f"tag {tag} has {count} values")
        if tag in tile and place + size <= len(data):
            # The larger one, where it is said twice: Pillow takes the last and libtiff the first.
            tile[tag] = max(tile[tag], struct.unpack_from(form, data, place)[0])
            width, height = tile.values()
            yield Area(width, height, is_tile=True)


def _is_whole_tiff(data: bytes) -> bool | None:
    """Look for the values of the first directory, then for the strips or tiles of the picture."""
    offsets: list[int] = []
    lengths: list[int] = []
    for tag, form, count, place in _tiff_entries(data):
        if place + count * struct.calcsize(form) > len(data):
            return False
        if tag in _TIFF_OFFSETS:
            offsets += struct.unpack_from(f"{form[0]}{count}{form[1]}", data, place)
        if tag in _TIFF_LENGTHS:
            lengths += struct.unpack_from(f"{form[0]}{count}{form[1]}", data, place)
    ends = [offset + length for offset, length in zip(offsets, lengths, strict=False)]
    return max(ends) <= len(data) if ends else None


def _tiff_entries(data: bytes) -> Iterator[tuple[int, str, int, int]]:
    """Yield each tag of the first directory: its number, how struct reads one value, how many there are, and where."""
    order = "<" if data.startswith(b"II") else ">"
    big = 43 in data[2:4]
    word, counter = ("Q", "Q") if big else ("I", "H")
    width = struct.calcsize(word)
    (start,) = struct.unpack_from(order + word, data, 8 if big else 4)
    (entries,) = struct.unpack_from(order + counter, data, start)
    at = start + struct.calcsize(counter)
    for _ in range(entries):
        tag, kind, count = struct.unpack_from(f"{order}HH{word}", data, at)
        form = order + _TIFF_TYPES.get(kind, "B")
        place = at + 4 + width
        if count * struct.calcsize(form) > width:
            (place,) = struct.unpack_from(order + word, data, place)
        yield tag, form, count, place
        at += 4 + 2 * width
    struct.unpack_from(order + word, data, at)  # where the next directory is


def _is_whole_avif(data: bytes) -> bool | None:
    """Walk the boxes; both what describes the picture and what holds it have to be there."""
    at, seen = 0, set()
    while at < len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        seen.add(name)
        if length == 0:  # up to the end of the file, wherever that was
            return None
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, at + 8)
        at += max(length, 8)
    return at <= len(data) and {b"meta", b"mdat"} <= seen


class _Format(NamedTuple):
    """What is known of a container: how it starts, how to see that it was cut, what to look at before opening it."""

    signature: re.Pattern[bytes]
    is_whole: Callable[[bytes], bool | None]
    survey: Callable[[bytes], Iterator[Area]] = _survey_nothing


_FORMATS = {
    "JPEG": _Format(_starts(rb"\xff\xd8\xff"), _is_whole_jpeg),
    "PNG": _Format(_starts(rb"\x89PNG\r\n\x1a\n"), _is_whole_png),
    "WebP": _Format(_starts(rb"RIFF.{4}WEBP"), _is_whole_webp, _survey_webp),
    "GIF": _Format(_starts(rb"GIF8[79]a"), _is_whole_gif, _survey_gif),
    # Two letters start many a text, so the header's length, one of seven, is asked for as well.
    "BMP": _Format(_starts(rb"BM.{12}[\x0c(48@l|]\0\0\0"), _is_whole_bmp),
    # Not Canon's raw files, which say so at byte 8.
    "TIFF": _Format(_starts(rb"(?:II[*+]\0|MM\0[*+])(?!.{4}CR)"), _is_whole_tiff, _survey_tiff),
    "AVIF": _Format(_starts(rb".{4}ftyp(?:.{4}){0,9}?avi[fs]"), _is_whole_avif),
    "PPM": _Format(_starts(rb"P[1-6]\s+[#\d]"), lambda _: None),
}

_UNSUPPORTED = {
    name: _starts(pattern)
    for name, pattern in {
        "HEIC": rb".{4}ftyp(?:hei|hev|mif1|msf1)",
        "AVIF": rb".{4}ftypavi[fs]",
        "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
        "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
        "JPEG XR": rb"II\xbc",
        "SVG": rb"(?i:(?:\xef\xbb\xbf)?\s*(?:<svg|<(?:\?xml|!--|!DOCTYPE svg)(?:(?!<html).){0,2000}?<svg))",
        "PDF": rb"%PDF-",
        "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
        "Photoshop": rb"8BPS",
        "GIMP": rb"gimp xcf",
        "OpenEXR": rb"v/1\x01",
        "Radiance HDR": rb"#\?R(?:ADIANC|GB)E",
        "DDS": rb"DDS ",
        "QOI": rb"qoif",
        "icon": rb"\0\0[\x01\x02]\0[^\0]\0|icns",
        "metafile": rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF",
        "DjVu": rb"AT&TFORM",
        "DICOM": rb".{128}DICM",
        "camera raw": rb"II\*\0.{4}CR|IIR[OS]|IIU\0|FUJIFILMCCD-RAW|.{4}ftypcrx",
    }.items()
}
