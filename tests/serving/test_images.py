import io
import pickle
import random
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pictures
import pytest
from PIL import Image, PngImagePlugin

from serving import images
from serving.errors import ImageRejected
from serving.images import Limits, load

ROOT = Path(__file__).parents[2]
SIZE = (pictures.HEIGHT, pictures.WIDTH)  # the scene's own: nothing is resized, so values can be told exactly
COLOURS = np.array([pictures.RED, pictures.GREEN, pictures.BLUE, pictures.YELLOW])
GREYS = np.repeat((COLOURS @ [299, 587, 114] / 1000)[:, None], 3, axis=1)  # ITU-R BT.601
LOSSY = {"jpg", "jpeg", "mpo", "avif"}


def blocks(pixels):
    """The colours in the middle of the scene's four blocks."""
    height, width = pixels.shape[0] // 4, pixels.shape[1] // 4
    return np.array([pixels[y, x] for y in (height, 3 * height) for x in (width, 3 * width)], int)


def rejected(data, limits=images.DEFAULT_LIMITS):
    with pytest.raises(ImageRejected) as caught:
        load(data, SIZE, limits)
    return caught.value


def outcome_of(data, limits=images.DEFAULT_LIMITS):
    """The pixels, or the reason why there are none."""
    try:
        return load(data, SIZE, limits).pixels
    except ImageRejected as error:
        return error.reason


