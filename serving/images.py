"""Bytes to RGB pixels, and every way a picture can be bad.

One decoder serves the batch side and the queries, so that both see the same pixels. It opens files with Pillow's
plugins rather than through `Image.open`, whose guard against huge pictures is one setting for the whole process (and a
warning before it is an error): here each call brings its own limits. What the process still decides for us:
`Image.MAX_IMAGE_PIXELS`, which the plugins of TIFF and GIF ask by themselves (it warns from 89 million pixels and
refuses from 179 million), and `ImageFile.LOAD_TRUNCATED_IMAGES`, which pads cut files with grey: leave it off.
"""

import io
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from serving.errors import ImageRejected, MissingExtra, Reason

try:
    from PIL import (
        AvifImagePlugin,
        BmpImagePlugin,
        ExifTags,
        GifImagePlugin,
        Image,
        ImageChops,
        ImageCms,
        ImageFile,
        JpegImagePlugin,
        PngImagePlugin,
        PpmImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )
except ImportError as error:
    raise MissingExtra("decoding images", "images") from error

RECIPE = "1: first frame, jpeg draft, bilinear stretch, upright, over white, perceptual to sRGB"
"""Names how bytes become pixels; change it whenever a value may change, for vectors change with it."""

# Odd tags and broken animations make Pillow warn, though the pixels are fine. One filter, set once, is safe among
# threads; warnings.catch_warnings around each picture is not.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.(Png|Tiff)ImagePlugin")


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused: pictures of more pixels, files of more bytes, sides of fewer pixels."""

    max_pixels: int = 100_000_000
    max_bytes: int = 100 * 2**20
    min_side: int = 8


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """Pixels, uint8 `[height, width, 3]` of the asked size, read-only; and the sides of the original, upright."""

    pixels: np.ndarray
    width: int
    height: int


DEFAULT_LIMITS = Limits()


def load(data: bytes, size: tuple[int, int], limits: Limits = DEFAULT_LIMITS) -> Picture:
    """Decode a picture and stretch it to `size`, which is (height, width) in pixels.

    Raises `ImageRejected`, with one of the fixed reasons, for whatever the bytes may hold.
    """
    kind = _recognise(data, limits)
    try:
        return _decode(kind, data, size, limits)
    except ImageRejected:
        raise
    except MemoryError as error:
        raise ImageRejected("too_large", f"{kind}: there is not the memory to decode it") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRejected("too_large", f"{kind}: {_said(error)}") from error
    except Exception as error:  # Pillow raises some fifteen kinds of them on hostile bytes
        reason: Reason = "truncated" if _is_cut(kind, data, error) else "unreadable"
        raise ImageRejected(reason, f"{kind} of {len(data)} bytes: {_said(error)}") from error


def _recognise(data: bytes, limits: Limits) -> str:
    """Name the format by the first bytes, or refuse what need not be opened."""
    if not data:
        raise ImageRejected("empty", "there are no bytes")
    if len(data) > limits.max_bytes:
        raise ImageRejected("too_large", f"{len(data)} bytes are more than {limits.max_bytes}")
    for kind, known in _FORMATS.items():
        if known.signature.match(data):
            return kind
    for name, signature in _UNSUPPORTED.items():
        if signature.match(data):
            raise ImageRejected("unsupported_format", f"{name} is not read")
    raise ImageRejected("not_an_image", f"starts with {data[:12]!r}")


def _decode(kind: str, data: bytes, size: tuple[int, int], limits: Limits) -> Picture:
    """Refuse by the header, decode, then do the rest on the few pixels that were asked for."""
    known = _FORMATS[kind]
    if known.survey:
        with suppress(*_BEYOND):  # a damaged file; what is wrong with it, if anything, opening it will tell
            known.survey(data, limits)
    with closing(known.opener(io.BytesIO(data))) as image:
        original = image.size
        _check_size(*original, limits)
        image.draft("RGB", (max(size), max(size)))  # JPEG alone; a square, as it may yet have to be turned
        image.load()
        turn = _turn(image)
        sideways = turn in _SIDEWAYS
        small = _averageable(image).resize(size if sideways else size[::-1], Image.Resampling.BILINEAR)
        profile = image.info.get("icc_profile")
    if turn is not None:
        small = small.transpose(turn)
    pixels = np.asarray(_to_srgb(_over_white(_to_bytes(small)), profile))
    return Picture(pixels, *(original[::-1] if sideways else original))


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise ImageRejected("too_large", f"{width} x {height} pixels are more than {limits.max_pixels}")
    if min(width, height) < limits.min_side:
        raise ImageRejected("too_small", f"{width} x {height} pixels, a side is under {limits.min_side}")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Find what puts the picture upright; ask after decoding, as Pillow turns a TIFF by itself."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return None


def _averageable(image: Image.Image) -> Image.Image:
    """Convert what cannot be averaged (indices, bits, hues) and what Pillow resizes wrongly (big-endian 16 bits)."""
    if image.mode in ("RGBA", "LA", "I;16"):
        return image
    if image.mode.startswith("I;16"):
        return image.convert("I")
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode in ("RGB", "L", "CMYK", "LAB", "I", "F"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _to_bytes(image: Image.Image) -> Image.Image:
    """Map one wide channel to 8 bits.

    Integers of 16 bits keep their high byte and floats from 0 to 1 are scaled; others have no agreed range, so theirs
    is stretched from the least to the greatest value. What is not finite is black.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
    low, high = 0.0, 1.0 if image.mode == "F" else 65536.0
    if values.min() < low or values.max() > high:
        low, high = float(values.min()), float(values.max())
    scaled = (values - low) * (256 / ((high - low) or 1))
    return Image.fromarray(np.minimum(scaled, 255).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    """Lay a picture that has an alpha channel on white."""
    if image.mode not in ("RGBA", "LA"):
        return image
    opaque = image.convert(image.mode[:-1])
    white = Image.new(opaque.mode, image.size, "white")
    white.paste(opaque, mask=image.getchannel("A"))
    return white


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    transform = _transform(profile, image.mode) if isinstance(profile, bytes) else None
    if transform is not None:
        return transform.apply(image)
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the way from a profile to sRGB; None if it is broken, of another mode, or sRGB in all but name."""
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB", flags=ImageCms.Flags.NOCACHE)
        probe = _probe(mode)
        moved = ImageChops.difference(transform.apply(probe), probe.convert("RGB"))
    except Exception:  # a broken profile says nothing about the pixels
        return None
    return transform if np.asarray(moved).max() > _ROUNDING else None


def _probe(mode: str) -> Image.Image:
    """Draw colours from all over a mode's space: a ramp for each channel, in a direction of its own."""
    ramp = Image.linear_gradient("L").resize((32, 32))
    return Image.merge(mode, [ramp.rotate(90 * band) for band in range(len(mode))])


def _said(error: Exception) -> str:
    """Shorten what a decoder said to one line, without the addresses of objects."""
    root = error.__cause__ or error
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(root).__name__}: {root}")
    return " ".join(text.split())[:200]


