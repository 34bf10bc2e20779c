import shutil
from pathlib import Path

import numpy as np
import pytest
from real import weights_file

from jobs import backbones
from jobs.backbones import BACKBONES, build, ensure_exported
from serving.embedder import DESCRIPTION, Embedder, has_saved_model, read_description
from serving.errors import UsageError
from serving.images import load
from transforms.engines import TENSORFLOW, open_cached

MOBILENET_V2 = "mobilenet_v2_1.0_224_no_top_bnfolded.h5"


def pixels(folder: Path, side: int, count: int = 12) -> np.ndarray:
    pictures = sorted(folder.glob("*/*"))[:: max(1, 60 // count)][:count]
    return np.stack([load(path.read_bytes(), (side, side)).pixels for path in pictures])


SLOW = ("vgg16_fc2", "vgg19", "resnet50", "inception_v3")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.soak] * (name in SLOW)) for name in BACKBONES])
def test_the_artifact_gives_what_keras_gives(name, drawn, tmp_path):
    """Random networks give all pictures nearly one direction, so the mean is taken off before comparing."""
    backbone = BACKBONES[name]
    embedder = Embedder.open(ensure_exported(str(tmp_path), name, "untrained"))
    given = pixels(drawn, backbone.side, 4 if backbone.layer == "fc2" else 12)
    expected = build(backbone, None).predict(given, verbose=0)
    found = embedder.embed(given)
    assert found.shape == (len(given), backbone.dim)
    spread = expected - expected.mean(axis=0)
    assert np.linalg.norm(found - expected) / np.linalg.norm(spread) <= 1e-2
    assert 1e-3 < np.abs(expected).mean() < 1e3  # within what 16-bit floats hold


def test_real_weights_survive_the_export(drawn, tmp_path):
    weights = weights_file(MOBILENET_V2)
    embedder = Embedder.open(ensure_exported(str(tmp_path), "mobilenet_v2", weights))
    given = pixels(drawn, 224, 30)
    expected = build(BACKBONES["mobilenet_v2"], weights).predict(given, verbose=0)
    found = embedder.embed(given)
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((found * expected).sum(axis=1) / lengths).min() >= 0.9999
    assert not read_description(str(tmp_path / embedder.fingerprint)).spec.ref.untrained


