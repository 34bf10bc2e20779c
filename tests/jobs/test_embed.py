"""Which embedder a run gets, what runs it, and what is said of that."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import cli, embed
from jobs.backbones import ensure_exported
from jobs.embed import EmbedderOptions, Purpose, engine_that_ran, find_embedder
from pipelines.embed import EmbedRequest, EmbedResult
from pipelines.runner import Runner
from serving import storage
from serving.embedder import EmbedderSpec, copy_artifact, has_saved_model, write_artifact
from serving.errors import UsageError
from serving.images import Limits
from serving.manifest import load_run_manifest
from transforms.listing import Listing
from transforms.sampling import live_rows

MOBILENET = ["--backbone", "mobilenet", "--weights", "untrained"]
INT8 = EmbedderSpec("mobilenet", "avg", "untrained:seed=0", "tf", (8, 8), 6, "1: some recipe", "int8", "a hash")


@pytest.fixture(scope="module")
def for_both(artifact: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("both"))
    copy_artifact(artifact, folder)
    return ensure_exported(folder, "mobilenet", "untrained", saved_model=True)


def vectors(store: Path) -> dict[str | None, np.ndarray]:
    live = live_rows(str(store), load_run_manifest(str(store)))
    return dict(zip(live.column("uri"), live.vectors(), strict=True))


def purpose(drawn: Path, engine: str = "auto", is_local: bool = True) -> Purpose:
    return Purpose(Listing([str(drawn)]), Limits(), engine, is_local)


# --- Engines --------------------------------------------------------------------------------------------------------


def test_tensorflow_and_litert_embed_alike(drawn, for_both, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(drawn.glob("*/*"))[::4]:
        shutil.copy(path, images)
    found = {}
    for engine in ("litert", "tensorflow"):
        asked = ["--store", str(tmp_path / engine), "--embedder", for_both, "--engine", engine]
        assert cli.main(["embed", "--images", str(images), *asked]) == 0
        assert ["engine", engine] in [line.split() for line in capsys.readouterr().out.splitlines()]
        found[engine] = vectors(tmp_path / engine)
    assert len(found["litert"]) == 15
    for uri, one in found["litert"].items():
        other = found["tensorflow"][uri]
        assert one @ other / (np.linalg.norm(one) * np.linalg.norm(other)) >= 0.9999


def test_tensorflow_gets_its_model_from_the_weights(drawn, artifact, tmp_path):
    """Also when the artifact is there, for LiteRT alone."""
    copy_artifact(artifact, str(tmp_path / "embedders"))
    options = EmbedderOptions(backbone="mobilenet", weights="untrained")
    uri = find_embedder(options, str(tmp_path), purpose(drawn, "tensorflow"))
    assert storage.name_of(uri) == storage.name_of(artifact)
    assert has_saved_model(uri)


@pytest.mark.parametrize(
    ("engine", "is_local", "gpu", "may"),
    [
        ("auto", True, False, False),
        ("auto", True, True, True),
        ("auto", False, False, True),
        ("litert", False, True, False),
        ("tensorflow", True, False, True),
    ],
)
def test_a_saved_model_is_made_where_it_may_be_run(drawn, monkeypatch, engine, is_local, gpu, may):
    monkeypatch.setattr(embed, "has_gpu", lambda: gpu)
    assert purpose(drawn, engine, is_local).may_use_tensorflow is may


def test_an_artifact_brings_its_saved_model(drawn, for_both, tmp_path):
    copy = find_embedder(EmbedderOptions(embedder=for_both), str(tmp_path), purpose(drawn, "tensorflow"))
    assert has_saved_model(copy)


def ran(counters: dict[str, int], embedder: str, engine: str = "auto", runner: Runner | None = None) -> str | None:
    result: Any = EmbedResult(None, True, 0, counters)  # type: ignore[arg-type]
    return engine_that_ran(result, EmbedRequest(("a",), "s", embedder, engine=engine), runner or Runner())


def test_what_ran_is_said_with_its_reason(artifact, for_both, tmp_path, monkeypatch):
    litert, tensorflow = {"embed/images_by_litert": 3}, {"embed/images_by_tensorflow": 2}
    int8 = write_artifact(str(tmp_path), INT8, b"model", {})
    monkeypatch.setattr(embed, "has_gpu", lambda: False)
    remote = Runner(["--runner=DataflowRunner"])
    assert ran(litert, artifact) == "litert (no GPU here)"
    assert ran(litert, for_both, "litert") == "litert"
    assert ran(litert, int8) == "litert (int8)"
    assert ran(litert, for_both, runner=remote) == "litert (the workers have no GPU)"
    assert ran(litert | tensorflow, for_both, runner=remote) == "litert and tensorflow"
    assert ran({}, artifact) is None
    monkeypatch.setattr(embed, "has_gpu", lambda: True)
    assert ran(litert, artifact) == "litert (the embedder has no SavedModel)"
    assert ran(tensorflow, for_both) == "tensorflow"


# --- What does not go together ---------------------------------------------------------------------------------------


def test_an_artifact_without_a_saved_model_is_refused_at_launch(drawn, artifact, tmp_path, capsys):
    asked = ["--store", str(tmp_path), "--embedder", artifact, "--engine", "tensorflow"]
    assert cli.main(["embed", "--images", str(drawn), *asked]) == 2
    sentence = f"--embedder {artifact} holds no SavedModel, which --engine tensorflow runs; take --engine litert, or"
    assert sentence in capsys.readouterr().err


def test_int8_is_for_litert(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.backbones.build", lambda *_: pytest.fail("built before it was refused"))
    options = EmbedderOptions(backbone="mobilenet", weights="untrained", precision="int8")
    with pytest.raises(UsageError, match="--engine tensorflow runs no int8; take --engine litert"):
        find_embedder(options, str(tmp_path), purpose(drawn, "tensorflow"))
    frozen = EmbedderOptions(embedder=write_artifact(str(tmp_path / "a"), INT8, b"model", {}))
    with pytest.raises(UsageError, match="is int8, which --engine tensorflow does not run"):
        find_embedder(frozen, str(tmp_path), purpose(drawn, "tensorflow"))


def test_a_frozen_embedder_keeps_its_precision(drawn, artifact, tmp_path):
    with pytest.raises(UsageError, match=r"is float32 already; leave out --precision int8, or name --backbone"):
        find_embedder(EmbedderOptions(embedder=artifact, precision="int8"), str(tmp_path), purpose(drawn))
    frozen = write_artifact(str(tmp_path / "a"), INT8, b"model", {})
    for precision in ("float32", "int8"):  # float32 may be the default
        uri = find_embedder(EmbedderOptions(embedder=frozen, precision=precision), str(tmp_path), purpose(drawn))
        assert storage.name_of(uri) == INT8.fingerprint
