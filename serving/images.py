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
import warnings
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from serving import containers
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

RECIPE = "2: first frame, jpeg draft of 2.5 sizes, bilinear stretch, upright, over white, perceptual to sRGB"
"""Names how bytes become pixels; change it whenever a value may change, for vectors change with it."""

# Odd tags and broken animations make Pillow warn, though the pixels are fine. One filter, set once, is safe among
# threads; warnings.catch_warnings around each picture is not.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.(Png|Tiff)ImagePlugin")


_COVER = 2.5
"""Times the size asked for that a JPEG may be reduced to while it is decoded.

Less is faster and costs fidelity: at 1 the embeddings of some photos came no nearer than cosine 0.95 to those of full
decoding, at 2 no nearer than 0.994, from 2.5 on all within 0.999; see docs/performance.md.
"""


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
    """Name the format, or refuse what need not be opened."""
    if not data:
        raise ImageRejected("empty", "there are no bytes")
    if len(data) > limits.max_bytes:
        raise ImageRejected("too_large", f"{len(data)} bytes are more than {limits.max_bytes}")
    return containers.recognise(data, _OPENERS)


def _decode(kind: str, data: bytes, size: tuple[int, int], limits: Limits) -> Picture:
    """Refuse by what the file claims, decode, then do the rest on the few pixels that were asked for."""
    for area in containers.survey(kind, data):
        _check_area(area, limits)
    with closing(_OPENERS[kind](io.BytesIO(data))) as image:
        original = image.size
        _check_size(*original, limits)
        side = math.ceil(_COVER * max(size))  # a square, as the picture may yet have to be turned
        image.draft("RGB", (side, side))  # JPEG alone
        image.load()
        turn = _turn(image)
        sideways = turn in _SIDEWAYS
        small = _averageable(image).resize(size if sideways else size[::-1], Image.Resampling.BILINEAR)
        profile = image.info.get("icc_profile")
    if turn is not None:
        small = small.transpose(turn)
    pixels = np.asarray(_to_srgb(_over_white(_to_bytes(small)), profile))
    return Picture(pixels, *(original[::-1] if sideways else original))


def _check_area(area: containers.Area, limits: Limits) -> None:
    if not area.is_tile:
        _check_size(area.width, area.height, limits)
    elif area.width * area.height > limits.max_pixels:
        raise ImageRejected("too_large", f"a tile of {area.width} x {area.height} pixels")


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


def _is_cut(kind: str, data: bytes, error: Exception) -> bool:
    whole = containers.is_whole(kind, data)
    if whole is None:  # then the decoder's word counts
        return re.search("truncated|EOF|not enough", str(error), re.IGNORECASE) is not None
    return not whole


def _said(error: Exception) -> str:
    """Shorten what a decoder said to one line, without the addresses of objects."""
    root = error.__cause__ or error
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(root).__name__}: {root}")
    return " ".join(text.split())[:200]


_OPENERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
}
if not AvifImagePlugin.SUPPORTED:
    del _OPENERS["AVIF"]

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
