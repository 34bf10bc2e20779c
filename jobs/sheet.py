"""A contact sheet in HTML: each query beside its neighbours, with scores.

One page that stands alone: styles and pictures are inside it, there are no scripts, and it asks for nothing.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from string import Template

from PIL import Image

from serving import images
from serving.errors import ImageRejected
from serving.storage import name_of


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One answer: the bytes of its picture, where they could be read, and a score of at most 1."""

    uri: str
    label: str | None
    score: float
    image: bytes | None


@dataclass(frozen=True, slots=True)
class SheetRow:
    """One query and its neighbours, best first; `note` says what else is to say, or why there are none."""

    query: str
    image: bytes | None
    neighbours: Sequence[Neighbour] = ()
    label: str | None = None
    note: str = ""


def render(title: str, subtitle: str, rows: Iterable[SheetRow], warning: str | None = None) -> str:
    """Return the page; `warning` stands above everything else."""
    return _PAGE.substitute(
        style=_STYLE,
        title=_text(title),
        subtitle=f"<p>{_text(subtitle)}</p>" if subtitle else "",
        warning=f'<p class="warning" role="note"><strong>Warning:</strong> {_text(warning)}</p>' if warning else "",
        rows="\n".join(_row(number, row) for number, row in enumerate(rows, 1)) or "<p>There are no queries.</p>",
    )


def _shrink(data: bytes, side: int) -> str:
    # The decoder stretches to a square: a generous one, from which the picture's own proportions are cut back.
    picture = images.load(data, (2 * side, 2 * side))
    scale = min(1, side / max(picture.width, picture.height))
    size = max(1, round(scale * picture.width)), max(1, round(scale * picture.height))
    out = io.BytesIO()
    Image.fromarray(picture.pixels).resize(size).save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _row(number: int, row: SheetRow) -> str:
    cards = "\n".join(_card(row.label, neighbour) for neighbour in row.neighbours)
    same = sum(neighbour.label == row.label for neighbour in row.neighbours)
    tally = f"{same} of {len(row.neighbours)} have its label" if row.label is not None and row.neighbours else ""
    uri = _text(row.query).replace("/", "/<wbr>") if name_of(row.query) != row.query else ""
    details = "".join(f"<p>{line}</p>" for line in (tally, _text(row.note), uri) if line)
    return f"""<section aria-labelledby="query-{number}">
<div class="query">
{_picture(row.image, "Query", row.query, 320)}
<div>
<h2 id="query-{number}"><small>Query {number}</small> {_text(name_of(row.query))}</h2>
{_chip(row.label)}
{details}
</div>
</div>
{f"<ol>{cards}</ol>" if cards else '<p class="none">No neighbours to show.</p>'}
</section>"""


def _card(wanted: str | None, neighbour: Neighbour) -> str:
    same = wanted is not None and neighbour.label == wanted
    width = 100 * min(max(neighbour.score, 0.0), 1.0)
    return f"""<li{' class="same"' if same else ""}>
{_picture(neighbour.image, "Neighbour", neighbour.uri, 240)}
<p class="score">{neighbour.score:.3f}</p>
<div class="bar" aria-hidden="true"><i style="width:{width:.1f}%"></i></div>
{_chip(neighbour.label, same)}
<p class="name" title="{_text(neighbour.uri)}">{_text(name_of(neighbour.uri))}</p>
</li>"""


def _picture(data: bytes | None, role: str, uri: str, side: int) -> str:
    if data is None:
        return '<div class="picture missing">no picture at hand</div>'
    try:
        source = _shrink(data, side)
    except ImageRejected as error:
        return f'<div class="picture missing">{_text(error.reason.replace("_", " "))}</div>'
    return f'<img class="picture" src="{source}" alt="{_text(f"{role}: {name_of(uri)}")}">'


def _chip(label: str | None, same: bool = False) -> str:
    if label is None:
        return ""
    mark = '<span role="img" aria-label="same label as the query:">✓</span> ' if same else ""
    return f'<p class="chip">{mark}{_text(label)}</p>'


def _text(text: str) -> str:
    # A name from a disk may hold what UTF-8 cannot write.
    return escape(text.encode("utf-8", "backslashreplace").decode("utf-8"))


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
$warning
<h1>$title</h1>
$subtitle
</header>
<main>
$rows
</main>
</body>
</html>
""")

_STYLE = """
:root { color-scheme: light dark; --page: #f5f4f0; --card: #fff; --ink: #1d1c1a; --soft: #5f5b54; --line: #e1ddd4;
  --well: #eceae4; --accent: #3451c6; --same: #17693f; --tint: #dcf1e4; --alarm: #7a3d00; --alert: #ffedc9 }
@media (prefers-color-scheme: dark) {
  :root { --page: #141517; --card: #1e2023; --ink: #eceae6; --soft: #a9a59d; --line: #33363b;
    --well: #2a2c31; --accent: #93a8ff; --same: #7fdcaa; --tint: #173626; --alarm: #ffd48a; --alert: #3d2c0c }
}
* { box-sizing: border-box; margin: 0 }
body { background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, sans-serif;
  padding: clamp(12px, 3vw, 40px) }
header, main { max-width: 1360px; margin: 0 auto }
h1 { font-size: clamp(1.4rem, 3.5vw, 2rem); line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere }
header p { color: var(--soft); margin-top: 4px }
header .warning { color: var(--alarm); background: var(--alert); border-left: 4px solid; border-radius: 6px;
  padding: 10px 14px; margin: 0 0 20px }
section { display: grid; grid-template-columns: 240px 1fr; gap: 24px; align-items: start;
  border-top: 1px solid var(--line); padding: 24px 0; margin-top: 24px }
section + section { margin-top: 0 }
.picture { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--well);
  border-radius: 6px }
.missing { display: grid; place-items: center; padding: 8px; text-align: center; color: var(--soft); font-size: 13px;
  outline: 1px dashed var(--soft); outline-offset: -6px }
.query { position: sticky; top: 16px; background: var(--card); border: 2px solid var(--accent); border-radius: 12px;
  padding: 10px; display: grid; gap: 10px }
.query div { min-width: 0 }
.query p { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; margin-top: 4px }
h2 { font-size: 1rem; line-height: 1.3; overflow-wrap: anywhere }
h2 small { display: block; color: var(--accent); font-size: 11px; letter-spacing: .08em; text-transform: uppercase }
ol { list-style: none; padding: 0; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) }
li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 8px; min-width: 0 }
.same { border-color: var(--same) }
.score { font-size: 1.05rem; font-weight: 600; font-variant-numeric: tabular-nums; margin-top: 6px }
.bar { height: 3px; background: var(--well); border-radius: 2px; overflow: hidden; margin: 2px 0 6px }
.bar i { display: block; height: 100%; background: var(--soft) }
.same .bar i { background: var(--same) }
.chip, .query .chip { display: inline-block; max-width: 100%; background: var(--well); color: var(--ink);
  font-size: 12px; border-radius: 99px; padding: 1px 9px; overflow-wrap: anywhere }
.same .chip { background: var(--tint); color: var(--same) }
.name { color: var(--soft); font-size: 12px; overflow-wrap: anywhere; margin-top: 4px }
.none { color: var(--soft) }
@media (max-width: 720px) {
  section { grid-template-columns: 1fr; gap: 12px; padding: 16px 0 }
  .query { position: static; grid-template-columns: 112px 1fr }
  ol { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 8px }
  li { padding: 6px }
}
"""
