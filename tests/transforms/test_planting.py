import io
import shutil

import numpy as np
import pictures
import pytest
from PIL import Image
from real import embed_folder

from pipelines.index import run
from pipelines.runner import Runner
from pipelines.training import IndexRequest
from serving import Index
from serving.errors import ImageRejected
from transforms.planting import disturb, share_found


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_a_picture_is_cropped_and_encoded_again():
    sink = io.BytesIO()
    pictures.scene().resize((640, 480)).save(sink, "PNG")
    cropped, encoded = map(opened, disturb(sink.getvalue()))
    assert encoded.size == (512, 384)
    assert cropped.size == (460, 346)  # nine tenths of the middle
    assert np.abs(np.asarray(cropped)[0, 0].astype(int) - pictures.RED).max() <= 2
    assert np.abs(np.asarray(encoded)[-20, -20].astype(int) - pictures.YELLOW).max() <= 12


def test_a_small_picture_is_not_made_larger():
    sink = io.BytesIO()
    pictures.scene().save(sink, "PNG")
    assert [opened(data).size for data in disturb(sink.getvalue())] == [(58, 44), (64, 48)]


def test_a_bad_picture_has_no_disturbed_ones():
    with pytest.raises(ImageRejected):
        disturb(b"no picture")


@pytest.fixture(scope="module")
def built(drawn, artifact, tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    shutil.copytree(drawn, root / "images")
    for path in sorted((root / "images" / "maze").iterdir()):  # copies are as near as their originals
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    embed_folder(root / "images", root / "store", artifact)
    run(IndexRequest(str(root / "store"), str(root / "index")), Runner())
    return root


def test_disturbed_pictures_find_their_originals(built):
    assert share_found(Index.open(str(built / "index"))) >= 0.9


def test_pictures_that_are_gone_or_have_changed_are_passed_over(built, tmp_path):
    index = Index.open(str(built / "index"))
    root = shutil.copytree(built / "images", tmp_path / "images")
    for number in range(len(index)):
        uri = index.record(number).uri
        if number % 2:
            (built / uri).unlink()
    try:
        assert share_found(index, 20) >= 0.9
        shutil.rmtree(built / "images")
        assert share_found(index) == 0.0
    finally:
        shutil.copytree(root, built / "images", dirs_exist_ok=True)