# Surveys: a look at the bytes, where opening a file with Pillow already costs memory, or where its header is not all.


def _survey_gif(data: bytes, limits: Limits) -> None:
    """Check the screen, widened to the first frame: opening a GIF may fill it."""
    for at in _gif_frames(data):
        left, top, width, height = struct.unpack_from("<4H", data, at)
        screen_width, screen_height = struct.unpack_from("<2H", data, 6)
        return _check_size(max(screen_width, left + width), max(screen_height, top + height), limits)


def _survey_webp(data: bytes, limits: Limits) -> None:
    """Check the canvas of the extended header: opening a WebP reserves it, and fails where that is too much."""
    if data[12:16] == b"VP8X" and len(data) >= 30:
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        _check_size(width, height, limits)


def _survey_tiff(data: bytes, limits: Limits) -> None:
    """Check the tiles, decoded whole however small the picture is, and the lists that become Python objects."""
    sides = dict.fromkeys(_TIFF_TILE_SIDES, 0)
    for tag, form, count, place in _tiff_entries(data):
        size = struct.calcsize(form)
        if count > _TIFF_MOST_VALUES and size > 1:
            raise ImageRejected("too_large", f"tag {tag} has {count} values")
        if tag in sides and place + size <= len(data):
            # The larger one, where it is said twice: Pillow takes the last and libtiff the first.
            sides[tag] = max(sides[tag], struct.unpack_from(form, data, place)[0])
            if math.prod(sides.values()) > limits.max_pixels:
                raise ImageRejected("too_large", "a tile of {} x {} pixels".format(*sides.values()))


