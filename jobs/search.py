"""Find the nearest indexed images of some pictures.

lookalike search --index index/ --image shoe.jpg -k 5
lookalike search --index index/ --image *.jpg --html neighbours.html
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs import cli
from jobs.options import option, parse
from jobs.sheet import Neighbour, SheetRow, render
from jobs.writing import write_text
from serving import Hit, Index, storage
from serving.errors import ImageRejected, LookalikeError, StorageError, UsageError


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `lookalike search`."""

    index: str = option("the index to ask")
    image: tuple[str, ...] = option("pictures to ask with: paths or URIs", metavar="FILE")
    k: int = option("neighbours a picture", 10)
    label: tuple[str, ...] = option("search among images of these labels alone", (), metavar="LABEL")
    json: bool = option("print JSON, one document", False)
    html: str | None = option("write a self-contained contact sheet here", None, metavar="OUT")
    version: str | None = option("ask this version instead of the current one", None)


@dataclass(frozen=True, slots=True)
class Answer:
    """A query, and its neighbours or what was wrong with it."""

    query: str
    image: bytes | None
    hits: Sequence[Hit]
    error: str | None = None


def main(argv: Sequence[str]) -> int:
    """Run the job; exit 1 when a picture could not be used, after answering for the others."""
    options, _ = parse(Options, argv, "search", __doc__ or "")
    if options.k < 1:
        raise UsageError(f"-k is {options.k}; ask for at least one neighbour")
    if options.html is not None and storage.scheme_of(options.html) != "file":
        raise UsageError(f"--html is {options.html}; a contact sheet is written to a path on this machine")
    index = Index.open(options.index, version=options.version)
    answers = [ask(index, storage.normalize(image), options.k, options.label) for image in options.image]
    print(as_json(answers) if options.json else as_text(answers))
    if index.info.embedder.untrained:
        print("lookalike search: this index's weights are untrained (random)", file=sys.stderr)
    if options.html is not None:
        write_text(options.html, sheet(index, answers), "--html")
    return 1 if any(answer.error for answer in answers) else 0


def ask(index: Index, uri: str, k: int, labels: Sequence[str] = ()) -> Answer:
    """Read one picture and search for it, among the images of some labels where they are given."""
    try:
        data = storage.read(uri)
    except StorageError as error:
        return Answer(uri, None, (), str(error))
    try:
        return Answer(uri, data, index.search_images([data], k, labels=labels or None)[0])
    except ImageRejected as error:
        return Answer(uri, data, (), f"{uri} cannot be used, {error.reason}: {error.message}")


def as_text(answers: Sequence[Answer]) -> str:
    """Lay answers out for reading."""
    lines = []
    for answer in answers:
        lines.append(answer.query if answer.error is None else answer.error)
        for rank, hit in enumerate(answer.hits, 1):
            lines.append(f"  {rank:>3}  {hit.score:.4f}  {hit.uri}" + (f"  [{hit.label}]" if hit.label else ""))
    return "\n".join(lines)


def as_json(answers: Sequence[Answer]) -> str:
    """Lay answers out for programs: a list with `query`, `hits` (uri, label, score, row) and `error`."""
    body = [
        {"query": answer.query, "error": answer.error, "hits": [hit._asdict() for hit in answer.hits]}
        for answer in answers
    ]
    return json.dumps(body, indent=1, ensure_ascii=False)


def sheet(index: Index, answers: Sequence[Answer], labels: dict[str, str | None] | None = None) -> str:
    """Draw answers as a contact sheet; `labels` of queries, where they are known, mark right neighbours."""
    info = index.info
    rows = [
        SheetRow(
            query=answer.query,
            image=answer.image,
            note=answer.error or "",
            label=(labels or {}).get(answer.query),
            neighbours=[Neighbour(hit.uri, hit.label, hit.score, _picture(hit.uri)) for hit in answer.hits],
        )
        for answer in answers
    ]
    subtitle = f"{info.rows:,} images, {info.embedder.backbone}, {info.kind}, version {info.version}"
    warning = (
        "The weights are untrained (random): neighbours share looks, not meaning." if info.embedder.untrained else None
    )
    return render("Nearest neighbours", subtitle, rows, warning=warning)


def _picture(uri: str) -> bytes | None:
    try:
        return storage.read(uri)
    except (LookalikeError, TimeoutError):
        return None


if __name__ == "__main__":
    sys.exit(cli.main(["search", *sys.argv[1:]]))
