"""What is peculiar to local disks: folders, and files that killed writers leave."""

import os

import pytest

from serving import storage


def test_empty_folders_go_and_others_stay(tmp_path):
    for name in ("a/b/c", "a/d", "full/e"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "root/full/file").touch()
    storage.prune(str(tmp_path / "root"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "root"]
    storage.prune(str(tmp_path / "root/full/file"))
    (tmp_path / "root/full/file").unlink()
    storage.prune(str(tmp_path / "root"))
    storage.prune(str(tmp_path / "root"))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_goes_before_its_first_file_is_made_again(tmp_path, monkeypatch):
    """Pruned by somebody else each time that it has been made, but for the last."""
    made = []
    makedirs = os.makedirs

    def pruned(path, **more):
        makedirs(path, **more)
        made.append(path)
        if len(made) < 5:
            storage.prune(str(tmp_path / "new"))

    monkeypatch.setattr(os, "makedirs", pruned)
    uri = str(tmp_path / "new/folder/file")
    assert storage.create(uri, b"data")
    assert storage.read(uri) == b"data"


def test_temporary_files_of_a_writer_are_told_from_all_others(tmp_path):
    theirs = tmp_path / ".CURRENT.0123456789ab.tmp"
    theirs.write_bytes(b"half")
    others = ["CURRENT", ".CURRENT.tmp", ".CURRENT.0123456789aX.tmp", ".LEASE.0123456789ab.tmp", "x.0123456789ab.tmp"]
    for name in others:
        (tmp_path / name).touch()
    (found,) = storage.temporaries(str(tmp_path / "CURRENT"))
    assert (found.uri, found.size) == (str(theirs), 4)
    assert not storage.temporaries(str(tmp_path / "nowhere/CURRENT"))
    assert not storage.temporaries("gs://bucket/CURRENT")
    assert storage.is_temporary(str(theirs))
    assert not storage.is_temporary("gs://bucket/.CURRENT.0123456789ab.tmp")
    assert [storage.is_temporary(str(tmp_path / name)) for name in others] == [False, False, False, True, False]


@pytest.mark.parametrize("last_step", ["link", "replace"])
def test_what_writers_leave_is_what_is_called_temporary(tmp_path, monkeypatch, last_step):
    seen = []
    monkeypatch.setattr(os, last_step, lambda temporary, _: seen.append(temporary))
    store, uri = storage.of(str(tmp_path)), str(tmp_path / "a part.parquet")
    store.create(uri, b"data") if last_step == "link" else store.swap_pointer(uri, b"data", None)
    assert [storage.is_temporary(temporary) for temporary in seen] == [True]
