import base64
import io
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jobs.drawings import draw, write_faults
from jobs.sheet import Neighbour, SheetRow, render

_VOID = {"meta", "img", "wbr"}


class _Page(HTMLParser):
    """Collects what a browser would see, and fails on tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.words.append(data.strip())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(word for word in self.words if word)


def _bytes(picture, format="JPEG", **options):
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def _opened(source):
    head, _, body = source.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(body, validate=True)))


def _shown(data):
    """Return a query's picture as its page shows it, or None where it shows none."""
    images = _Page(render("Neighbours", "", [SheetRow("query.jpg", data)])).all("img")
    return _opened(images[0]["src"]) if images else None


@pytest.fixture(scope="module")
def rows():
    cat, dog = _bytes(draw("fish", 1)), _bytes(draw("leaf", 1, (240, 320)), "PNG")
    return [
        SheetRow(
            query="gs://bucket/cats/1.jpg",
            image=cat,
            label="cat",
            neighbours=[
                Neighbour("gs://bucket/cats/2.jpg", "cat", 0.9871, cat),
                Neighbour("gs://bucket/dogs/3.jpg", "dog", 0.75, dog),
                Neighbour("gs://bucket/dogs/4.jpg", None, -0.25, None),
            ],
        ),
        SheetRow("/pictures/half.jpg", cat[: len(cat) // 2], note="the file was cut short"),
    ]


def test_the_page_stands_alone(rows):
    text = render("Neighbours", "of two queries", rows)
    page = _Page(text)
    assert page.all("html") == [{"lang": "en"}]
    assert not page.all("script")
    assert not page.all("link")
    assert "url(" not in text
    assert "@import" not in text
    assert len(page.all("img")) == 3
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert {meta.get("name") for meta in page.all("meta")} >= {"viewport"}
    assert "prefers-color-scheme: dark" in text


def test_pictures_have_names_and_sections_have_headings(rows):
    page = _Page(render("Neighbours", "", rows))
    assert [image["alt"] for image in page.all("img")] == ["Query: 1.jpg", "Neighbour: 2.jpg", "Neighbour: 3.jpg"]
    assert len(page.all("h1")) == 1
    headings = [heading["id"] for heading in page.all("h2")]
    assert headings == [section["aria-labelledby"] for section in page.all("section")] == ["query-1", "query-2"]


def test_neighbours_keep_their_order_and_show_scores(rows):
    page = _Page(render("Neighbours", "", rows))
    places = [page.text.index(word) for word in ("1.jpg", "0.987", "2.jpg", "0.750", "3.jpg", "-0.250", "4.jpg")]
    assert places == sorted(places)
    assert [bar["style"] for bar in page.all("i")] == ["width:98.7%", "width:75.0%", "width:0.0%"]


def test_a_neighbour_of_the_same_label_is_marked_in_words_too(rows):
    page = _Page(render("Neighbours", "", rows))
    assert [card.get("class") for card in page.all("li")] == ["same", None, None]
    assert [mark["aria-label"] for mark in page.all("span")] == ["same label as the query:"]
    assert "1 of 3 have its label" in page.text


def test_without_a_label_nothing_is_marked_or_counted():
    row = SheetRow("a.jpg", None, [Neighbour("b.jpg", None, 0.5, None), Neighbour("c.jpg", "cat", 0.4, None)])
    page = _Page(render("Neighbours", "", [row]))
    assert [card.get("class") for card in page.all("li")] == [None, None]
    assert "have its label" not in page.text


def test_missing_pictures_are_placeholders_that_say_why(rows):
    page = _Page(render("Neighbours", "", rows))
    assert sum("missing" in div.get("class", "") for div in page.all("div")) == 2
    assert "no picture at hand" in page.text
    assert "truncated" in page.text
    assert "the file was cut short" in page.text
    assert "No neighbours to show." in page.text


def test_every_string_is_escaped():
    evil = "<script>alert('1')</script>\"&$title"
    row = SheetRow(evil, None, [Neighbour(evil, evil, 1.0, _bytes(draw("maze", 1)))], label=evil, note=evil)
    text = render(evil, evil, [row], warning=evil)
    page = _Page(text)
    assert not page.all("script")
    assert "<script" not in text
    assert "alert('1')" in page.text
    assert page.all("img")[0]["alt"] == f"Neighbour: {evil.rpartition('/')[2]}"
    assert page.all("p")[-1]["title"] == evil


def test_a_name_that_is_no_utf8_can_be_written():
    render("Neighbours", "", [SheetRow("caf\udce9.jpg", None)]).encode("utf-8")


def test_the_warning_is_a_banner_above_the_title(rows):
    text = render("Neighbours", "of two queries", rows, warning="untrained weights")
    assert text.index("untrained weights") < text.index("<h1>")
    assert 'class="warning"' not in render("Neighbours", "of two queries", rows)


def test_no_queries_is_a_page_too():
    assert "There are no queries." in _Page(render("Neighbours", "", iter(()))).text


def test_a_picture_is_shrunk_to_fit_and_keeps_the_proportions():
    assert _shown(_bytes(draw("city", 2, (640, 400)))).size == (320, 200)
    assert _shown(_bytes(draw("city", 2, (400, 640)), "WEBP")).size == (200, 320)
    assert _shown(_bytes(draw("city", 2, (40, 20)), "PNG")).size == (40, 20), "enlarged"
    assert _shown(_bytes(draw("city", 2, (1000, 10)), "PNG")).size == (320, 3)


def test_a_shrunk_picture_looks_like_itself():
    picture = draw("balloon", 3, (640, 480))
    shown = np.asarray(_shown(_bytes(picture, quality=95)), float)
    assert np.abs(shown - np.asarray(picture.resize((320, 240)), float)).mean() < 4


def test_a_picture_is_upright_and_carries_nothing_private():
    picture = Image.new("RGB", (64, 32), "red")
    picture.paste("blue", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"  # to be turned by a quarter, clockwise
    upright = _shown(_bytes(picture, exif=exif, comment=b"taken at home"))
    assert upright.size == (32, 64)
    assert upright.getpixel((16, 8))[2] > 200
    assert upright.getpixel((16, 56))[0] > 200
    assert not upright.getexif()
    assert "comment" not in upright.info


def test_transparency_is_shown_on_white():
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert _shown(_bytes(clear, "PNG")).getpixel((16, 16)) == (255, 255, 255)


def test_a_bomb_is_refused():
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    parts = [header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
    )
    assert _shown(data) is None
    assert "too large" in _Page(render("Neighbours", "", [SheetRow("bomb.png", data)])).text


def test_no_fault_raises(tmp_path):
    write_faults(tmp_path)
    assert [_shown(path.read_bytes()) for path in tmp_path.iterdir()] == [None] * len(list(tmp_path.iterdir()))
    assert _shown(None) is None


def test_damaged_pictures_never_raise():
    rng, data = np.random.default_rng(0), _bytes(draw("flower", 1))
    for _ in range(100):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 10):
            broken[at] = rng.integers(256)
        _shown(bytes(broken[: rng.integers(1, len(data))]))
