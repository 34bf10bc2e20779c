import pytest

from benchmarks.memory import MODES, compare
from jobs.console import table


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
def test_memory_is_flat_small(mode):
    """Ten times the images must not take 1.3 times the memory."""
    rows = compare([1000, 10_000], [mode])
    print("\n" + table(rows, ["mode", "images", "peak MiB", "ratio", "images/s"]))
    assert rows[-1][3] <= 1.3