# Containers: asked only after a failure, to tell a file that was cut short from one that is corrupt.
# Whatever leads beyond the end of the data is an error of `_BEYOND`; None means that the container cannot tell.


def _is_cut(kind: str, data: bytes, error: Exception) -> bool:
    try:
        whole = _FORMATS[kind].is_whole(data)
    except _BEYOND:
        whole = False
    if whole is None:  # then the decoder's word counts
        return re.search("truncated|EOF|not enough", str(error), re.IGNORECASE) is not None
    return not whole


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


def _is_whole_webp(data: bytes) -> bool:
    return bool(8 + struct.unpack_from("<I", data, 4)[0] <= len(data))


def _is_whole_bmp(data: bytes) -> bool | None:
    return None if struct.unpack_from("<I", data, 2)[0] <= len(data) else False  # some writers leave a zero there


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


# Tables


class _Format(NamedTuple):
    """What is read: how it starts, what opens it, how to see that it was cut, and what to look at before opening it."""

    signature: re.Pattern[bytes]
    opener: type[ImageFile.ImageFile]
    is_whole: Callable[[bytes], bool | None]
    survey: Callable[[bytes, Limits], None] | None = None


def _starts(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


_FORMATS = {
    "JPEG": _Format(_starts(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile, _is_whole_jpeg),
    "PNG": _Format(_starts(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile, _is_whole_png),
    "WebP": _Format(_starts(rb"RIFF.{4}WEBP"), WebPImagePlugin.WebPImageFile, _is_whole_webp, _survey_webp),
    "GIF": _Format(_starts(rb"GIF8[79]a"), GifImagePlugin.GifImageFile, _is_whole_gif, _survey_gif),
    # Two letters start many a text, so the header's length, one of seven, is asked for as well.
    "BMP": _Format(_starts(rb"BM.{12}[\x0c(48@l|]\0\0\0"), BmpImagePlugin.BmpImageFile, _is_whole_bmp),
    # Not Canon's raw files, which say so at byte 8.
    "TIFF": _Format(
        _starts(rb"(?:II[*+]\0|MM\0[*+])(?!.{4}CR)"), TiffImagePlugin.TiffImageFile, _is_whole_tiff, _survey_tiff
    ),
    "AVIF": _Format(_starts(rb".{4}ftyp(?:.{4}){0,9}?avi[fs]"), AvifImagePlugin.AvifImageFile, _is_whole_avif),
    "PPM": _Format(_starts(rb"P[1-6]\s+[#\d]"), PpmImagePlugin.PpmImageFile, lambda _: None),
}
if not AvifImagePlugin.SUPPORTED:
    del _FORMATS["AVIF"]

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

_BEYOND = (IndexError, struct.error, OverflowError)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = tuple(_TURNS[orientation] for orientation in (5, 6, 7, 8))
_ROUNDING = 2  # levels of 255 that two ways of computing the same colour may differ by
_JPEG_MARKER = _starts(rb"\xff([^\0\x01\xd0-\xd7\xff])")  # those that stand in the entropy-coded data left out
_TIFF_TYPES = dict(enumerate("BBBHIQbBhiqfdI")) | {16: "Q", 17: "q", 18: "Q"}  # by number, as struct writes them
_TIFF_OFFSETS, _TIFF_LENGTHS = (273, 324), (279, 325)  # of strips, of tiles
_TIFF_TILE_SIDES = (322, 323)
_TIFF_MOST_VALUES = 2**18  # the longest sensible list is the palette of 16 bits, three quarters of this
