"""The asking side: one worker process per peer and per stage."""

import json
import os
import select
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from benchmarks.peers import environments
from benchmarks.peers.environments import PeerFailed

_ROOT = Path(__file__).parents[2]
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Peer:
    """A running worker; built in one, opened and searched in the next.

        with Peer("hnswlib", folder, threads=2) as peer:
            peer.ask({"do": "build", "vectors": vectors, "params": {"threads": 2}})
        with Peer("hnswlib", folder) as peer:
            peer.ask({"do": "open"})

    `python` is the interpreter, by default that of the peer's own environment, which is made if it is missing.
    """

    def __init__(self, name: str, folder: Path, python: Path | None = None, threads: int = 1) -> None:
        self.name, self.log = name, folder / "worker.log"
        self._command = [
            str(python or environments.python(name)),
            "-m",
            "benchmarks.peers.worker",
            name,
            str(folder.absolute()),
        ]
        self._environment = {**os.environ, **dict.fromkeys(_THREADS, str(threads))}
        self._environment.pop("PYTHONPATH", None)

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=_ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, command: Mapping[str, Any], timeout: float = 3600) -> dict[str, Any]:
        """Send a command, with paths as `Path`s or absolute; return its answer, or raise PeerFailed."""
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        try:
            print(json.dumps(command, default=_absolute), file=pipe_in, flush=True)
        except BrokenPipeError:
            raise self._died() from None
        ready, _, _ = select.select([pipe_out], [], [], timeout)
        if not ready:
            self._process.kill()
            raise PeerFailed(f"{self.name} did not answer {command['do']} within {timeout:g} s")
        line = pipe_out.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{self.name} cannot {command['do']}: {answer['error']}")
        return answer

    def _died(self) -> PeerFailed:
        """Say with what last words the worker ended."""
        status = self._process.wait()
        said = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return PeerFailed(f"{self.name} died with {status}: {said[-1] if said else 'it said nothing'}")


def _absolute(path: Path) -> str:
    """Write a path so that it holds in another working directory."""
    return str(path.absolute())
