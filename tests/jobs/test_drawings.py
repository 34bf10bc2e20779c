import hashlib
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from jobs import drawings
from jobs.drawings import KINDS, draw, write_collection, write_faults
from serving import images
from serving.errors import ImageRejected, UsageError


def _digest(picture):
    return hashlib.sha256(picture.tobytes()).hexdigest()


def _features(picture):
    """Describe a picture by what any textbook would: a colour histogram and one of edge directions."""
    small = np.asarray(picture.resize((64, 64)), np.float64) / 255
    bins = (small * 3.999).astype(int)
    colors = np.bincount((bins @ [16, 4, 1]).ravel(), minlength=64) / bins[..., 0].size
    down, right = np.gradient(small.mean(axis=2))
    turns = ((np.arctan2(down, right) / np.pi % 1) * 8).astype(int) % 8
    edges = np.bincount(turns.ravel(), np.hypot(down, right).ravel(), minlength=8)
    return np.concatenate([np.sqrt(colors), np.sqrt(edges / (edges.sum() + 1e-9)), [np.hypot(down, right).mean() * 10]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides_the_pixels(kind):
    first = draw(kind, 7)
    assert _digest(draw(kind, 7)) == _digest(first)
    assert _digest(draw(kind, 8)) != _digest(first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 48), (90, 160), (200, 200)])
def test_every_kind_draws_at_every_shape(kind, size):
    for seed in range(4):
        picture = draw(kind, seed, size)
        assert (picture.mode, picture.size) == ("RGB", size)
        assert np.asarray(picture).std() > 5, "a blank picture"


def test_drawing_leaves_the_global_random_state_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    draw("maze", 1)
    assert (np.random.get_state()[1] == before).all()


def test_an_unknown_kind_is_named_with_the_known_ones():
    with pytest.raises(UsageError, match="'dog' is no kind of drawing; there are balloon, citrus"):
        draw("dog", 0)


def test_kinds_can_be_told_apart_but_not_by_colours_and_edges_alone():
    each = 16
    features = np.array([_features(draw(kind, seed, (160, 120))) for kind in KINDS for seed in range(each)])
    labels = np.repeat(np.arange(len(KINDS)), each)
    distances = np.linalg.norm(features[:, None] - features[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    precision = (labels[distances.argmin(axis=1)] == labels).mean()
    assert 0.5 < precision < 0.95, "chance is 1 in 12"


def test_a_collection_is_one_folder_a_kind_and_kinds_take_turns(tmp_path):
    count = 2 * len(KINDS) + 3
    paths = list(write_collection(tmp_path, count))
    assert [path.parent.name for path in paths] == [*KINDS, *KINDS, *KINDS[:3]]
    assert paths[0] == tmp_path / "balloon" / "balloon-00001.jpg"
    assert paths[len(KINDS)].name == "balloon-00002.jpg"
    assert sorted(paths) == sorted(path for path in tmp_path.rglob("*") if path.is_file())


def test_a_collection_holds_several_formats_and_shapes_that_decode(tmp_path):
    paths = list(write_collection(tmp_path, 14 * len(KINDS)))
    seen = set()
    for path in paths[:: len(KINDS)]:
        with Image.open(path) as picture:
            seen.add((path.suffix, picture.format))
        images.load(path.read_bytes(), (32, 32))
    assert seen == {(".jpg", "JPEG"), (".png", "PNG"), (".webp", "WEBP")}
    assert len({images.load(p.read_bytes(), (8, 8)).width for p in paths[:: len(KINDS)]}) >= 3


def test_pictures_of_a_collection_all_differ_and_depend_on_the_seed(tmp_path):
    first, again, other = (
        [path.read_bytes() for path in write_collection(tmp_path / name, 30, seed)]
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again
    assert len({*first, *other}) == 60


def test_an_interrupted_collection_is_completed_and_the_rest_left_alone(tmp_path):
    writing = write_collection(tmp_path, 20)
    done = [next(writing) for _ in range(5)]
    assert all(path.exists() for path in done), "yielded before it was written"
    writing.close()
    done[2].write_bytes(b"mine")
    stamps = [path.stat().st_mtime_ns for path in done]
    paths = list(write_collection(tmp_path, 20))
    assert paths[:5] == done
    assert [path.stat().st_mtime_ns for path in done] == stamps
    assert done[2].read_bytes() == b"mine"
    assert all(path.exists() for path in paths)


def test_a_failed_write_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    monkeypatch.setattr(drawings, "_encode", lambda *_: pytest.fail("reached the encoder"))
    with pytest.raises(pytest.fail.Exception):
        next(write_collection(tmp_path, 1))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("count", "seed"), [(-1, 0), (3, -1)])
def test_negative_numbers_are_refused(tmp_path, count, seed):
    with pytest.raises(UsageError, match="0 or more"):
        next(write_collection(tmp_path, count, seed))


def test_faults_are_rejected_for_the_reasons_they_promise(tmp_path):
    expected = write_faults(tmp_path)
    assert sorted(expected) == sorted(path.name for path in tmp_path.iterdir())
    for name, reason in expected.items():
        with pytest.raises(ImageRejected) as caught:
            images.load((tmp_path / name).read_bytes(), (32, 32))
        assert (name, caught.value.reason) == (name, reason)


def test_faults_are_what_their_names_say(tmp_path):
    write_faults(tmp_path)
    data = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert data["empty.jpg"] == b""
    assert data["half.jpg"].startswith(b"\xff\xd8\xff")
    assert not data["half.jpg"].endswith(b"\xff\xd9")
    assert data["note.jpg"].decode("ascii").strip().isprintable()
    assert int.from_bytes(data["bomb.png"][16:20]) == 60_000
    assert len(data["bomb.png"]) < 100


def test_faults_are_written_once(tmp_path):
    write_faults(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write_faults(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps


def test_neighbouring_seeds_are_no_near_duplicates():
    for kind in KINDS:
        small = [np.asarray(draw(kind, seed).resize((16, 16)), float) for seed in range(8)]
        assert min(np.abs(a - b).mean() for a, b in pairwise(small)) > 4, kind
