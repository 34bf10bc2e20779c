import dataclasses
import math

import pytest

from serving.errors import UsageError
from transforms.designing import SMALLEST, Design, Wishes, designs, held_out

MILLION = 10**6


def first(rows, raw_dim, **wishes):
    return designs(rows, raw_dim, Wishes(**wishes))[0]


# Queries


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, 0),
        (623, 0),
        (624, 0),
        (778, 0),  # a fifth, 155, would leave 623
        (779, 155),
        (1000, 200),
        (4999, 999),
        (5000, 1000),
        (10**9, 1000),
    ],
)
def test_a_fifth_is_left_out_to_ask_with_where_enough_is_left_to_train_on(rows, expected):
    assert held_out(rows) == expected


# Too few to train on


def test_a_collection_too_small_to_train_on_gets_an_exact_index():
    assert SMALLEST == 624
    exact = Design("exact", 48, 1, 4 * 48, 0)
    assert designs(623, 48, Wishes()) == [exact]
    assert designs(1, 48, Wishes(dim=16, nlist=7)) == [exact]
    assert designs(1, 48, Wishes(faithful=True)) == [exact]
    assert exact.resident_bytes == 8 + 4 * 48
    assert first(624, 48, dim=16).kind == "ivf-pq"


def test_too_few_to_train_codes_on_do_not_fit_a_budget_below_whole_vectors():
    assert designs(623, 48, Wishes(max_bytes=200)) == designs(623, 48, Wishes())
    said = (
        "--max-bytes-per-vector is 199; below 624 images there is too little to train codes on, "
        "and whole vectors take 200"
    )
    with pytest.raises(UsageError, match=said):
        designs(623, 48, Wishes(max_bytes=199))


# Lists


@pytest.mark.parametrize(
    ("rows", "nlist"),
    [
        (624, 16),  # 2 √624 = 50, and 624 train 16 lists
        (900, 16),  # 720 are trained on: 18 lists, so 16
        (5000, 64),  # 4,000 are trained on: 102
        (20_000, 256),  # 19,000: 2 √19,000 = 276
        (100_000, 512),  # 99,000: 629
        (500_000, 1024),  # 2 √499,000 = 1,413: nearer 1,024 than 2,048 as a ratio
        (530_000, 2048),  # 1,455
        (1_000_000, 2048),
        (4_200_000, 4096),
        (100_000_000, 4096),  # 2 √n = 20,000, and a gibibyte holds 209,715 vectors, which train 5,377 lists
    ],
)
def test_lists_are_the_power_of_two_nearest_twice_the_root_as_far_as_a_sample_reaches(rows, nlist):
    assert first(rows, 1280).nlist == nlist