@pytest.mark.parametrize(
    ("name", "mode"), [("mobilenet_v2", "tf"), ("vgg16", "caffe"), ("resnet50", "caffe"), ("inception_v3", "tf")]
)
def test_preprocessing_is_the_published_one(name, mode):
    """Worked out by hand: `tf` scales to [-1, 1]; `caffe` swaps to BGR and takes ImageNet's means off."""
    import importlib

    module = importlib.import_module(f"keras.applications.{BACKBONES[name].module}")
    given = np.array([[[[255.0, 128.0, 0.0]]]], np.float32)
    expected = {"tf": [1.0, 128 / 127.5 - 1, -1.0], "caffe": [0 - 103.939, 128 - 116.779, 255 - 123.68]}[mode]
    np.testing.assert_allclose(module.preprocess_input(given.copy())[0, 0, 0], expected, atol=1e-5)
    assert BACKBONES[name].preprocessing == mode


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(axis=1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export for LiteRT, then for TensorFlow too."""
    folder = str(tmp_path_factory.mktemp("both"))
    uri = ensure_exported(folder, "mobilenet", "untrained")
    assert not has_saved_model(uri)
    description = Path(uri, DESCRIPTION).read_bytes()
    assert ensure_exported(folder, "mobilenet", "untrained", saved_model=True) == uri
    assert has_saved_model(uri)
    assert Path(uri, DESCRIPTION).read_bytes() == description
    return Path(uri)


def test_tensorflow_gives_what_litert_gives(both, drawn):
    given = pixels(drawn, 224)
    embedder = open_cached(str(both), TENSORFLOW)
    assert embedder.engine == TENSORFLOW
    found, expected = embedder.embed(given), Embedder.open(str(both)).embed(given)
    assert cosines(found, expected).min() >= 0.9999
    # Random networks give all pictures nearly one direction: what is left without it must agree too.
    assert cosines(found - expected.mean(axis=0), expected - expected.mean(axis=0)).min() >= 0.9999


def test_tensorflow_gives_what_litert_gives_with_real_weights(drawn, tmp_path):
    uri = ensure_exported(str(tmp_path), "mobilenet_v2", weights_file(MOBILENET_V2), saved_model=True)
    given = pixels(drawn, 224, 30)
    assert cosines(open_cached(uri, TENSORFLOW).embed(given), Embedder.open(uri).embed(given)).min() >= 0.9999


def test_a_saved_model_that_was_cut_short_is_finished(both, drawn, tmp_path):
    """Exports of one network differ: what is left of the first must not get among the second."""
    uri = Path(shutil.copytree(both, tmp_path / both.name))
    (uri / "saved_model" / "files.json").unlink()
    [pb] = uri.glob("saved_model/*/saved_model.pb")
    pb.unlink()
    assert not has_saved_model(str(uri))
    assert ensure_exported(str(tmp_path), "mobilenet", "untrained", saved_model=True) == str(uri)
    given = pixels(drawn, 224, 3)
    assert cosines(open_cached(str(uri), TENSORFLOW).embed(given), Embedder.open(str(uri)).embed(given)).min() >= 0.9999


def test_a_saved_model_is_exported_once(both, monkeypatch):
    monkeypatch.setattr(backbones, "build", lambda *_: pytest.fail("built again"))
    assert ensure_exported(str(both.parent), "mobilenet", "untrained", saved_model=True) == str(both)


def test_an_artifact_is_exported_once(tmp_path, monkeypatch):
    first = ensure_exported(str(tmp_path), "mobilenet", "untrained", seed=3)
    monkeypatch.setattr(backbones, "convert", lambda _: pytest.fail("exported again"))
    assert ensure_exported(str(tmp_path), "mobilenet", "untrained", seed=3) == first


def test_seeds_and_backbones_have_fingerprints_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "convert", lambda _: b"model")
    uris = {ensure_exported(str(tmp_path), "mobilenet", "untrained", seed=seed) for seed in (0, 1)}
    assert len(uris) == 2
    assert {read_description(uri).spec.weights for uri in uris} == {"untrained:seed=0", "untrained:seed=1"}


def test_wrong_names_and_files_are_one_clear_sentence(tmp_path):
    with pytest.raises(UsageError, match="--backbone alexnet is not known; there are mobilenet_v2"):
        ensure_exported(str(tmp_path), "alexnet", "untrained")
    with pytest.raises(UsageError, match="is not a file; give one, or `imagenet`, or `untrained`"):
        ensure_exported(str(tmp_path), "mobilenet", str(tmp_path / "nothing.h5"))
    (tmp_path / "wrong.h5").write_bytes(b"no weights")
    with pytest.raises(UsageError, match=r"wrong\.h5 cannot be used for MobileNet"):
        ensure_exported(str(tmp_path), "mobilenet", str(tmp_path / "wrong.h5"))


def test_weights_of_another_backbone_are_refused(tmp_path):
    weights = weights_file(MOBILENET_V2)
    with pytest.raises(UsageError, match="cannot be used for MobileNet"):
        ensure_exported(str(tmp_path), "mobilenet", weights)
    assert not list(tmp_path.iterdir())


def test_imagenet_out_of_reach_never_becomes_something_else(tmp_path, monkeypatch):
    from keras.applications import mobilenet

    def fail(*_args: object, **_options: object) -> None:
        raise Exception("URL fetch failure on …: connection refused")

    monkeypatch.setattr(mobilenet, "MobileNet", fail)
    with pytest.raises(UsageError, match=r"URL fetch failure.*give a file with --weights FILE"):
        ensure_exported(str(tmp_path), "mobilenet", "imagenet")
    assert not list(tmp_path.iterdir())
