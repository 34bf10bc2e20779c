import dataclasses
import random

import numpy as np
import pytest
import stores

from serving import storage
from serving.errors import FormatError, NotFound
from serving.manifest import Accounting, load_run_manifest
from transforms import catalog
from transforms.catalog import catalog_files, commit, count_outcomes, part_name, part_uri, read_catalog
from transforms.embedding import Outcome, part_table
from transforms.planning import Planner, read_unit
from transforms.schema import (
    CATALOG,
    EMBEDDED,
    REJECTED,
    CatalogRow,
    ImageRef,
    iter_rows,
    part_schema,
    read_parquet,
    to_parquet,
    to_table,
    uri_hash,
)

FINGERPRINT = "f00d"
REASONS = ["empty", "truncated", "not_an_image"]


def ref(uri, etag="e", label=None):
    return ImageRef(uri, etag, 1, 0, label)


def outcome(uri, bad):
    return Outcome(reason=bad[uri]) if uri in bad else Outcome(vector=np.full(2, len(uri), np.float32))


def write_part(store, name, unit, bad):
    table = part_table(unit, [outcome(ref.uri, bad) for ref in unit], part_schema("float16"))
    uri = part_uri(str(store), FINGERPRINT, name)
    storage.of(uri).delete(uri)
    storage.create(uri, to_parquet(table, row_group=3))


def planned(store, run_id, refs, known=(), bad=None, unit_size=8):
    """Plan a run and write its parts; return its folder and plan."""
    folder = f"{store}/runs/{run_id}/plan"
    plan = Planner(folder, {}, unit_size).plan(refs, known)
    for name in plan.units:
        write_part(store, name, read_unit(folder, name), bad or {})
    return folder, plan


def rows_of(store, done):
    return list(iter_rows([f"{store}/{file.name}" for file in done.files], CatalogRow, CATALOG))


def check_places(store, rows):
    """Every row is to be found where the catalog says."""
    for part in {row.part for row in rows}:
        table = read_parquet(part_uri(str(store), FINGERPRINT, part))
        for row in (row for row in rows if row.part == part):
            found = {name: table[name][row.row].as_py() for name in ("uri", "etag", "status", "reason")}
            assert found == {name: getattr(row, name) for name in found}
            assert row.uri_hash == uri_hash(row.uri)


