"""One virtual environment per peer, because some of them exclude each other.

    python -m benchmarks.peers.environments hnswlib scann

They lie in `~/.cache/lookalike/peers`, or in the folder that `LOOKALIKE_PEERS` names.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_NUMPY = "numpy==2.4.6"
REQUIREMENTS: dict[str, Sequence[str]] = {
    "faiss": ("faiss-cpu==1.15.1", _NUMPY),
    "hnswlib": ("hnswlib==0.8.0", _NUMPY),
    "usearch": ("usearch==2.26.6", "numkong==7.8.6", _NUMPY),
    "voyager": ("voyager==2.2.3", _NUMPY),
    "annoy": ("annoy==1.17.3", _NUMPY),
    # autofaiss excludes NumPy 2, and later releases of Arrow exclude NumPy 1; FAISS 1.14 renamed an argument it gives.
    "autofaiss": (
        "autofaiss==2.18.0",
        "embedding-reader==1.8.1",
        "faiss-cpu==1.13.2",
        "numpy==1.26.4",
        "pandas==2.3.3",
        "pyarrow==20.0.0",
    ),
    "scann": ("scann==1.4.2", "protobuf==7.36.2", _NUMPY),
    "svs": ("scalable-vs==0.5.0", _NUMPY),
}


class PeerFailed(RuntimeError):
    """A peer cannot be installed, died, or answered an error; one sentence."""


def python(name: str) -> Path:
    """Return the interpreter of a peer's environment, made first if need be; raises PeerFailed."""
    if name not in REQUIREMENTS:
        raise PeerFailed(f"there is no peer named {name}: choose from {', '.join(REQUIREMENTS)}")
    home = folder() / name
    interpreter, installed = home / "bin" / "python", home / "installed.txt"
    wanted = "\n".join((sys.version, *REQUIREMENTS[name]))
    if installed.is_file() and installed.read_text() == wanted:
        return interpreter
    home.parent.mkdir(parents=True, exist_ok=True)
    _run(name, [sys.executable, "-m", "venv", "--clear", str(home)])
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run(name, [*pip, *REQUIREMENTS[name]])
    installed.write_text(wanted)
    return interpreter


def folder() -> Path:
    """Return where the environments lie."""
    return Path(os.environ.get("LOOKALIKE_PEERS") or Path.home() / ".cache" / "lookalike" / "peers")


def _run(name: str, command: Sequence[str]) -> None:
    """Run one step of an installation."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise PeerFailed(f"{name} cannot be installed: {lines[-1] if lines else f'status {done.returncode}'}")


def main() -> None:
    """Make the environments named on the command line, or all."""
    for name in sys.argv[1:] or REQUIREMENTS:
        try:
            print(python(name))
        except PeerFailed as error:
            print(error)


if __name__ == "__main__":
    main()
