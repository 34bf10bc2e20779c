"""Have an index built, by ours or by autofaiss, in a process of its own: what that took, stage by stage."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.collection import Collection
from benchmarks.peers import environments
from benchmarks.peers.environments import PeerFailed
from benchmarks.rounds import Measured, say
from benchmarks.watching import Peak, ask, last_words, watch
from pipelines.index import IndexRequest, run
from pipelines.runner import Runner
from serving.errors import LookalikeError

OURS, ITS = "lookalike", "autofaiss"
_ID_BYTES = 8
_FINISHED = re.compile(r'>>> Finished "(?:-> )?(.*)" in ([\d.]+) secs')
_STAGES = {
    "Extract training vectors": "train",
    "Training the index": "train",
    "Adding the vectors": "encode",
    "Saving the index": "save",
    "Computing best hyperparameters": "measure",
    "Compute fast metrics": "measure",
}
Stages = dict[str, float]
Event = tuple[str, float, float]  # a stage, when it began, when it ended


@dataclass(slots=True)
class Built:
    """One system: what building took and what came of it, or why nothing did."""

    title: str
    absent: str | None = None
    peak: Peak = field(default_factory=lambda: Peak(0, 0))
    stages: Stages = field(default_factory=dict)
    shape: str = ""
    bytes_a_vector: int | None = None
    found: Measured = field(default_factory=Measured)
    reduced: float | None = None
    """Recall@10 in its own space."""


class Clock:
    """A `pipelines.runner.Progress` that remembers when stages began and ended."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._open = ("", 0.0)

    def start(self, stage: str, total: int, unit: str) -> None:  # noqa: ARG002
        """Begin."""
        self._open = stage, time.monotonic()

    def update(self, done: int, rejected: int) -> None:
        """Do without."""

    def finish(self) -> None:
        """End."""
        self.events.append((*self._open, time.monotonic()))


def split(events: Sequence[Event], ended: float) -> Stages:
    """Add up seconds by what they were for; searching exactly begins the measuring, which lasts to the next stage."""
    stages: Stages = {}
    following = [*(began for _, began, _ in events[1:]), ended]
    for (stage, began, finished), after in zip(events, following, strict=True):
        name = {"sample": "train", "search exactly": "measure"}.get(stage, stage)
        stages[name] = stages.get(name, 0.0) + (after if name == "measure" else finished) - began
    return stages


def split_log(lines: Iterable[str]) -> Stages:
    """Add up seconds that autofaiss logged; it counts saving and tuning as parts of adding."""
    stages: Stages = {}
    for said in filter(None, map(_FINISHED.search, lines)):
        for start, name in _STAGES.items():
            if said[1].startswith(start):
                stages[name] = stages.get(name, 0.0) + float(said[2])
                if name in ("save", "measure"):
                    stages["encode"] = stages.get("encode", 0.0) - float(said[2])
    return stages


def key_of(bytes_a_vector: int, count: int, width: int) -> str:
    """Return the key that autofaiss's rules make of so many bytes a vector, or of the most that it takes."""
    codes = min(bytes_a_vector - _ID_BYTES, width - 1)
    turned = codes * (min(width // codes, 6) + 1)
    lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    if count >= 1_000_000:
        lists = 1 << 14 if count < 10_000_000 else 1 << 16
    return f"OPQ{codes}_{turned},IVF{lists}{'' if lists < 1000 else '_HNSW32'},PQ{codes}x8"


def bytes_of(key: str) -> int | None:
    """Return the bytes a vector, codes and id, of a key; None where its codes are not by product quantization."""
    codes = re.search(r",PQ(\d+)(?:x(\d+))?", key)
    return codes and _ID_BYTES + math.ceil(int(codes[1]) * int(codes[2] or 8) / 8)


def build_ours(collection: Collection, target: float, beam: Sequence[str]) -> Built:
    """Index the store."""
    folder = _emptied(collection, OURS)
    say(f"building {OURS}")
    peak, made = ask("benchmarks.builders", folder / "log", collection.store.absolute(), folder / "made", target, *beam)
    return Built(OURS, peak=peak, **made)


def build_its(collection: Collection, key: str | None, bytes_a_vector: int, cores: int, available: str) -> Built:
    """Let autofaiss build, by its command; a failure is a finding."""
    folder, source = _emptied(collection, ITS), collection.raw.vectors
    count, width = np.load(source, mmap_mode="r").shape
    for name in ("vectors", "index"):
        (folder / name).mkdir()
    os.link(source, folder / "vectors" / "vectors.npy")
    arguments = {
        "embeddings": folder / "vectors",
        "index_path": folder / "index" / "index",
        "index_infos_path": folder / "infos.json",
        "metric_type": "ip",
        "nb_cores": cores,
        "max_index_memory_usage": f"{bytes_a_vector * count}B",
        "current_memory_available": available,
        **({"index_key": json.dumps(key)} if key else {}),  # quoted: the commas would make a list of it
    }
    say(f"building {ITS}, {key or 'as it likes'}")
    log = folder / "log"
    try:
        tool = environments.python(ITS).with_name("autofaiss")
        command = [str(tool), "build_index", *(f"--{name}={value}" for name, value in arguments.items())]
        with log.open("w") as file:
            peak = watch(command, stdout=file, stderr=subprocess.STDOUT)
        infos = folder / "infos.json"
        if not infos.exists():  # it ends well all the same
            return Built(ITS, absent=f"it built nothing: {last_words(log)}")
    except subprocess.CalledProcessError as error:
        return Built(ITS, absent=f"it ended with {error.returncode}: {last_words(log)}")
    except (PeerFailed, OSError) as error:
        return Built(ITS, absent=str(error))
    chosen = json.loads(infos.read_text())["index_key"]
    # What the worker leaves that builds.
    (folder / "built.json").write_text(json.dumps({"count": count, "width": width, "options": {}}))
    return Built(ITS, None, peak, split_log(log.read_text().splitlines()), chosen, bytes_of(chosen))


def folder_of(collection: Collection, title: str) -> Path:
    """Return where a system's index is built."""
    return collection.folder.absolute() / f"built-{title}"


def _emptied(collection: Collection, title: str) -> Path:
    folder = folder_of(collection, title)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _index(answer: str, store: str, index: str, target: str, *beam: str) -> None:
    """Index in this process."""
    clock = Clock()
    try:
        manifest, _ = run(IndexRequest(store, index, target_recall=float(target)), Runner(beam, clock))
    except LookalikeError as error:
        raise SystemExit(str(error)) from None
    made = {
        "stages": split(clock.events, time.monotonic()),
        "shape": f"{manifest.kind}, {manifest.reduced_dim} dims, {manifest.parameters['nlist']} lists",
        "bytes_a_vector": manifest.measured["bytes_per_vector"],
    }
    Path(answer).write_text(json.dumps(made))


if __name__ == "__main__":
    _index(*sys.argv[2:])