class History:
    """A collection that changes, and what its catalog must say."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.images = {}

    def change(self):
        """Add, change, relabel and remove; return the listing and what is wrong with which image."""
        for _ in range(40):
            uri = f"/{self.rng.randrange(120):03}"
            self.images[uri] = (str(self.rng.randrange(3)), self.rng.choice([None, "cat", "dog"]))
        for uri in self.rng.sample(sorted(self.images), 10):
            del self.images[uri]
        refs = [ref(uri, *self.images[uri]) for uri in sorted(self.images)]
        return refs, {uri: self.rng.choice(REASONS) for uri in self.images if self.rng.random() < 0.2}


@pytest.mark.parametrize("seed", range(4))
def test_a_long_history_agrees_with_a_dict(seed, tmp_path):
    history, known, states = History(seed), [], {}
    for number in range(6):
        refs, bad = history.change()
        fresh = {ref.uri for ref in refs if states.get(ref.uri, (None,))[0] != ref.etag}
        gone = len(states.keys() - {ref.uri for ref in refs})
        old = {row.uri: row for row in known}
        states = {ref.uri: (ref.etag, bad.get(ref.uri) if ref.uri in fresh else states[ref.uri][1]) for ref in refs}
        _, plan = planned(tmp_path, f"run-{number}", refs, known, bad)
        done = commit(str(tmp_path), FINGERPRINT, f"run-{number}", plan)
        known = rows_of(tmp_path, done)

        assert [(row.uri, row.etag, row.label) for row in known] == [(ref.uri, ref.etag, ref.label) for ref in refs]
        assert {row.uri: (row.etag, row.reason) for row in known} == states
        assert all((row.status == EMBEDDED) == (row.reason is None) for row in known)
        assert all(row == old[row.uri]._replace(label=row.label) for row in known if row.uri not in fresh)
        check_places(tmp_path, known)
        assert (done.rows, done.live) == (len(refs), sum(reason is None for _, reason in states.values()))
        assert done.parts == sorted({row.part for row in known})
        rejected = [bad[uri] for uri in sorted(fresh) if uri in bad]
        assert done.accounting == Accounting(
            listed=len(refs),
            embedded=len(fresh) - len(rejected),
            reused=len(refs) - len(fresh),
            rejected={reason: rejected.count(reason) for reason in sorted(set(rejected))},
            relabelled=sum(row.label != old[row.uri].label for row in known if row.uri not in fresh),
            gone=gone,
        )
        assert done.accounting.closes


def test_runs_follow_one_another_in_a_store(tmp_path):
    vectors = stores.clustered(60, 8)
    uris = [f"/{number:03}" for number in range(60)]
    first = stores.write_store(tmp_path, vectors[:50], uris[:50], ["a"] * 50, unit_size=16, rejected=["/x", "/y"])
    assert first.accounting == Accounting(52, 50, 0, {"truncated": 2})
    second = stores.write_store(
        tmp_path, vectors[10:], uris[10:], ["a"] * 30 + ["b"] * 20, unit_size=16, rejected=["/y", "/z"], run_id="run-2"
    )
    # Ten came, ten and the reject /x went, ten of the forty that stayed have another label.
    assert second.accounting == Accounting(52, 10, 41, {"truncated": 1}, relabelled=10, gone=11)
    assert (second.parent, second.rows, second.live) == ("run-1", 52, 50)
    assert load_run_manifest(str(tmp_path)) == second
    rows = list(read_catalog(str(tmp_path), second))
    assert [row.uri for row in rows] == [*uris[10:], "/y", "/z"]
    assert [row.label for row in rows] == ["a"] * 30 + ["b"] * 20 + [None] * 2
    assert [row.status for row in rows] == [EMBEDDED] * 50 + [REJECTED] * 2
    third = stores.write_store(tmp_path, vectors[10:], uris[10:], rejected=["/y", "/z"], run_id="run-3")
    assert third.accounting == Accounting(52, 0, 52, {}, relabelled=50)
    assert third.parts == second.parts


def test_kept_and_new_rows_are_merged_in_order(tmp_path):
    _, plan = planned(tmp_path, "one", [ref(uri) for uri in ("/b", "/d", "/f")])
    known = rows_of(tmp_path, commit(str(tmp_path), FINGERPRINT, "one", plan))
    _, plan = planned(tmp_path, "two", [ref(f"/{letter}") for letter in "abcdefg"], known)
    done = commit(str(tmp_path), FINGERPRINT, "two", plan)
    assert [row.uri for row in rows_of(tmp_path, done)] == [f"/{letter}" for letter in "abcdefg"]


@pytest.mark.parametrize(("count", "files"), [(0, 0), (1, 1), (10, 1), (11, 2), (30, 3)])
def test_a_catalog_fills_several_files(tmp_path, monkeypatch, count, files):
    monkeypatch.setattr(catalog, "_FILE_ROWS", 10)
    refs = [ref(f"/{number:03}") for number in range(count)]
    _, plan = planned(tmp_path, "run", refs)
    done = commit(str(tmp_path), FINGERPRINT, "run", plan)
    assert [file.name for file in done.files] == [f"catalog/run/{number:05}.parquet" for number in range(files)]
    assert [row.uri for row in rows_of(tmp_path, done)] == [ref.uri for ref in refs]
    assert all(len(file.read(str(tmp_path))) == file.size for file in done.files)


def test_a_catalog_is_found_through_the_manifest(tmp_path):
    run = stores.write_store(tmp_path, stores.clustered(3, 4))
    assert catalog_files(str(tmp_path), run) == [f"{tmp_path}/catalog/run-1/00000.parquet"]
    assert part_name("f", "p") == "parts/f/p.parquet"
    assert part_uri("gs://b/s", "f", "p") == "gs://b/s/parts/f/p.parquet"


def test_outcomes_are_counted_from_the_parts(tmp_path):
    refs = [ref(f"/{number:03}") for number in range(40)]
    bad = {"/003": "empty", "/017": "truncated", "/018": "truncated"}
    _, plan = planned(tmp_path, "run", refs, bad=bad)
    assert count_outcomes(str(tmp_path), FINGERPRINT, plan) == {EMBEDDED: 37, "empty": 1, "truncated": 2}


# What must not be committed


@pytest.mark.parametrize(
    "tamper",
    [
        lambda unit: unit[:-1],
        lambda unit: [*unit, ref("/zzz")],
        lambda unit: unit[:0],
        lambda unit: unit[::-1],
        lambda unit: [unit[0]._replace(etag="other"), *unit[1:]],
        lambda unit: [*unit[:-1], unit[-1]._replace(uri="/zzz")],
        lambda unit: [unit[0], *unit[:-1]],
    ],
    ids=["fewer", "more", "none", "order", "etag", "uri", "twice"],
)
def test_a_part_of_other_rows_is_refused(tmp_path, tamper):
    folder, plan = planned(tmp_path, "run", [ref(f"/{number:03}") for number in range(40)], unit_size=20)
    name = max(plan.units, key=lambda name: len(read_unit(folder, name)))
    write_part(tmp_path, name, tamper(read_unit(folder, name)), {})
    with pytest.raises(FormatError, match=f"{name}.parquet does not hold its unit's images; delete it and rerun"):
        commit(str(tmp_path), FINGERPRINT, "run", plan)


def test_a_missing_or_damaged_part_is_named(tmp_path):
    _, plan = planned(tmp_path, "run", [ref("/a")])
    path = tmp_path / part_name(FINGERPRINT, plan.units[0])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError, match=path.name):
        commit(str(tmp_path), FINGERPRINT, "run", plan)
    path.unlink()
    with pytest.raises(NotFound, match=path.name):
        commit(str(tmp_path), FINGERPRINT, "run", plan)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda rows: rows[1:],
        lambda rows: [rows[0]._replace(etag="other"), *rows[1:]],
        lambda rows: [rows[0]._replace(uri="/0"), *rows[1:]],
        lambda rows: [rows[0], *rows],
    ],
    ids=["fewer", "etag", "uri", "twice"],
)
def test_kept_rows_that_were_not_listed_are_refused(tmp_path, tamper):
    refs = [ref(f"/{letter}") for letter in "bdf"]
    _, plan = planned(tmp_path, "one", refs)
    known = rows_of(tmp_path, commit(str(tmp_path), FINGERPRINT, "one", plan))
    folder, plan = planned(tmp_path, "two", [*refs, ref("/z")], known)
    uri = storage.join(folder, plan.kept_files[0].name)
    storage.of(uri).delete(uri)
    storage.create(uri, to_parquet(to_table(tamper(known), CATALOG), row_group=9))
    with pytest.raises(FormatError, match="run two: the catalog does not hold the images that were listed"):
        commit(str(tmp_path), FINGERPRINT, "two", plan)


@pytest.mark.parametrize("change", [{"new": 4}, {"kept": 1}, {"new": 2}])
def test_a_run_whose_sum_is_off_fails(tmp_path, change):
    _, plan = planned(tmp_path, "run", [ref(f"/{letter}") for letter in "abc"])
    with pytest.raises(FormatError, match=r"run run: \d images were listed, 3 rows came out"):
        commit(str(tmp_path), FINGERPRINT, "run", dataclasses.replace(plan, **change))
