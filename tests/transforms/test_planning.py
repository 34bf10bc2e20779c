import itertools
import random

import pytest

from serving import storage
from transforms import planning
from transforms.planning import (
    ListingDigest,
    Plan,
    Planner,
    cut,
    discard,
    merge_join,
    read_unit,
    unit_name,
)
from transforms.schema import CATALOG, EMBEDDED, REJECTED, CatalogRow, ImageRef, iter_rows, uri_hash

RECIPE = {"embedder": "f00d", "precision": "float16"}


def ref(uri, etag="e", label=None):
    return ImageRef(uri, etag, 1, 0, label)


def row(uri, etag="e", label=None, status=EMBEDDED):
    return CatalogRow(uri, etag, label, "part", 0, status, None if status == EMBEDDED else "empty", uri_hash(uri))


def refs(count, first=0):
    return [ref(f"/photos/{number:06}.jpg") for number in range(first, first + count)]


def random_sides(seed, size=400):
    """A listing and a catalog of overlapping uris, as dicts."""
    rng = random.Random(seed)
    uris = [f"/{rng.choice('ab~é')}/{number}" for number in range(size)]
    listed = {uri: ref(uri, rng.choice("12"), rng.choice([None, "cat", "dog"])) for uri in uris if rng.random() < 0.8}
    known = {
        uri: row(uri, rng.choice("12"), rng.choice([None, "cat", "dog"]), rng.choice([EMBEDDED, EMBEDDED, REJECTED]))
        for uri in uris
        if rng.random() < 0.7
    }
    return listed, known


def in_order(side):
    return [side[uri] for uri in sorted(side)]


def plan_of(folder, listed, known=(), unit_size=64, recipe=None, retry=None) -> Plan:
    planner = Planner(str(folder), recipe or RECIPE, unit_size, attempt=retry or "", retry_rejects=bool(retry))
    return planner.plan(listed, known)


def planned(folder, plan):
    return [ref for name in plan.units for ref in read_unit(str(folder), name)]


def kept(folder, plan):
    uris = [storage.join(str(folder), file.name) for file in plan.kept_files]
    return list(iter_rows(uris, CatalogRow, CATALOG))


# The merge-join


@pytest.mark.parametrize("seed", range(10))
def test_joining_agrees_with_dicts(seed):
    listed, known = random_sides(seed)
    expected = [(listed.get(uri), known.get(uri)) for uri in sorted({*listed, *known})]
    assert list(merge_join(in_order(listed), in_order(known))) == expected


@pytest.mark.parametrize(("left", "right"), [("", ""), ("abc", ""), ("", "abc"), ("ab", "cd"), ("cd", "ab")])
def test_joining_goes_on_when_one_side_has_ended(left, right):
    joined = list(merge_join([ref(uri) for uri in left], [row(uri) for uri in right]))
    assert [(found.listed or found.known).uri for found in joined] == sorted(left + right)


def test_joining_holds_one_row_of_each_side():
    taken = [0, 0]

    def counted(side, items):
        for item in items:
            taken[side] += 1
            yield item

    joined = merge_join(counted(0, refs(100)), counted(1, map(row, (ref.uri for ref in refs(100)))))
    for number, _ in enumerate(itertools.islice(joined, 50), 1):
        assert max(taken) <= number + 1


# Units


@pytest.mark.parametrize("unit_size", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize("count", [0, 1, 2, 500])
def test_units_are_the_whole_listing_in_order_and_none_is_too_long(unit_size, count):
    units = list(cut(refs(count), unit_size))
    assert [ref for unit in units for ref in unit] == refs(count)
    assert all(1 <= len(unit) <= unit_size for unit in units)


def test_units_are_not_needlessly_short():
    lengths = [len(unit) for unit in cut(refs(20_000), 200)]
    # A cut by chance 2 in 200 or at 200: the mean is 100 (1 - (1 - 1/100)^200) = 87.
    assert sum(lengths) / len(lengths) == pytest.approx(87, rel=0.15)


def names_of(listed, unit_size=64):
    return {unit_name(unit, "recipe") for unit in cut(listed, unit_size)}


@pytest.mark.parametrize("unit_size", [16, 64, 256])
def test_an_image_more_or_less_changes_the_units_near_it_only(unit_size):
    listed = refs(2500)
    before = names_of(listed, unit_size)
    rng = random.Random(unit_size)
    changes = []
    for _ in range(40):
        place = rng.randrange(len(listed))
        if rng.random() < 0.5:
            after = listed[:place] + listed[place + 1 :]
        else:
            after = [*listed[:place], ref(f"{listed[place].uri}~"), *listed[place:]]
            after.sort()
        changes.append(len(before ^ names_of(after, unit_size)) / 2)
    # Behind the change, units come back into step at the next cut that a uri's own hash makes.
    assert sum(changes) / len(changes) < 3
    assert max(changes) <= 10
    assert len(before) >= 2500 / unit_size


def test_a_changed_image_changes_its_own_unit_only():
    listed = refs(3000)
    after = [*listed[:1500], listed[1500]._replace(etag="new"), *listed[1501:]]
    assert len(names_of(listed) ^ names_of(after)) == 2


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"etag": "other"}, False),
        ({"uri": "/other"}, False),
        ({"label": "other"}, True),
        ({"size": 99}, True),
        ({"updated": 99}, True),
    ],
)
def test_what_a_unit_is_named_by(change, same):
    unit = refs(3)
    changed = [unit[0], unit[1]._replace(**change), unit[2]]
    assert (unit_name(unit, "recipe") == unit_name(changed, "recipe")) == same


