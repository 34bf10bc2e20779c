"""The frozen embedder: its name, its vectors, and every way its artifact can be wrong."""

import dataclasses
import functools
import gc
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import signed

from serving import storage
from serving.embedder import (
    DESCRIPTION,
    MODEL,
    Embedder,
    EmbedderDocument,
    EmbedderSpec,
    copy_artifact,
    open_cached,
    read_description,
    write_artifact,
)
from serving.errors import (
    ChecksumMismatch,
    EmbedderMismatch,
    FormatError,
    ImageRejected,
    MissingExtra,
    NotFound,
    UsageError,
)

SPEC = EmbedderSpec("mobilenet", "avg", "untrained:seed=0", "tf", (224, 224), 1024, "1: some recipe")
BATCH = 6


@pytest.fixture(scope="module")
def embedder(artifact: str) -> Embedder:
    return Embedder.open(artifact)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (BATCH, 224, 224, 3), np.uint8)


@pytest.fixture(scope="module")
def vectors(embedder: Embedder, pixels: np.ndarray) -> np.ndarray:
    return embedder.embed(pixels)


@pytest.fixture
def copied(artifact: str, tmp_path: Path) -> Path:
    """An artifact that a test may damage."""
    return Path(shutil.copytree(artifact, tmp_path / Path(artifact).name))


def edit(description: Path, change: dict[str, Any], spec: dict[str, Any]) -> None:
    signed.edit(description, **change, spec=spec)


# --- Its name -------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_a_function_of_the_content():
    """It names files, so it must never change between releases."""
    assert SPEC.fingerprint == dataclasses.replace(SPEC).fingerprint == "5897f1959c397d12"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EmbedderSpec)])
def test_every_field_changes_the_fingerprint(field):
    value = getattr(SPEC, field)
    other = {int: 512, str: f"{value}x", tuple: (224, 225), type(None): "a hash"}[type(value)]
    assert dataclasses.replace(SPEC, **{field: other}).fingerprint != SPEC.fingerprint


def test_height_and_width_are_told_apart():
    tall, wide = (dataclasses.replace(SPEC, input_size=size).fingerprint for size in ((10, 20), (20, 10)))
    assert tall != wide


@pytest.mark.parametrize(("weights", "untrained"), [("untrained:seed=3", True), ("imagenet:0123", False)])
def test_manifests_record_who_made_the_vectors(weights, untrained):
    ref = dataclasses.replace(SPEC, weights=weights).ref
    assert (ref.backbone, ref.weights, ref.untrained) == ("mobilenet/avg", weights, untrained)
    assert ref.fingerprint == dataclasses.replace(SPEC, weights=weights).fingerprint


def test_the_description_survives_a_round_trip(artifact):
    document = read_description(artifact)
    assert EmbedderDocument.from_json(document.to_json(), "uri") == document
    assert document.fingerprint == document.spec.fingerprint == Path(artifact).name
    assert document.spec.input_size == (224, 224)
    assert document.model.size == Path(artifact, MODEL).stat().st_size


# --- Its vectors ----------------------------------------------------------------------------------------------------


def test_vectors_have_the_shape_that_is_described(embedder, vectors):
    assert vectors.shape == (BATCH, embedder.spec.dim)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert len(np.unique(vectors, axis=0)) == BATCH


def test_a_vector_depends_on_its_picture_alone(embedder, pixels, vectors):
    for number, picture in enumerate(pixels):
        np.testing.assert_array_equal(embedder.embed(picture[np.newaxis])[0], vectors[number])
    np.testing.assert_array_equal(embedder.embed(pixels[::-1]), vectors[::-1])
    np.testing.assert_array_equal(embedder.embed(pixels[::2]), vectors[::2])


def test_earlier_vectors_are_not_overwritten(embedder, pixels, vectors):
    first = embedder.embed(pixels[:1])
    embedder.embed(pixels[1:])
    np.testing.assert_array_equal(first[0], vectors[0])


def test_pixels_may_lie_in_memory_as_they_like(embedder, pixels, vectors):
    mirrored = np.ascontiguousarray(pixels[:1, :, ::-1])
    np.testing.assert_array_equal(embedder.embed(mirrored[:, :, ::-1]), vectors[:1])
    frozen = np.frombuffer(pixels[:1].tobytes(), np.uint8).reshape(1, 224, 224, 3)
    np.testing.assert_array_equal(embedder.embed(frozen), vectors[:1])


def test_threads_share_an_embedder(embedder, pixels, vectors):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(embedder.embed, [pixels] * 8))
    for of_one in found:
        np.testing.assert_array_equal(of_one, vectors)


def test_an_embedder_outlives_its_files(copied, pixels, vectors):
    embed = Embedder.open(str(copied)).embed
    shutil.rmtree(copied)
    gc.collect()
    np.testing.assert_array_equal(embed(pixels[:1]), vectors[:1])


def test_no_picture_no_vector(embedder):
    assert embedder.embed(np.empty((0, 224, 224, 3), np.uint8)).shape == (0, 1024)
    assert embedder.embed_images([]).shape == (0, 1024)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 224, 224, 3), np.float32),
        np.zeros((1, 224, 224, 3), np.int8),
        np.zeros((1, 224, 225, 3), np.uint8),
        np.zeros((1, 224, 224, 4), np.uint8),
        np.zeros((1, 3, 224, 224), np.uint8),
        np.zeros((224, 224, 3), np.uint8),
        np.zeros((), np.uint8),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_wrong_pixels_are_refused(embedder, wrong):
    sentence = f"pixels are {wrong.dtype} {wrong.shape}; this embedder takes uint8 (N, 224, 224, 3)"
    with pytest.raises(UsageError, match=re.escape(sentence)):
        embedder.embed(wrong)


