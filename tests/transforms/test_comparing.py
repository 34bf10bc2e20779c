import random

import pytest

from transforms.comparing import Changes, compare, fresh
from transforms.schema import CatalogRow, uri_hash


def row(uri: str, etag: str = "1", label: str | None = None, status: str = "embedded") -> CatalogRow:
    return CatalogRow(uri, etag, label, "part", 0, status, None if status == "embedded" else "empty", uri_hash(uri))


BEFORE = [row("a"), row("b"), row("c", label="x"), row("d", status="rejected"), row("e"), row("f", status="unread")]


def test_every_row_is_counted_once():
    now = [
        row("a"),  # as it was
        row("b", etag="2"),  # changed
        row("c", label="y"),  # relabelled
        row("d"),  # embedded at last: new to the index
        row("e", etag="2", status="rejected"),  # out of the index
        row("g"),  # added
        row("h", status="rejected"),  # never in it
    ]
    assert compare(now, BEFORE) == Changes(added=2, changed=1, removed=1, reused=2, relabelled=1, rejected=2)
    assert [found.uri for found in fresh(now, BEFORE)] == ["b", "d", "g"]


def test_another_embedder_changes_all_that_stays():
    assert compare(BEFORE, BEFORE, same_embedder=False) == Changes(changed=4, rejected=2)


def test_the_first_and_the_last_of_a_catalog():
    assert compare(BEFORE, []) == Changes(added=4, rejected=2)
    assert compare([], BEFORE) == Changes(removed=4)
    assert list(fresh(BEFORE, [])) == [BEFORE[0], BEFORE[1], BEFORE[2], BEFORE[4]]
    assert list(fresh([], BEFORE)) == []


@pytest.mark.parametrize("seed", range(5))
def test_the_counts_close_as_sets_tell(seed):
    rng = random.Random(seed)

    def catalog() -> list[CatalogRow]:
        uris = sorted(rng.sample([f"/{number:03}" for number in range(200)], 120))
        return [row(uri, rng.choice("12"), rng.choice("xy"), rng.choice(["embedded", "rejected"])) for uri in uris]

    before, now = catalog(), catalog()
    was = {found.uri: found for found in before if found.status == "embedded"}
    have = {found.uri: found for found in now if found.status == "embedded"}
    both = was.keys() & have.keys()
    same = {uri for uri in both if was[uri].etag == have[uri].etag}
    assert compare(now, before) == Changes(
        added=len(have.keys() - was.keys()),
        changed=len(both - same),
        removed=len(was.keys() - have.keys()),
        reused=len(same),
        relabelled=sum(was[uri].label != have[uri].label for uri in same),
        rejected=len(now) - len(have),
    )
    assert {found.uri for found in fresh(now, before)} == have.keys() - same