def encode_srgb(linear):
    """The sRGB curve, from 0..1 to 0..255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def adobe_to_srgb(values):
    xyz = (np.asarray(values) / 255) ** 2.19921875 @ pictures.ADOBE_PRIMARIES.T
    return encode_srgb(xyz @ np.linalg.inv(pictures.SRGB_PRIMARIES).T)


# What a good picture becomes


def expected(name):
    """The colours of the blocks in a good picture, or None where it does not show blocks."""
    if name.startswith(("grey-16", "grey-32", "float", "bits", "fax", "rgba", "alpha", "grey-alpha")):
        return None
    if name.startswith("adobe-rgb"):
        return adobe_to_srgb(COLOURS)
    colours = (GREYS if name.startswith("grey") else COLOURS).copy()
    if "key" in name or name == "transparent.gif":
        colours[0] = 255
    if name == "palette-alphas.png":  # opaque from the third on
        colours = np.array([(255, 255, 255), (COLOURS[1] * 128 + 255 * 127) / 255, *COLOURS[2:]])
    return colours


@pytest.mark.parametrize("name", [name for name in pictures.good() if expected(name) is not None])
def test_the_colours_come_through_every_format(name):
    lossy = name.split(".")[-1] in LOSSY or name in ("lossy.webp", "jpeg.tif")
    tolerance = 9 if name == "lab.tif" else 3 if lossy or "adobe" in name else 0.5
    picture = load(pictures.good()[name], SIZE)
    assert (picture.width, picture.height) == (64, 48)
    assert picture.pixels.shape == (48, 64, 3)
    assert picture.pixels.dtype == np.uint8
    np.testing.assert_allclose(blocks(picture.pixels), expected(name), atol=tolerance)


@pytest.mark.parametrize("name", pictures.good())
def test_every_good_picture_is_stretched_to_the_size(name):
    picture = load(pictures.good()[name], (30, 17))
    assert picture.pixels.shape == (30, 17, 3)
    assert (picture.width, picture.height) == (64, 48)


@pytest.mark.parametrize("name", [name for name in pictures.good() if name.startswith(("grey-16", "grey-32", "float"))])
def test_16_bits_and_wider_ranges_map_linearly(name):
    ramp = load(pictures.good()[name], SIZE).pixels
    assert (ramp == ramp[:1, :, :1]).all()
    np.testing.assert_array_equal(ramp[0, :, 0], np.linspace(0, 65535, 64).astype(int) >> 8)


@pytest.mark.parametrize("name", ["rgba.png", "alpha.webp", "alpha.tif"])
def test_alpha_is_laid_on_white(name):
    alpha = np.linspace(255, 0, 64).astype(np.uint8)[None, :, None] / 255
    expected = np.asarray(pictures.scene()) * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(load(pictures.good()[name], SIZE).pixels, expected, atol=1)


def test_alpha_over_grey_is_laid_on_white():
    alpha = np.linspace(255, 0, 64).astype(np.uint8)[None, :, None] / 255
    expected = load(pictures.good()["grey.png"], SIZE).pixels * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(load(pictures.good()["grey-alpha.png"], SIZE).pixels, expected, atol=1)


def test_what_is_transparent_lends_no_colour_when_resized():
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[::2] = 0, 0, 255, 255  # every other line is transparent black
    shrunk = load(pictures.encode(Image.fromarray(pixels), "PNG"), (8, 8)).pixels
    np.testing.assert_allclose(shrunk[1:-1], np.broadcast_to((127, 127, 255), (6, 8, 3)), atol=2)


@pytest.mark.parametrize("name", ["bits.png", "bits.bmp", "bits.pbm", "fax.tif"])
def test_bits_are_black_and_white(name):
    bits = np.asarray(pictures.scene().convert("1"))
    assert (load(pictures.good()[name], SIZE).pixels == bits[..., None] * 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16", "I;16B", "I", "F"])
def test_resizing_averages_in_every_mode(mode):
    board = np.indices((64, 64)).sum(0) % 2
    image = Image.fromarray((board * 255).astype(np.uint8))
    if mode in ("I;16", "I;16B", "I", "F"):
        dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}[mode]
        image = Image.frombytes(mode, (64, 64), (board * (1 if mode == "F" else 65535)).astype(dtype).tobytes())
    data = pictures.encode(image if mode == image.mode else image.convert(mode), "TIFF")
    np.testing.assert_allclose(load(data, (8, 8)).pixels, 127, atol=2)


def test_resizing_is_a_triangle_filter():
    source = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)

    def weights(length, size):
        scale = length / size
        centres, places = (np.arange(size)[:, None] + 0.5) * scale, np.arange(length) + 0.5
        rows = np.maximum(0, 1 - np.abs(places - centres) / max(scale, 1))
        return rows / rows.sum(1, keepdims=True)

    expected = np.einsum("yh,xw,hwc->yxc", weights(37, 16), weights(53, 70), source)
    np.testing.assert_allclose(load(pictures.encode(Image.fromarray(source), "PNG"), (16, 70)).pixels, expected, atol=1)


@pytest.mark.parametrize("size", [(40, 50), (100, 30), (30, 100)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_reduced_without_losing_detail(size, orientation):
    small = np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)
    image = Image.fromarray(small).resize((1600, 1200), Image.Resampling.BICUBIC)
    upright = load(pictures.encode(image, "PNG"), size).pixels.astype(int)
    stored = image if orientation == 1 else image.transpose(Image.Transpose.ROTATE_90)
    picture = load(pictures.encode(stored, "JPEG", quality=95, exif=pictures.exif(orientation)), size)
    assert (picture.width, picture.height) == (1600, 1200)
    assert np.abs(picture.pixels - upright).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF lzw", "AVIF"])
def test_every_orientation_is_put_upright(orientation, format):
    format, _, compression = format.partition(" ")
    options = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 95, "subsampling": "4:4:4"},
        "TIFF": {"compression": "tiff_lzw"} if compression else {},
    }.get(format, {})
    data = pictures.encode(pictures.turned(orientation), format, exif=pictures.exif(orientation), **options)
    picture = load(data, SIZE)
    assert (picture.width, picture.height) == (64, 48)
    np.testing.assert_allclose(blocks(picture.pixels), COLOURS, atol=3 if format in ("JPEG", "AVIF") else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_is_upright(orientation):
    data = pictures.encode(pictures.scene(), "PNG", exif=pictures.exif(orientation))
    assert (blocks(load(data, SIZE).pixels) == COLOURS).all()


def test_broken_exif_is_ignored():
    note = pictures.chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nthis is not hexadecimal")
    data = pictures.good()["rgb.png"]
    assert (blocks(load(data[:33] + note + data[33:], SIZE).pixels) == COLOURS).all()


def test_cmyk_inks_mix_as_light_is_taken_away():
    inks = {(255, 0, 0, 0): (0, 255, 255), (0, 255, 0, 0): (255, 0, 255), (0, 0, 255, 0): (255, 255, 0)}
    inks |= {(0, 0, 0, 255): (0, 0, 0), (0, 0, 0, 0): (255, 255, 255), (0, 0, 0, 128): (127, 127, 127)}
    for ink, colour in inks.items():
        image = Image.new("CMYK", (16, 16), ink)
        for data in (pictures.encode(image, "TIFF"), pictures.encode(image, "JPEG", quality=100)):
            np.testing.assert_allclose(load(data, (8, 8)).pixels, np.broadcast_to(colour, (8, 8, 3)), atol=2)


# Colour profiles


def test_a_grey_profile_is_followed():
    image = Image.fromarray(np.tile(np.arange(0, 256, 4, np.uint8), (48, 1)))
    for data in (
        pictures.encode(image, "JPEG", quality=100, icc_profile=pictures.grey_profile(gamma=1.0)),
        pictures.encode(image, "PNG", icc_profile=pictures.grey_profile(gamma=1.0)),
    ):
        row = load(data, SIZE).pixels[24].astype(int)
        np.testing.assert_allclose(row[4:, 0], encode_srgb(np.arange(16, 256, 4) / 255), atol=4)
        assert (np.ptp(row, axis=1) <= 2).all()


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_a_cmyk_profile_is_followed(format):
    profile = pictures.black_ink_profile()
    cyan, black = (Image.new("CMYK", (16, 16), ink) for ink in ((255, 0, 0, 0), (0, 0, 0, 255)))
    np.testing.assert_allclose(load(pictures.encode(cyan, format, icc_profile=profile), (8, 8)).pixels, 255, atol=3)
    np.testing.assert_allclose(load(pictures.encode(black, format, icc_profile=profile), (8, 8)).pixels, 0, atol=3)


@pytest.mark.parametrize("profile", [pictures.srgb_profile(), pictures.rgb_profile(pictures.SRGB_PRIMARIES, 1.0)])
def test_the_profile_decides(profile):
    changed = load(pictures.encode(pictures.scene(), "PNG", icc_profile=profile), SIZE).pixels
    colours = COLOURS if profile == pictures.srgb_profile() else encode_srgb(COLOURS / 255)
    np.testing.assert_allclose(blocks(changed), colours, atol=2)


def test_profiles_of_srgb_cost_nothing():
    assert images._transform(pictures.srgb_profile(), "RGB") is None
    assert images._transform(pictures.rgb_profile(), "RGB") is not None


@pytest.mark.parametrize(
    "profile",
    [b"rubbish" * 40, pictures.rgb_profile()[:200], pictures.grey_profile(), pictures.black_ink_profile(), bytes(128)],
)
def test_a_broken_or_foreign_profile_is_ignored(profile):
    assert (blocks(load(pictures.encode(pictures.scene(), "PNG", icc_profile=profile), SIZE).pixels) == COLOURS).all()


# Values without a range


def wide(values, mode):
    pixels = np.broadcast_to(np.asarray(values, "<f4" if mode == "F" else "<i4"), (16, len(values)))
    return pictures.encode(Image.frombytes(mode, (len(values), 16), pixels.tobytes()), "TIFF")


@pytest.mark.parametrize(
    ("values", "mode", "expected"),
    [
        (np.linspace(0, 1, 8), "F", [0, 36, 73, 109, 146, 182, 219, 255]),
        (np.linspace(-2, 5, 8), "F", [0, 36, 73, 109, 146, 182, 219, 255]),
        (np.linspace(-700_000, 0, 8), "I", [0, 36, 73, 109, 146, 182, 219, 255]),
        ([0, 1, 256, 512, 1024, 32768, 65279, 65535], "I", [0, 0, 1, 2, 4, 128, 254, 255]),
        ([-5] * 8, "I", [0] * 8),
        ([70_000] * 8, "F", [0] * 8),
        ([np.nan, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, np.inf], "F", [0, 128, 128, 128, 128, 128, 128, 0]),
        ([-3e38, 0, 0, 0, 0, 0, 0, 3e38], "F", [0, 128, 128, 128, 128, 128, 128, 255]),
    ],
)
def test_wide_values_are_scaled_or_stretched(values, mode, expected):
    np.testing.assert_array_equal(load(wide(values, mode), (16, 8)).pixels[8, :, 0], expected)


# What a bad picture is called


@pytest.mark.parametrize("name", pictures.bad())
def test_every_bad_picture_has_its_reason(name):
    data, reason = pictures.bad()[name]
    error = rejected(data)
    assert error.reason == reason
    assert len(error.message) < 300
    assert " at 0x" not in error.message
    again = pickle.loads(pickle.dumps(error))
    assert (again.reason, again.message) == (error.reason, error.message)


def test_limits_are_the_callers():
    data = pictures.good()["rgb.png"]
    assert load(data, SIZE, Limits(max_pixels=64 * 48, max_bytes=len(data), min_side=48)).width == 64
    assert rejected(data, Limits(max_pixels=64 * 48 - 1)).reason == "too_large"
    assert rejected(data, Limits(max_bytes=len(data) - 1)).reason == "too_large"
    assert rejected(data, Limits(min_side=49)).reason == "too_small"


@pytest.mark.parametrize("name", ["baseline.jpg", "rgb.png", "lossy.webp", "still.gif", "rgb.bmp", "rgb.ppm"])
@pytest.mark.parametrize("setting", [100, None])
def test_the_limit_of_the_process_does_not_matter(name, setting, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", setting)
    assert load(pictures.good()[name], SIZE).width == 64
    assert rejected(pictures.good()[name], Limits(max_pixels=3000)).reason == "too_large"


CUT = [name for name in pictures.good() if not name.endswith(("pbm", "pgm", "ppm"))]  # a cut number is another number


@pytest.mark.parametrize("name", CUT)
def test_a_cut_file_is_truncated_wherever_it_was_cut(name):
    data = pictures.good()[name]
    whole = load(data, SIZE).pixels
    points = {*range(1, 40), *range(40, len(data), max(1, len(data) // 60)), *range(len(data) - 30, len(data))}
    for at in sorted(points):
        outcome = outcome_of(data[:at])
        if isinstance(outcome, str):
            assert outcome == "truncated" or (outcome == "not_an_image" and at < 18), at
        else:
            assert (outcome == whole).all(), at  # only what does not matter was missing


def test_a_cut_bitmap_without_its_length_is_truncated():
    data = bytearray(pictures.good()["rgb.bmp"])
    data[2:6] = bytes(4)
    assert (blocks(load(bytes(data), SIZE).pixels) == COLOURS).all()
    assert rejected(bytes(data[:5000])).reason == "truncated"


def test_a_cut_stream_of_unknown_length_is_truncated():
    data = bytearray(pictures.good()["still.avif"])
    at = data.index(b"mdat") - 4
    data[at : at + 4] = bytes(4)  # up to the end of the file
    assert rejected(bytes(data[:-20])).reason == "truncated"


def test_a_tiff_that_says_no_lengths_is_truncated_by_the_decoders_word():
    data = pictures.good()["raw.tif"].replace(struct.pack("<HH", 279, 4), struct.pack("<HH", 60000, 4))
    assert rejected(data[:5000]).reason == "truncated"


# Odd files: Pillow warns, the pixels are fine


def oddities():
    exif = b"Exif\0\0II*\0\x08\0\0\0\x09\0" + b"\1" * 9  # nine entries are announced
    one, two = struct.pack("<HHI", 277, 3, 1), struct.pack("<HHI", 277, 3, 2)  # samples per pixel, said twice
    good = pictures.good()
    return {
        "exif.jpg": pictures.with_segment(good["baseline.jpg"], 0xE1, exif),
        "tag.tif": good["raw.tif"].replace(one, two),
        "frames.png": good["rgb.png"][:33] + pictures.chunk(b"acTL", bytes(8)) + good["rgb.png"][33:],
    }


@pytest.mark.parametrize("name", oddities())
def test_pillow_warns_of_odd_files(name):
    with pytest.warns(UserWarning, match="Corrupt EXIF data|Metadata Warning|Invalid APNG"):
        Image.open(io.BytesIO(oddities()[name])).load()


def in_fresh_python(tmp_path, files, code, *options):
    """Run code in a new process, where `files` are the bytes, `load` loads them and `rss` tells the memory's peak."""
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    head = """
import resource, sys
from pathlib import Path
from serving.errors import ImageRejected
from serving.images import load
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
"""
    command = [sys.executable, *options, "-c", head + code, str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()


def test_warnings_as_errors_do_not_reject_odd_files(tmp_path):
    code = "for data in files: print(load(data, (48, 64)).pixels[12, 16, 0])"
    assert in_fresh_python(tmp_path, oddities(), code, "-W", "error") == ["230"] * 3


def test_bombs_are_refused_before_memory_is_spent(tmp_path):
    bombs = {name: data for name, (data, reason) in pictures.bad().items() if reason == "too_large"}
    code = """
load(Path(sys.argv[1], "calm.png").read_bytes(), (48, 64))
before = rss()
for data in files:
    try:
        load(data, (48, 64))
    except ImageRejected as error:
        print(error.reason)
print(rss() - before < 4)
"""
    said = in_fresh_python(tmp_path, {**bombs, "calm.png": pictures.good()["rgb.png"]}, code)
    assert said == ["too_large"] * len(bombs) + ["True"]


def test_a_small_picture_in_a_huge_tile_is_too_large():
    side, zeros = 1104, zlib.compress(bytes(1104 * 1104))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: -1, 325: len(zeros)}
    data = pictures.tiff(tags, zeros)
    assert load(data, SIZE).width == 16
    assert rejected(data, Limits(max_pixels=1_000_000)).reason == "too_large"


