"""Folders of as many pictures as a benchmark asks for."""

import itertools
import os
from pathlib import Path

from jobs import drawings

_DRAWN = 240


def lay_out(folder: Path, count: int) -> Path:
    """Link pictures under `count` names below `folder`: the labelled photos where there are any, else drawings."""
    folder.mkdir(parents=True)
    sources = find_pictures(folder.with_name(f"{folder.name}-drawn"), min(count, _DRAWN))
    for number, source in zip(range(count), itertools.cycle(sources), strict=False):
        os.symlink(source, folder / f"{number:06}{source.suffix}")
    return folder


def find_pictures(folder: Path, count: int) -> list[Path]:
    """Return the photos named by LOOKALIKE_PHOTOS, in an order that mixes the labels, or `count` drawings."""
    photos = os.environ.get("LOOKALIKE_PHOTOS")
    if photos:
        return sorted(Path(photos).absolute().rglob("*.jpg"), key=lambda path: path.stem)
    return list(drawings.write_collection(folder, count))


def source() -> str:
    """Say what the pictures are."""
    return "photos" if os.environ.get("LOOKALIKE_PHOTOS") else "drawings"
