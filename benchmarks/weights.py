"""Where the trained weights are that benchmarks use; apart, as it loads nothing."""

import os
from pathlib import Path

_BACKBONE, _FILE = "mobilenet_v2", "mobilenet_v2_1.0_224_no_top_bnfolded.h5"


def weights_of(backbone: str) -> str:
    """Return the file of a backbone's trained weights in the folder LOOKALIKE_WEIGHTS, `untrained` without one."""
    folder = os.environ.get("LOOKALIKE_WEIGHTS")
    return str(Path(folder, _FILE)) if folder and backbone == _BACKBONE else "untrained"
