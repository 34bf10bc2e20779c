"""What is found among labelled vectors, and a whole small run."""

import numpy as np
import pytest

from benchmarks import precision
from benchmarks.precision import HEADERS, Quality, compare


def test_quality_worked_out_by_hand():
    """On a quarter circle, A B A B from left to right, the nearest of each is of the other kind."""
    angles = np.radians([0, 10, 21, 33])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = Quality.of(vectors, np.array(["a", "b", "a", "b"]))
    assert found.at_1 == 0
    assert found.at_10 == pytest.approx(1 / 3)
    # The other of its kind comes second for the ends and third, second for those between.
    assert found.mean_average == pytest.approx((1 / 2 + 1 / 3 + 1 / 3 + 1 / 2) / 4)


def test_the_only_one_of_its_kind_has_no_average():
    vectors = np.array([[1, 0], [0.9, 0.1], [0, 1]], np.float32)
    found = Quality.of(vectors, np.array(["a", "a", "b"]))
    assert found.mean_average == 1
    assert found.cells == [0.667, 0.333, 1.0]


def test_a_small_run(drawn):
    counts, rows = compare(str(drawn), "mobilenet", "untrained")
    assert counts == "60 photos, 30 of them others than int8 was calibrated on"
    assert [row[0] for row in rows] == ["float32, LiteRT", "int8, LiteRT", "float32, TensorFlow"]
    assert all(len(row) == len(HEADERS) for row in rows)
    exact, rough, other = (dict(zip(HEADERS, row, strict=True)) for row in rows)
    assert exact["times as fast"] == 1
    assert rough["bytes"] < exact["bytes"] / 3
    assert [other[name] for name in HEADERS[4:]] == pytest.approx([exact[name] for name in HEADERS[4:]], abs=0.05)
    assert all(0 <= row[name] <= 1 for row in (exact, rough, other) for name in HEADERS[4:])


def test_what_is_missing_is_said(monkeypatch, capsys):
    for name in ("LOOKALIKE_PHOTOS", "LOOKALIKE_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.argv", ["precision", "--photos", "photos"])
    with pytest.raises(SystemExit):
        precision.main()
    assert "name --weights, or set LOOKALIKE_WEIGHTS" in capsys.readouterr().err