def test_encoded_pictures_are_decoded_by_the_recipe(embedder):
    from serving.images import load

    encoded = [pictures.encode(pictures.scene(), kind) for kind in ("PNG", "JPEG", "BMP")]
    pixels = np.stack([load(data, (224, 224)).pixels for data in encoded])
    np.testing.assert_array_equal(embedder.embed_images(encoded), embedder.embed(pixels))


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"text", "not_an_image")])
def test_a_bad_picture_is_named_by_its_place(embedder, data, reason):
    good = pictures.encode(pictures.scene(), "PNG")
    with pytest.raises(ImageRejected, match=f"{reason}: image 2 of 3: ") as raised:
        embedder.embed_images([good, data, good])
    assert raised.value.reason == reason


def test_a_missing_engine_names_the_extra(embedder, monkeypatch, pixels):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(MissingExtra, match=r'pip install "lookalike\[images\]"'):
        Embedder.of_model(embedder.spec, b"model").embed(pixels)


# --- Its artifact ---------------------------------------------------------------------------------------------------


def test_a_damaged_model_is_refused(copied):
    model = copied / MODEL
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    with pytest.raises(ChecksumMismatch, match=f"{model} is damaged"):
        Embedder.open(str(copied))
    model.write_bytes(data[:-1])
    with pytest.raises(ChecksumMismatch, match=f"{model} has .* bytes"):
        Embedder.open(str(copied))


@pytest.mark.parametrize("missing", [MODEL, DESCRIPTION])
def test_a_missing_file_is_named(copied, missing):
    (copied / missing).unlink()
    with pytest.raises(NotFound, match=f"{copied / missing} does not exist"):
        Embedder.open(str(copied))


def test_a_renamed_folder_is_another_embedder(copied):
    renamed = copied.rename(copied.with_name("other"))
    with pytest.raises(EmbedderMismatch, match=f"its content makes {copied.name}, its folder is called other"):
        Embedder.open(str(renamed))
    renamed.rename(copied)
    assert Embedder.open(f"{copied}/").fingerprint == copied.name


@pytest.mark.parametrize(
    ("change", "spec", "sentence"),
    [
        ({"fingerprint": "0" * 16}, {}, f"it names {'0' * 16}"),
        ({}, {"weights": "imagenet:forged"}, "another embedder: its content makes"),
        ({}, {"input_size": [224, 225]}, "another embedder: its content makes"),
    ],
)
def test_an_edited_description_is_another_embedder(copied, change, spec, sentence):
    edit(copied / DESCRIPTION, change, spec)
    with pytest.raises(EmbedderMismatch, match=sentence):
        Embedder.open(str(copied))


def test_what_runs_in_a_garbage_model_is_said(pixels):
    with pytest.raises(FormatError, match=f"model of the embedder {SPEC.fingerprint} cannot be run"):
        Embedder.of_model(SPEC, b"garbage").embed(pixels)


@pytest.mark.parametrize("change", [{"dim": 7}, {"input_size": (96, 96)}])
def test_a_model_of_another_shape_is_refused(artifact, change):
    spec = dataclasses.replace(SPEC, **change)
    sentence = r"takes uint8 \(1, 224, 224, 3\) and gives float32 \(1, 1024\), not what its description says"
    with pytest.raises(FormatError, match=sentence):
        Embedder.of_model(spec, Path(artifact, MODEL).read_bytes()).embed(np.zeros((1, *spec.input_size, 3), np.uint8))


def test_an_artifact_is_opened_once_a_process(artifact):
    assert open_cached(artifact) is open_cached(artifact)


write = functools.partial(write_artifact, spec=SPEC, built_with={"keras": "3"})


def test_an_export_that_was_cut_short_is_finished(tmp_path):
    """The model was written and its description was not: the one that is there is described."""
    storage.create(str(tmp_path / SPEC.fingerprint / MODEL), b"first export")
    uri = write(str(tmp_path), model=b"second export, of other bytes")
    assert uri == str(tmp_path / SPEC.fingerprint)
    assert read_description(uri).model.read(uri) == b"first export"


def test_an_artifact_is_written_once(tmp_path):
    uri = write(str(tmp_path), model=b"first")
    before = Path(uri, DESCRIPTION).read_bytes()
    assert write(str(tmp_path), model=b"second", built_with={"keras": "4"}) == uri
    assert Path(uri, DESCRIPTION).read_bytes() == before
    assert read_description(uri).model.read(uri) == b"first"


def test_a_copy_is_the_same_artifact(tmp_path):
    source = write(str(tmp_path / "a"), model=b"model")
    copy = copy_artifact(source, str(tmp_path / "b"))
    assert copy == str(tmp_path / "b" / SPEC.fingerprint)
    assert read_description(copy) == read_description(source)
    assert Path(copy, MODEL).read_bytes() == b"model"


def test_a_copy_that_was_cut_short_is_finished(tmp_path):
    source = write(str(tmp_path / "a"), model=b"model")
    storage.create(str(tmp_path / "b" / SPEC.fingerprint / MODEL), b"model")
    copy = copy_artifact(source, str(tmp_path / "b"))
    assert read_description(copy) == read_description(source)


def test_an_artifact_that_is_there_is_not_copied_again(tmp_path):
    source = write(str(tmp_path / "a"), model=b"model")
    copy = copy_artifact(source, str(tmp_path / "b"))
    Path(source, MODEL).unlink()
    assert copy_artifact(source, str(tmp_path / "b")) == copy


def test_a_damaged_artifact_is_not_copied(tmp_path):
    source = write(str(tmp_path / "a"), model=b"model")
    Path(source, MODEL).write_bytes(b"modem")
    with pytest.raises(ChecksumMismatch):
        copy_artifact(source, str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()