@pytest.mark.parametrize("tag", [258, 273, 320])
def test_a_list_beyond_counting_is_too_large(tag):
    entry, values = struct.pack("<HHI", tag, 4, 300_000), bytes(4 * 300_000)
    data = pictures.good()["raw.tif"]
    at = struct.unpack_from("<I", data, 4)[0] + 2  # of the first entry
    assert rejected(data[:at] + entry + struct.pack("<I", len(data)) + data[at + 12 :] + values).reason == "too_large"


@pytest.mark.filterwarnings("ignore::UserWarning")  # as the module's own filter does outside of tests
def test_a_tiff_without_the_last_pointer_is_read():
    data = pictures.good()["fax.tif"]
    assert (load(data[:-4], SIZE).pixels == load(data, SIZE).pixels).all()


@pytest.mark.parametrize("lengths", [struct.pack(">I4sQ", 1, b"free", 0), struct.pack(">I4s", 3, b"free")])
def test_boxes_without_a_length_end_the_walk(lengths):
    assert rejected(pictures.good()["still.avif"][:-40] + lengths).reason == "truncated"


def test_long_padding_is_walked_quickly():
    assert rejected(pictures.good()["baseline.jpg"][:-300] + b"\xff" * 3_000_000).reason == "truncated"


# What else may happen


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        *(
            (kind, "unreadable")
            for kind in (OSError, SyntaxError, ValueError, struct.error, EOFError, ZeroDivisionError)
        ),
        *(
            (kind, "unreadable")
            for kind in (IndexError, KeyError, TypeError, OverflowError, AttributeError, zlib.error)
        ),
        *((kind, "unreadable") for kind in (AssertionError, RecursionError, UnicodeError, RuntimeWarning)),
        *((kind, "too_large") for kind in (MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning)),
    ],
)
def test_whatever_a_decoder_raises_is_a_rejection(raised, reason, monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", Raises(raised(f"in <BytesIO object at 0x{'7f' * 6}>")))
    error = rejected(pictures.good()["rgb.png"])
    assert error.reason == reason
    assert "0x" not in error.message


class Raises:
    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        raise self.error


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit])
def test_the_end_of_the_process_passes(raised, monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", Raises(raised()))
    with pytest.raises(raised):
        load(pictures.good()["rgb.png"], SIZE)


def mutated(data, chance):
    """Change, insert, repeat or leave out a few bytes, early ones more often."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = int(len(data) * chance.random() ** chance.choice((1, 3)))
        replaced = data[at : at + chance.choice((0, 1, 1, 1, 4, 20))]
        rubbish = chance.choice(
            (bytes(4), b"\xff" * 4, b"\x7f", b"\x80", chance.randbytes(1), chance.randbytes(9), b"")
        )
        data[at : at + len(replaced)] = rubbish
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # as the module's own filter does outside of tests
def test_mutated_files_are_pictures_or_rejections():
    chance, files = random.Random(7), list(pictures.good().values())
    limits = Limits(max_pixels=1_000_000)  # so that a large claim costs little
    outcomes = [outcome_of(mutated(chance.choice(files), chance), limits) for _ in range(3000)]
    assert all(isinstance(outcome, str) or outcome.shape == (48, 64, 3) for outcome in outcomes)
    reasons = {outcome for outcome in outcomes if isinstance(outcome, str)}
    assert reasons >= {"truncated", "unreadable", "not_an_image", "too_large", "too_small"}


def test_threads_decode_the_same():
    files = list(pictures.good().values())
    alone = [load(data, (224, 224)).pixels for data in files]
    images._transform.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: load(data, (224, 224)).pixels, files * 8))
    assert all((ours == theirs).all() for ours, theirs in zip(alone * 8, together, strict=True))


def test_without_pillow_the_extra_is_named():
    code = "import sys; sys.modules['PIL'] = None; import serving.images"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stderr
    assert said.splitlines()[-1].startswith("serving.errors.MissingExtra: decoding images needs")
    assert "lookalike[images]" in said