@pytest.mark.parametrize("rows", [624, 700, 5000, 10**5, 10**6, 10**7, 10**9])
@pytest.mark.parametrize("raw_dim", [16, 1280, 2048])
def test_a_sample_trains_its_lists_and_fits_into_memory(rows, raw_dim):
    shape = first(rows, raw_dim)
    trained_on = rows - held_out(rows)
    assert 39 * shape.nlist <= shape.sample <= trained_on
    assert 4 * raw_dim * shape.sample <= 1 << 30
    # Vectors are not thrown away without need: all of them, or 100 a list, or what memory holds.
    enough = min(trained_on, 100 * max(1024, shape.nlist), (1 << 30) // (4 * raw_dim))
    assert shape.sample == enough


@pytest.mark.parametrize("nlist", [None, 1, 2, 3, 16, 100])
@pytest.mark.parametrize("dim", [2, 128, 1000])
def test_a_sample_is_enough_for_codebooks_and_for_the_transform(nlist, dim):
    shape = first(5000, 1280, dim=dim, nlist=nlist)
    assert shape.sample >= max(SMALLEST, 39 * shape.nlist, shape.dim)
    assert shape.nlist == (nlist or 64)
    assert shape.dim == dim


def test_a_sample_is_as_large_as_the_lists_that_were_asked_for_need():
    """Whoever names the number of lists pays for it in memory."""
    assert first(20 * MILLION, 2048, nlist=8192).sample == 39 * 8192 > (1 << 30) // (4 * 2048)


def test_as_many_lists_as_can_be_trained_are_accepted():
    assert first(1000, 48, nlist=20).nlist == 20  # 200 are left out, 800 train 20
    with pytest.raises(UsageError, match=r"--nlist is 21; 800 vectors can train 1 to 20 lists"):
        designs(1000, 48, Wishes(nlist=21))


@pytest.mark.parametrize(("nlist", "graph"), [(4095, False), (4096, True), (5000, True)])
def test_many_lists_are_found_through_a_graph(nlist, graph):
    shape = first(MILLION, 64, nlist=nlist)
    assert shape.graph is graph
    assert not dataclasses.replace(shape, kind="custom").graph


# Dimensions and bytes


def test_fewer_dimensions_are_tried_after_more():
    assert [shape.dim for shape in designs(MILLION, 1280, Wishes())] == [128, 64, 32, 16]
    assert [shape.dim for shape in designs(MILLION, 1280, Wishes(faithful=True))] == [128, 256]
    assert [shape.dim for shape in designs(MILLION, 1280, Wishes(dim=50))] == [50]
    assert [shape.dim for shape in designs(MILLION, 1280, Wishes(dim=50, faithful=True))] == [50]


@pytest.mark.parametrize(
    ("rows", "raw_dim", "dim", "expected"),
    [(5000, 48, 128, 48), (5000, 1280, 64, 64), (5000, 49, 128, 48), (625, 1280, 1280, 624), (5000, 7, 4, 4)],
)
def test_no_more_dimensions_than_there_are_vectors_or_than_these_have(rows, raw_dim, dim, expected):
    assert first(rows, raw_dim, dim=dim).dim == expected


@pytest.mark.parametrize(
    ("raw_dim", "faithful", "expected"), [(48, False, [48, 32, 16]), (9, False, [8]), (200, True, [128, 200])]
)
def test_dimensions_that_vectors_do_not_have_are_no_second_try(raw_dim, faithful, expected):
    assert [shape.dim for shape in designs(5000, raw_dim, Wishes(faithful=faithful))] == expected


def test_a_design_counts_its_bytes():
    reduced, faithful = first(MILLION, 1280), first(MILLION, 1280, faithful=True)
    assert (reduced.code_bytes, reduced.refine_bytes, reduced.raw_bytes) == (32, 128, 0)  # 64 codes of half a byte
    assert (faithful.code_bytes, faithful.refine_bytes, faithful.raw_bytes) == (32, 128, 1280)
    assert reduced.resident_bytes == faithful.resident_bytes == 8 + 32 + 128, "whole vectors stay on disk"
    assert first(MILLION, 1280, dim=6).code_bytes == 2, "three codes of half a byte"


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        # 8 bytes of a row number, a quarter byte a dimension, and a byte a dimension where it is ranked again.
        (1000, [(128, True), (64, True), (32, True), (128, False), (16, True), (64, False), (32, False), (16, False)]),
        (168, [(128, True), (64, True), (32, True), (128, False), (16, True), (64, False), (32, False), (16, False)]),
        (167.9, [(64, True), (32, True), (128, False), (16, True), (64, False), (32, False), (16, False)]),
        (47, [(128, False), (16, True), (64, False), (32, False), (16, False)]),
        (40, [(128, False), (16, True), (64, False), (32, False), (16, False)]),
        (27, [(64, False), (32, False), (16, False)]),
        (12, [(16, False)]),
    ],
)
def test_the_richest_shape_within_the_budget_comes_first(budget, expected):
    shapes = designs(MILLION, 1280, Wishes(max_bytes=budget))
    assert [(shape.dim, shape.refine_bytes > 0) for shape in shapes] == expected
    costs = [8 + shape.dim / 4 + shape.refine_bytes for shape in shapes]
    assert [shape.resident_bytes for shape in shapes] == costs == sorted(costs, reverse=True)
    assert max(costs) <= budget


@pytest.mark.parametrize("budget", [11.9, 1])
def test_a_budget_that_nothing_fits_into_is_refused_with_the_least_there_is(budget):
    with pytest.raises(UsageError, match=rf"--max-bytes-per-vector is {budget:g}; the smallest index takes 12"):
        designs(MILLION, 1280, Wishes(max_bytes=budget))


def test_a_budget_goes_with_dimensions_that_were_asked_for():
    assert [shape.resident_bytes for shape in designs(MILLION, 1280, Wishes(dim=64, max_bytes=100))] == [88, 24]
    with pytest.raises(UsageError, match="the smallest index takes 24"):
        designs(MILLION, 1280, Wishes(dim=64, max_bytes=23))


# FAISS's own key


def test_a_key_says_everything_but_the_sample():
    assert designs(1000, 48, Wishes(factory="IVF8,Flat")) == [Design("custom", 0, 0, 0, 800, factory="IVF8,Flat")]
    assert first(10 * MILLION, 1024, factory="IVF8,Flat").sample == 1 << 18, "a gibibyte of 4,096 bytes each"


@pytest.mark.parametrize("other", [{"dim": 16}, {"nlist": 8}, {"faithful": True}, {"max_bytes": 20}])
def test_a_key_excludes_other_wishes(other):
    with pytest.raises(UsageError, match="--index-factory says everything about the index's shape; leave out --dim"):
        Wishes(factory="IVF8,Flat", **other)


# Wrong wishes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dim": 1}, r"--dim is 1; take at least 2"),
        ({"dim": 0}, r"--dim is 0; take at least 2"),
        ({"dim": -4}, r"--dim is -4; take at least 2"),
        ({"dim": 33}, r"--dim 33 is odd; codes stand for 2 dimensions each, take an even one"),
        ({"nlist": 0}, r"--nlist is 0; take at least 1"),
        ({"nlist": -1}, r"--nlist is -1; take at least 1"),
        ({"max_bytes": 0}, r"--max-bytes-per-vector is 0; take more than 0"),
        ({"max_bytes": -5}, r"--max-bytes-per-vector is -5; take more than 0"),
        ({"max_bytes": math.nan}, r"--max-bytes-per-vector is nan; take more than 0"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence_before_any_collection_is_seen(options, said):
    with pytest.raises(UsageError, match=said):
        Wishes(**options)