def test_a_unit_is_named_by_its_recipe_order_and_length_too():
    names = {unit_name(unit, recipe) for unit in (refs(3), refs(3)[::-1], refs(2), []) for recipe in ("a", "b")}
    assert len(names) == 8
    assert all(len(name) == 32 and int(name, 16) >= 0 for name in names)


# The digest


def digest(*images):
    running = ListingDigest()
    for uri, etag in images:
        running.add(uri, etag)
    return running.hex()


def test_a_digest_tells_listings_apart():
    listings = [(), (("a", "1"),), (("a", "1"), ("b", "2")), (("b", "2"), ("a", "1")), (("a", "12"),), (("a1", "2"),)]
    assert len({digest(*images) for images in listings}) == len(listings)
    # printf 'a\0001\nb\0002\n' | sha256sum
    assert digest(("a", "1"), ("b", "2")) == "1a04f75bd0704a1e3a5609aa6cef325ce65e2ccde2c36252d0e2fc2ddcb5762d"


# Plans


@pytest.mark.parametrize("retry", [None, "again"])
@pytest.mark.parametrize("seed", range(6))
def test_a_plan_agrees_with_dicts(seed, retry, tmp_path):
    listed, known = random_sides(seed)
    plan = plan_of(tmp_path, in_order(listed), in_order(known), unit_size=32, retry=retry)
    stays = {
        uri
        for uri in listed.keys() & known.keys()
        if listed[uri].etag == known[uri].etag and not (retry and known[uri].status == REJECTED)
    }
    assert planned(tmp_path, plan) == in_order({uri: listed[uri] for uri in listed.keys() - stays})
    assert kept(tmp_path, plan) == in_order({uri: known[uri]._replace(label=listed[uri].label) for uri in stays})
    assert (plan.new, plan.kept, plan.listed) == (len(listed) - len(stays), len(stays), len(listed))
    assert plan.relabelled == sum(known[uri].label != listed[uri].label for uri in stays)
    assert plan.gone == len(known.keys() - listed.keys())
    assert plan.listing_digest == digest(*((uri, listed[uri].etag) for uri in sorted(listed)))
    assert not plan.changes_nothing


def test_a_plan_is_deterministic(tmp_path):
    listed, known = random_sides(1)
    plans = [plan_of(tmp_path / name, in_order(listed), in_order(known)) for name in "ab"]
    assert plans[0] == plans[1]
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1]
    assert len(files[0]) == 1 + len(plans[0].unit_files) + len(plans[0].kept_files)


def test_a_plan_names_files_as_they_are(tmp_path):
    listed, known = random_sides(2)
    plan = plan_of(tmp_path, in_order(listed), in_order(known))
    for file in (*plan.unit_files, *plan.kept_files):
        assert file.read(str(tmp_path))
    assert [file.name for file in plan.unit_files] == [f"unit-{name}.parquet" for name in plan.units]
    assert Plan.load(f"{tmp_path}/plan.json") == plan


@pytest.mark.parametrize(
    ("known", "nothing"),
    [
        ([row("/a"), row("/b", label="x")], True),
        ([row("/a"), row("/b")], False),  # a label
        ([row("/a"), row("/b", label="x"), row("/c")], False),  # one gone
        ([row("/a")], False),  # one new
        ([row("/a", "old"), row("/b", label="x")], False),
        ([row("/a", status=REJECTED), row("/b", label="x")], True),
    ],
)
def test_a_plan_knows_whether_it_changes_anything(tmp_path, known, nothing):
    assert plan_of(tmp_path, [ref("/a"), ref("/b", label="x")], known).changes_nothing == nothing


def test_another_recipe_or_another_try_names_other_units(tmp_path):
    plans = [
        plan_of(tmp_path / str(number), refs(100), **options)
        for number, options in enumerate([{}, {"recipe": {"embedder": "beef"}}, {"retry": "once"}, {"retry": "twice"}])
    ]
    names = [set(plan.units) for plan in plans]
    assert all(not one & other for one, other in itertools.combinations(names, 2))


def test_the_order_of_a_recipe_does_not_matter(tmp_path):
    plans = [
        plan_of(tmp_path / str(number), refs(10), recipe=recipe)
        for number, recipe in enumerate([{"a": 1, "b": 2}, {"b": 2, "a": 1}])
    ]
    assert plans[0].units == plans[1].units


def test_kept_rows_fill_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_KEPT_ROWS", 10)
    known = [row(ref.uri) for ref in refs(25)]
    plan = plan_of(tmp_path, refs(25), known)
    assert [file.name for file in plan.kept_files] == [f"kept-{number:05}.parquet" for number in range(3)]
    assert kept(tmp_path, plan) == known


def test_nothing_listed_is_a_plan_of_nothing(tmp_path):
    plan = plan_of(tmp_path, [], [row("/a")])
    assert (plan.units, plan.kept_files, plan.listed, plan.gone) == ((), (), 0, 1)


def test_discarding_leaves_no_file(tmp_path):
    listed, known = random_sides(3)
    plan = plan_of(tmp_path / "plan", in_order(listed), in_order(known))
    (tmp_path / "plan" / "other").touch()
    discard(f"{tmp_path}/plan", plan)
    assert [path.name for path in (tmp_path / "plan").iterdir()] == ["other"]
