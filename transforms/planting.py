"""Queries whose answer is known without labels: indexed pictures, cropped and encoded again."""

import io

from PIL import Image

from serving import storage
from serving.errors import ImageRejected, StorageError
from serving.images import load
from serving.index import Index

PICTURES = 50

_LONGEST = 512
"""Pixels of a query's longer side before it is cropped; embedders look at fewer."""
_CROP = 0.9
_QUALITY = 70
_TIE = 1e-6
_TRIED = 4
"""Pictures looked at for each that is wanted: some may be gone or have changed since they were indexed."""


def disturb(data: bytes) -> list[bytes]:
    """Return a picture cropped to nine tenths of both sides, and one encoded as JPEG of quality 70."""
    first = load(data, (1, 1))
    scale = min(1.0, _LONGEST / max(first.width, first.height))
    sides = (max(1, round(first.height * scale)), max(1, round(first.width * scale)))
    picture = Image.fromarray(load(data, sides).pixels)
    left, top = (round(side * (1 - _CROP) / 2) for side in picture.size)
    cropped = picture.crop((left, top, picture.width - left, picture.height - top))
    return [_encoded(cropped, "BMP"), _encoded(picture, "JPEG", quality=_QUALITY)]


def share_found(index: Index, pictures: int = PICTURES) -> float:
    """Return the share of disturbed pictures that find their own original first; 0 if no picture can be read.

    They are those of least uri hash, which are an index's first rows, so that a growing collection keeps most of them.
    A picture as near as the first, such as a copy under another name, does not count against it.
    """
    queries: list[bytes] = []
    own: list[str] = []
    for row in range(min(len(index), _TRIED * pictures)):
        record = index.record(row)
        try:
            disturbed = disturb(storage.read(record.uri, record.etag))
        except (StorageError, ImageRejected):
            continue
        queries += disturbed
        own += [record.uri] * len(disturbed)
        if len(set(own)) == pictures:
            break
    if not queries:
        return 0.0
    answers = index.search(index.embedder.embed_images(queries), 10)
    found = [
        any(hit.uri == uri and hit.score >= hits[0].score - _TIE for hit in hits)
        for hits, uri in zip(answers, own, strict=True)
    ]
    return sum(found) / len(found)


def _encoded(picture: Image.Image, kind: str, **options: int) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()
