import pytest

pytest.importorskip("apache_beam", reason="the pipelines are not installed")

from benchmarks.embed import HEADERS, System, lines, shares, systems


def row(kind, *rates, engine="litert", **spent):
    rounds = [{"images_per_second": rate, "whole": rate / 2, "together": 0.9 * rate, **spent} for rate in rates]
    return System(kind, kind, 10, engine, rounds=rounds, peak=100.4)


def test_ratios_are_of_rounds_not_of_medians():
    """A round on a busy machine slows all systems in it, and must not change who is how much faster."""
    single = row("keras_single", 5, 1, 4)
    ours = row("ours", 100, 20, 88, decode=1.0, infer=3.0)
    limit = row("parts", 125, 25, 100, decode=1.0, infer=1.0)
    laid = {cells[0]: dict(zip(HEADERS, cells, strict=True)) for cells in lines([single, ours, limit])}
    assert laid["ours"]["images/s"] == 88
    assert laid["ours"]["× Keras, single"] == 20
    assert laid["ours"]["of the limit"] == 0.8
    assert laid["  the whole job"]["images/s"] == 44
    assert laid["  its parts on all cores at once"]["of the limit"] == 0.9
    assert laid["parts"]["of the limit"] == 1
    assert laid["keras_single"]["× Keras, single"] == 1


def test_shares_are_of_the_time_that_was_counted():
    assert shares(row("ours", 1, 1, wait=0.0, decode=1.0, infer=2.0, write=1.0)) == [None, 25, 50, 25]


@pytest.mark.parametrize(("backbone", "engines"), [("mobilenet_v2", {"litert"}), ("vgg16", {"litert", "tensorflow"})])
def test_each_engine_has_its_own_limit(backbone, engines):
    rows = systems(backbone, 100)
    for kind in ("ours", "parts"):
        assert {found.engine for found in rows if found.kind == kind} == engines
