import json
import os
import shutil
from pathlib import Path

import pictures
import pyarrow.parquet as pq
import pytest
from apache_beam.runners.portability.fn_api_runner.fn_runner import RunnerResult
from real import embed_folder, request

from pipelines import embed
from pipelines.embed import EmbedResult
from pipelines.runner import Runner
from serving import storage
from serving.disk import DiskStorage
from serving.errors import AccessDenied, RunFailed, StorageError, UsageError
from serving.manifest import RunManifest, load_run_manifest
from transforms.catalog import read_catalog
from transforms.schema import CatalogRow
from transforms.verifying import check_run


def catalog(store: Path, manifest: RunManifest) -> dict[str, CatalogRow]:
    return {row.uri: row for row in read_catalog(str(store), manifest)}


def parts(store: Path) -> dict[str, int]:
    """Map the store's parts to when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in store.glob("parts/*/*.parquet")}


@pytest.fixture
def images(drawn: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for kind in ("balloon", "city", "fish"):
        shutil.copytree(drawn / kind, folder / kind)
    return folder


@pytest.fixture(scope="module")
def run(artifact: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EmbedResult]:
    root = tmp_path_factory.mktemp("mixed")
    for folder, files in (("good", pictures.good()), ("bad", {n: data for n, (data, _) in pictures.bad().items()})):
        (root / "images" / folder).mkdir(parents=True)
        for name, data in files.items():
            (root / "images" / folder / name).write_bytes(data)
    os.symlink(root / "nowhere.jpg", root / "images" / "bad" / "dangling.jpg")
    return root, embed_folder(root / "images", root / "store", artifact, all_files=True, max_reject_ratio=0.9)


class TestBadAndGoodPictures:
    """Every good case becomes a vector, every bad one a reject with its reason, and nothing vanishes."""

    def test_the_accounting_closes(self, run):
        root, result = run
        counts = result.manifest.accounting
        assert counts.listed == len(pictures.good()) + len(pictures.bad()) + 1
        assert counts.embedded == len(pictures.good())
        assert counts.closes
        assert not list(check_run(str(root / "store"), result.manifest))

    def test_every_bad_picture_is_recorded_with_its_reason(self, run):
        root, result = run
        rows = catalog(root / "store", result.manifest)
        found = {Path(uri).name: row.reason for uri, row in rows.items() if "/bad/" in uri}
        expected = {name: reason for name, (_, reason) in pictures.bad().items()} | {"dangling.jpg": "unreadable"}
        assert found == expected

    def test_rejects_leave_a_message_and_no_vector(self, run):
        root, _ = run
        for path in root.glob("store/parts/*/*.parquet"):
            for row in pq.read_table(path).to_pylist():
                assert (row["embedding"] is None) == (row["status"] == "rejected") == bool(row["message"])

    def test_the_reasons_are_counted_in_the_manifest(self, run):
        _, result = run
        rejected = result.manifest.accounting.rejected
        wanted = [reason for _, reason in pictures.bad().values()]
        assert {reason: count for reason, count in rejected.items() if reason != "unreadable"} == {
            reason: wanted.count(reason) for reason in wanted if reason != "unreadable"
        }
        assert rejected["unreadable"] == wanted.count("unreadable") + 1


def test_the_runner_is_the_one_intended(images, tmp_path, artifact):
    runner = Runner()
    result = embed.run(request(images, tmp_path / "store", artifact), runner)
    assert isinstance(runner.last_result, RunnerResult)  # FnApiRunner's own: neither Prism's nor the legacy runner's
    assert result.counters["embed/embedded"] == 15
    assert result.counters["embed/images"] == 15
    assert result.counters["embed/bytes_read"] == sum(path.stat().st_size for path in images.glob("*/*"))


def test_running_again_embeds_nothing_and_leaves_no_new_run(images, tmp_path, artifact):
    store = tmp_path / "store"
    first = embed_folder(images, store, artifact)
    before = parts(store)
    second = embed_folder(images, store, artifact)
    assert not second.changed
    assert second.manifest == first.manifest
    assert parts(store) == before
    assert len(list(store.glob("runs/*/manifest.json"))) == 1


def test_adding_a_photo_embeds_that_one(images, drawn, tmp_path, artifact):
    store = tmp_path / "store"
    first = embed_folder(images, store, artifact)
    shutil.copy(next((drawn / "maze").glob("*")), images / "fish" / "new.jpg")
    result = embed_folder(images, store, artifact)
    counts = result.manifest.accounting
    assert (counts.embedded, counts.reused, counts.listed) == (1, 15, 16)
    assert result.manifest.parent == first.manifest.run_id
    assert catalog(store, result.manifest)[str(images / "fish" / "new.jpg")].label == "fish"
    assert not list(check_run(str(store), result.manifest))


def test_changed_gone_and_moved_images(images, tmp_path, artifact):
    store = tmp_path / "store"
    before = catalog(store, embed_folder(images, store, artifact).manifest)
    changed, gone, moved, *_ = sorted((images / "city").iterdir())
    shutil.copy(next((images / "fish").iterdir()), changed)
    gone.unlink()
    moved.rename(images / "fish" / "moved.jpg")
    result = embed_folder(images, store, artifact)
    rows = catalog(store, result.manifest)
    counts = result.manifest.accounting
    assert (counts.listed, counts.embedded, counts.reused, counts.gone) == (14, 2, 12, 2)
    assert str(gone) not in rows
    assert str(moved) not in rows
    assert rows[str(changed)].etag != before[str(changed)].etag
    untouched = set(rows) & set(before) - {str(changed)}
    assert all(rows[uri] == before[uri] for uri in untouched)
    assert len(untouched) == 12


def test_labels_follow_the_newest_listing_without_embedding(images, tmp_path, artifact):
    store = tmp_path / "store"
    embed_folder(images, store, artifact)
    before = parts(store)
    result = embed_folder(images, store, artifact, labels="none")
    assert (result.manifest.accounting.relabelled, result.manifest.accounting.embedded) == (15, 0)
    assert {row.label for row in catalog(store, result.manifest).values()} == {None}
    assert parts(store) == before


def test_a_run_cut_short_goes_on_with_the_parts_it_has(images, tmp_path, artifact):
    store = tmp_path / "store"
    whole = embed_folder(images, tmp_path / "other", artifact, unit_size=4)
    embed_folder(images, store, artifact, unit_size=4)
    kept = sorted(store.glob("parts/*/*.parquet"))[::2]
    shutil.rmtree(store / "runs")
    shutil.rmtree(store / "catalog")
    (store / "CURRENT").unlink()
    for path in set(store.glob("parts/*/*.parquet")) - set(kept):
        path.unlink()
    before = parts(store)
    (images / "zebra").mkdir()
    shutil.copy(next((images / "fish").iterdir()), images / "zebra" / "late.jpg")  # and one more image meanwhile
    result = embed_folder(images, store, artifact, unit_size=4)
    assert result.manifest.accounting.embedded == 16
    assert result.counters["embed/units_found_done"] >= len(kept) - 1
    assert all(parts(store)[name] == written for name, written in before.items())
    assert set(catalog(store, result.manifest)) - set(catalog(tmp_path / "other", whole.manifest)) == {
        str(images / "zebra" / "late.jpg")
    }


def test_too_many_rejects_fail_the_run_and_keep_what_was_done(images, tmp_path, artifact):
    store = tmp_path / "store"
    for number in range(20):
        (images / f"broken-{number}.jpg").write_bytes(b"")
    with pytest.raises(RunFailed, match=r"20 of 35 images were rejected \(20 empty\).*--max-reject-ratio"):
        embed_folder(images, store, artifact)
    assert not (store / "CURRENT").exists()
    before = parts(store)
    result = embed_folder(images, store, artifact, max_reject_ratio=0.6)
    assert result.manifest.accounting.rejected == {"empty": 20}
    assert parts(store) == before
    assert "embed/images" not in result.counters


def test_rejects_are_tried_again_when_asked(images, tmp_path, artifact):
    store = tmp_path / "store"
    embed_folder(images, store, artifact, limits=embed.Limits(min_side=230))
    rejected = load_run_manifest(str(store)).accounting.rejected["too_small"]
    assert 0 < rejected < 15
    assert not embed_folder(images, store, artifact).changed
    result = embed_folder(images, store, artifact, retry_rejects=True)
    assert (result.manifest.accounting.embedded, result.manifest.accounting.reused) == (rejected, 15 - rejected)


def test_one_bad_image_among_few_new_ones_fails_nothing(images, tmp_path, artifact):
    store = tmp_path / "store"
    embed_folder(images, store, artifact)
    (images / "city" / "late.jpg").write_bytes(b"")
    result = embed_folder(images, store, artifact)
    assert (result.manifest.accounting.rejected, result.manifest.accounting.reused) == ({"empty": 1}, 15)
    assert not embed_folder(images, store, artifact).changed


class Locked(DiskStorage):
    """A disk where some files may not be read, whoever asks."""

    def __init__(self, locked: set[str]) -> None:
        self.locked = locked

    def read(self, uri: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        if uri in self.locked:
            raise AccessDenied(f"{uri}: permission denied")
        return super().read(uri, start, length, etag)


@pytest.fixture
def locked(monkeypatch) -> set[str]:
    uris: set[str] = set()
    disk = Locked(uris)
    monkeypatch.setattr(storage, "of", lambda _uri: disk)
    return uris


def test_what_could_not_be_read_is_tried_again_by_the_next_run(images, tmp_path, artifact, locked):
    store = tmp_path / "store"
    locked |= {str(path) for path in (images / "fish").iterdir()}
    first = embed_folder(images, store, artifact)
    assert (first.manifest.accounting.embedded, first.manifest.accounting.rejected) == (10, {"unreadable": 5})
    assert embed_folder(images, store, artifact).manifest == first.manifest  # still locked: nothing new to say
    locked.clear()
    result = embed_folder(images, store, artifact)
    assert (result.manifest.accounting.embedded, result.manifest.accounting.reused) == (5, 10)
    assert not list(check_run(str(store), result.manifest))
    assert not embed_folder(images, store, artifact).changed


@pytest.mark.parametrize("unit_size", [2, 512])
def test_a_store_that_gives_nothing_fails_the_run_and_the_next_one_recovers(
    unit_size, images, tmp_path, artifact, locked
):
    store = tmp_path / "store"
    locked |= {str(path) for path in images.glob("*/*")}
    with pytest.raises((RunFailed, StorageError), match="15 of 15 images"):  # by the ratio, or as an outage
        embed_folder(images, store, artifact, unit_size=unit_size)
    locked.clear()
    result = embed_folder(images, store, artifact, unit_size=unit_size)
    assert (result.manifest.live, result.manifest.accounting.embedded) == (15, 15)
    assert not list(check_run(str(store), result.manifest))


def test_no_image_is_one_clear_sentence_and_nothing_written(tmp_path, artifact):
    (tmp_path / "images").mkdir()
    with pytest.raises(UsageError, match=r"no images under .*images; give a folder"):
        embed_folder(tmp_path / "images", tmp_path / "store", artifact)
    (tmp_path / "images" / "README.txt").write_text("hello")
    with pytest.raises(UsageError, match=r"1 files there have no image's ending.*--all-files"):
        embed_folder(tmp_path / "images", tmp_path / "store", artifact)
    assert {path.name for path in (tmp_path / "store").rglob("*") if path.is_file()} == {
        "embedder.json",
        "model.tflite",
    }


@pytest.mark.parametrize("count", [1, 2])
def test_the_smallest_collections(count, drawn, tmp_path, artifact):
    (tmp_path / "few").mkdir()
    for path in sorted(drawn.glob("leaf/*"))[:count]:
        shutil.copy(path, tmp_path / "few")
    assert embed_folder(tmp_path / "few", tmp_path / "store", artifact).manifest.live == count


def test_another_embedder_embeds_everything_anew_in_the_same_store(images, tmp_path, artifact):
    from jobs.backbones import ensure_exported

    store = tmp_path / "store"
    first = embed_folder(images, store, artifact)
    other = ensure_exported(str(tmp_path / "other"), "mobilenet", "untrained", seed=1)
    second = embed_folder(images, store, other)
    assert second.manifest.accounting.embedded == 15
    assert second.manifest.embedder.fingerprint != first.manifest.embedder.fingerprint
    assert len(list(store.glob("parts/*"))) == 2


def test_a_bucket_is_embedded_like_a_folder(images, gcs_server, tmp_path, artifact):
    for path in images.rglob("*.*"):
        storage.create(f"{gcs_server}/photos/{path.relative_to(images)}", path.read_bytes())
    remote = embed_folder(f"{gcs_server}/photos", f"{gcs_server}/store", artifact)
    local = embed_folder(images, tmp_path / "store", artifact)
    assert remote.manifest.accounting == local.manifest.accounting
    assert not list(check_run(f"{gcs_server}/store", remote.manifest))
    assert not embed_folder(f"{gcs_server}/photos", f"{gcs_server}/store", artifact).changed


def test_the_manifest_says_which_weights(images, tmp_path, artifact):
    result = embed_folder(images, tmp_path / "store", artifact)
    body = json.loads((tmp_path / "store" / "runs" / result.manifest.run_id / "manifest.json").read_text())
    assert body["embedder"]["weights"] == "untrained:seed=0"
    assert result.manifest.embedder.untrained


def test_mistyped_options_are_refused():
    with pytest.raises(UsageError, match="--imags is no option of this job nor of Beam"):
        Runner(["--imags", "x"])
    with pytest.raises(UsageError, match="did you mean --direct_num_workers"):
        Runner(["--direct_num_worker=2"])


def test_settings_are_checked(tmp_path, artifact):
    for wrong in ({"unit_size": 0}, {"max_reject_ratio": 1.5}, {"threads": -1}):
        with pytest.raises(UsageError, match=f"--{next(iter(wrong)).replace('_', '-')} is"):
            request(tmp_path, tmp_path / "store", artifact, **wrong)
