"""Int8: the sample it is calibrated on, what is measured of it, and that a store keeps it."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import signed
from real import photos_folder, weights_file

from jobs import backbones, calibration, cli
from jobs.calibration import Sample, describe, draw, export, find, measure, split
from serving.embedder import DESCRIPTION, Embedder, EmbedderSpec, copy_artifact, read_description, write_artifact
from serving.errors import UsageError
from serving.images import Limits
from serving.manifest import load_run_manifest
from transforms.listing import Listing
from transforms.schema import uri_hash

MOBILENET_V2 = "mobilenet_v2_1.0_224_no_top_bnfolded.h5"
SIZE = (8, 8)
SPEC = EmbedderSpec("mobilenet", "avg", "untrained:seed=0", "tf", SIZE, 6, "1: some recipe")


class Pretend:
    """An engine of a function of the pixels."""

    name, batch = "litert", 4

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self._function = function

    def run(self, pixels: np.ndarray) -> np.ndarray:
        return self._function(pixels.reshape(len(pixels), -1)[:, : SPEC.dim].astype(np.float32))


def pretend(function: Callable[[np.ndarray], np.ndarray]) -> Embedder:
    return Embedder(SPEC, Pretend(function))


def sample(count: int, labels: tuple[str | None, ...] | None = None) -> Sample:
    pixels = np.random.default_rng(count).integers(1, 256, (count, *SIZE, 3), np.uint8)
    return Sample(pixels, tuple(map(str, range(count))), labels or (None,) * count)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make samples of ten."""
    monkeypatch.setattr(calibration, "_SAMPLE", 10)
    monkeypatch.setattr(calibration, "_LEAST", 6)


# --- The sample -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few")
def test_the_images_of_the_smallest_hashes_are_drawn(drawn):
    refs = list(Listing([str(drawn)]))
    found, again = draw(refs, SIZE, Limits()), draw(refs[::-1], SIZE, Limits())
    smallest = sorted(refs, key=lambda ref: uri_hash(ref.uri))[:10]
    assert found.uris == again.uris == tuple(ref.uri for ref in smallest)
    assert found.labels == tuple(ref.label for ref in smallest)
    np.testing.assert_array_equal(found.pixels, again.pixels)
    assert (found.pixels.shape, found.pixels.dtype) == ((10, *SIZE, 3), np.uint8)
    assert found.digest == again.digest != draw(refs[:40], SIZE, Limits()).digest


@pytest.mark.usefixtures("few")
def test_bad_images_are_passed_over(drawn, tmp_path):
    images = shutil.copytree(drawn, tmp_path / "images")
    refs = list(Listing([str(images)]))
    first, second, third = (ref.uri for ref in sorted(refs, key=lambda ref: uri_hash(ref.uri))[:3])
    Path(first).write_bytes(b"no picture")
    Path(second).unlink()
    Path(third).write_bytes(Path(third).read_bytes() + bytes(2**20))
    found = draw(
        [ref._replace(size=Path(ref.uri).stat().st_size) if ref.uri == third else ref for ref in refs],
        SIZE,
        Limits(max_bytes=2**20),
    )
    assert len(found) == 10
    assert not {first, second, third} & {*found.uris}


def test_too_few_good_images_are_one_clear_sentence(drawn):
    refs = [*Listing([str(drawn)])][:25]
    with pytest.raises(UsageError, match=r"takes 40 images or more.*; 25 of 25 can be .* take --precision float32"):
        draw(refs, SIZE, Limits())


@pytest.mark.parametrize("count", [40, 41])
def test_what_is_measured_was_not_calibrated_on(count):
    calibrated, held_out = split(sample(count))
    assert not {*calibrated.uris} & {*held_out.uris}
    assert len(calibrated) + len(held_out) == len(calibrated.pixels) + len(held_out.pixels) == count
    assert len(held_out) == 20


# --- What is measured -----------------------------------------------------------------------------------------------


