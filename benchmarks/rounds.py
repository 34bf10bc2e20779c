"""Build systems, open them side by side, bring each to the target recall, and ask them in turn."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.client import Peer
from benchmarks.peers.environments import PeerFailed

OWN = ("ours", "bare", "reduction")
_MEMORY = 12 << 30
"""Bytes that the peers open at one time may take."""
_PATIENCE = 12 * 3600
_QUERIES = 500
"""Asked singly in a round,"""
_ROUND_US = 5e6
"""or fewer of a slow system, to be done in this time."""


@dataclass(frozen=True, slots=True)
class System:
    """A library by the name its worker knows, and .npy files: what it holds, what it is asked, what it should find."""

    title: str
    kind: str
    folder: Path
    vectors: Path
    queries: Path
    truth: Path
    params: Mapping[str, Any] = field(default_factory=dict)
    like: str | None = None
    """The title of another whose setting it takes."""


@dataclass(slots=True)
class Measured:
    """What was found out of one system, or why nothing was; a list holds one figure a round."""

    absent: str | None = None
    built: dict[str, Any] = field(default_factory=dict)
    opened: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)
    recall: float = 0.0
    """Against the truth it was brought to,"""
    recall_raw: float = 0.0
    """and against that of the raw vectors."""
    p50: list[float] = field(default_factory=list)
    """Microseconds."""
    p99: list[float] = field(default_factory=list)
    batch: list[float] = field(default_factory=list)
    """Queries a second."""


class Asked(Peer):
    """A system's worker, ours or a peer's."""

    def __init__(self, system: System, threads: int = 1) -> None:
        own = Path(sys.executable) if system.kind in OWN else None
        super().__init__(system.kind, system.folder, own, threads)
        self._command[2] = "benchmarks.ours"  # which knows ours too, and one more command


def build(system: System, threads: int) -> Measured:
    """Build a system unless it was built before; a failure is a finding."""
    note = system.folder / "answer.json"
    if note.exists():
        return Measured(built=json.loads(note.read_text()))
    say(f"building {system.title}")
    params = {"threads": threads, **system.params}
    try:
        with Asked(system, threads) as peer:
            answer = peer.ask({"do": "build", "vectors": system.vectors, "params": params}, _PATIENCE)
    except PeerFailed as error:
        return Measured(absent=str(error))
    note.write_text(json.dumps(answer))
    return Measured(built=answer)


def compare(
    own: Sequence[System], peers: Sequence[System], raw_truth: Path, target: float, rounds: int, threads: int
) -> dict[str, Measured]:
    """Measure systems by their titles; the peers in groups that fit in memory, our own with each group."""
    results = {system.title: build(system, threads) for system in (*own, *peers)}
    present = [system for system in peers if results[system.title].absent is None]
    for group in groups(present, _MEMORY):
        ready = [system for system in (*own, *group) if results[system.title].absent is None]
        _measure(ready, results, raw_truth, target, rounds)
    return results


def groups(systems: Sequence[System], memory: float) -> Iterator[list[System]]:
    """Yield systems that fit in so many bytes together, by a guess: their vectors and half as much again."""
    group: list[System] = []
    taken = 0.0
    for system in systems:
        needed = 1.5 * np.load(system.vectors, mmap_mode="r").nbytes
        if group and taken + needed > memory:
            yield group
            group, taken = [], 0.0
        group.append(system)
        taken += needed
    yield group


def _measure(
    systems: Sequence[System], results: dict[str, Measured], raw_truth: Path, target: float, rounds: int
) -> None:
    with contextlib.ExitStack() as stack:
        live: list[tuple[System, Asked]] = []
        for system in systems:
            with _findings(results[system.title]):
                peer = stack.enter_context(Asked(system))
                _prepare(system, peer, results, raw_truth, target)
                live.append((system, peer))
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: {', '.join(system.title for system, _ in live)}")
            for system, peer in live:
                found = results[system.title]
                if found.absent is None:
                    with _findings(found):
                        _ask(system, peer, found)
        for system, peer in live:
            with _findings(results[system.title]):
                results[system.title].opened |= peer.ask({"do": "memory"})


@contextlib.contextmanager
def _findings(found: Measured) -> Iterator[None]:
    """Take a failure for a finding."""
    try:
        yield
    except PeerFailed as error:
        found.absent = found.absent or str(error)


def _prepare(system: System, peer: Asked, results: Mapping[str, Measured], raw_truth: Path, target: float) -> None:
    """Open a system, and bring it to the target recall unless that was done before."""
    found = results[system.title]
    found.opened = peer.ask({"do": "open"}, _PATIENCE)
    if system.kind == "reduction":
        return
    if system.like is not None:
        found.tuned = {**results[system.like].tuned, "curve": []}
        if "setting" not in found.tuned:
            raise PeerFailed(f"{system.title} takes the setting of {system.like}, which has none")
    if not found.tuned:
        say(f"tuning {system.title}")
        command = {"do": "tune", "queries": system.queries, "truth": system.truth, "target": target}
        found.tuned = peer.ask(command, _PATIENCE)
    peer.ask({"do": "set", "setting": found.tuned["setting"]})
    command = {"do": "recall", "queries": system.queries, "truths": [system.truth, raw_truth]}
    found.recall, found.recall_raw = peer.ask(command, _PATIENCE)["recalls"]


def _ask(system: System, peer: Asked, found: Measured) -> None:
    """Go one round."""
    count = int(min(_QUERIES, max(50, _ROUND_US / found.tuned.get("p50_us", 1))))
    us = peer.ask({"do": "round", "queries": system.queries, "count": count}, _PATIENCE)["us"]
    p50, p99 = np.percentile(us, [50, 99])
    found.p50.append(float(p50))
    found.p99.append(float(p99))
    found.batch.append(peer.ask({"do": "batch", "queries": system.queries}, _PATIENCE)["queries_per_second"])


def say(words: str) -> None:
    """Tell whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)