def late(seconds: float) -> Callable[[np.ndarray], np.ndarray]:
    def function(vectors: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        return vectors

    return function


def test_the_same_vectors_cost_nothing():
    found = measure(pretend(late(0.01)), pretend(lambda v: 2 * v), sample(21))
    assert (found["cosine_mean"], found["cosine_min"]) == pytest.approx((1, 1), abs=1e-5)
    assert found["neighbours_shared"] == 1
    assert found["held_out"] == 21
    assert found["speed"] > 2
    assert found["float32_ms"] >= 2.5 > found["int8_ms"]


def test_other_neighbours_are_counted():
    """Among eleven, each one's ten nearest are all the others; among more, vectors turned at random share few."""
    turn = np.random.default_rng(0).standard_normal((SPEC.dim, SPEC.dim)).astype(np.float32)
    exact, rough = pretend(lambda v: v - 128), pretend(lambda v: (v - 128) @ turn)
    assert measure(exact, rough, sample(11))["neighbours_shared"] == 1
    found = measure(exact, rough, sample(60))
    assert 0.1 < found["neighbours_shared"] < 0.7
    assert found["cosine_min"] < found["cosine_mean"] < 0.9


def paired(vectors: np.ndarray) -> np.ndarray:
    """Turn rows by the pair they belong to, which tells their brightest pixel."""
    angles = (vectors.max(axis=1, keepdims=True) - 200) // 2 / 10
    return np.hstack([np.cos(angles), np.sin(angles), np.zeros((len(vectors), SPEC.dim - 2))])


def test_precision_by_label_of_both():
    pixels = np.ones((24, *SIZE, 3), np.uint8)
    for row, picture in enumerate(pixels):
        picture.reshape(-1)[row % 2] = 200 + row  # two directions
    labels = ("even", "odd") * 12
    found = measure(pretend(lambda v: v), pretend(paired), Sample(pixels, labels, labels))
    assert (found["precision_at_1_float32"], found["precision_at_1"]) == (1, 0)
    for told in ((None,) * 24, ("same",) * 24, (*("same",) * 23, None)):
        found = measure(pretend(lambda v: v), pretend(paired), Sample(pixels, labels, told))
        assert found["precision_at_1_float32"] is None
        assert found["precision_at_1"] is None


def test_a_vector_of_zeros_is_no_error():
    assert measure(pretend(lambda v: v), pretend(lambda v: 0 * v), sample(20))["cosine_mean"] == 0


# --- The network ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(drawn, tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("int8")
    with backbones.opened("mobilenet", "untrained") as network:
        return Path(export(str(store), network, Listing([str(drawn)]), Limits()))


def test_int8_takes_bytes_and_gives_floats(exported, drawn):
    """Random networks give all pictures nearly one direction, so the mean is taken off before comparing."""
    document = read_description(str(exported))
    assert document.spec.precision == "int8"
    assert len(document.spec.calibration or "") == 16
    assert document.model.size < document.measured["float32_bytes"] / 3
    given = draw(Listing([str(drawn)]), document.spec.input_size, Limits()).pixels
    with backbones.opened("mobilenet", "untrained") as network:
        exact = network.model.predict(given, verbose=0)
    found = Embedder.open(str(exported)).embed(given)
    assert (found.shape, found.dtype) == ((60, 1024), np.float32)
    spread = exact - exact.mean(axis=0)
    assert np.linalg.norm(found - exact) / np.linalg.norm(spread) < 0.1


def test_calibration_gives_the_same_network_again(exported, drawn, tmp_path):
    with backbones.opened("mobilenet", "untrained") as network:
        again = export(str(tmp_path), network, Listing([str(drawn)]), Limits())
    assert Path(again).name == exported.name
    assert read_description(again).model == read_description(str(exported)).model


def test_what_was_measured_is_recorded_and_laid_out(exported):
    document = read_description(str(exported))
    assert (document.measured["calibrated_on"], document.measured["held_out"]) == (30, 30)
    lines = describe(document).splitlines()
    assert lines[0] == "int8, calibrated on 30 of the images and measured on 30 others:"
    assert [line.split("  ")[0] for line in lines[3:]] == [
        "ms an image, one thread", "times as fast", "bytes of the model", "P@1 by label", "of the 10 nearest, kept",
        "cosine to float32, mean", "cosine to float32, least",
    ]  # fmt: skip


def test_a_copy_keeps_what_was_measured(exported, tmp_path):
    copy = copy_artifact(str(exported), str(tmp_path))
    assert read_description(copy) == read_description(str(exported))


def test_a_description_older_than_the_field_loads(artifact, tmp_path):
    copy = Path(copy_artifact(artifact, str(tmp_path)))
    body = json.loads((copy / DESCRIPTION).read_bytes())
    del body["measured"]
    (copy / DESCRIPTION).write_bytes(signed.sign(body))
    assert read_description(str(copy)).measured == {}


@pytest.mark.soak
def test_real_weights_in_int8_find_what_they_found(tmp_path):
    photos, weights = photos_folder(), weights_file(MOBILENET_V2)
    with backbones.opened("mobilenet_v2", weights) as network:
        uri = export(str(tmp_path), network, Listing([photos]), Limits())
    found = read_description(uri).measured
    print(describe(read_description(uri)))
    assert (found["calibrated_on"], found["held_out"]) == (200, 200)
    assert found["cosine_mean"] > 0.96
    assert found["neighbours_shared"] > 0.75
    assert found["precision_at_1"] > found["precision_at_1_float32"] - 0.05
    assert found["speed"] > 1


# --- The store keeps it ---------------------------------------------------------------------------------------------


def int8(calibrated_on: str, **changes: object) -> EmbedderSpec:
    return dataclasses.replace(SPEC, precision="int8", calibration=calibrated_on, **changes)


def test_only_the_same_network_in_int8_is_found(tmp_path):
    folder = str(tmp_path / "embedders")
    assert find(str(tmp_path), SPEC) is None
    for spec in (SPEC, int8("a", weights="untrained:seed=1"), int8("a", image_recipe="2: another")):
        write_artifact(folder, spec, b"model", {})
    assert find(str(tmp_path), SPEC) is None
    uri = write_artifact(folder, int8("a"), b"model", {})
    assert find(str(tmp_path), SPEC) == uri
    several = {uri, write_artifact(folder, int8("b"), b"model", {})}
    assert find(str(tmp_path), SPEC) == min(several)


def test_more_images_are_embedded_with_the_same_network(drawn, tmp_path, capsys, monkeypatch):
    images, store = tmp_path / "images", str(tmp_path / "store")
    shutil.copytree(drawn, images)
    asked = ["embed", "--images", str(images), "--store", store, "--backbone", "mobilenet", "--weights", "untrained"]
    assert cli.main([*asked, "--precision", "int8"]) == 0
    first, out = load_run_manifest(store), capsys.readouterr().out
    assert "int8, calibrated on 30 of the images and measured on 30 others:" in out
    assert "litert (int8)" in out
    # Another calibration, of less luck in the alphabet, would be found first.
    document = read_description(f"{store}/embedders/{first.embedder.fingerprint}")
    others = (dataclasses.replace(document.spec, calibration=str(number)) for number in range(100))
    earlier = next(other for other in others if other.fingerprint < first.embedder.fingerprint)
    write_artifact(f"{store}/embedders", earlier, b"model", {})
    for number, path in enumerate(sorted(drawn.glob("*/*"))[:5]):
        shutil.copy(path, images / f"{number}{path.suffix}")
    monkeypatch.setattr(backbones, "convert", lambda *_: pytest.fail("exported again"))
    assert cli.main([*asked, "--precision", "int8"]) == 0
    second = load_run_manifest(store)
    assert second.embedder == first.embedder
    assert (second.accounting.reused, second.accounting.embedded) == (60, 5)
    assert "calibrated" not in capsys.readouterr().out
