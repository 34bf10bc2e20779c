"""Embedding a folder or bucket once, in this process, with a stopwatch on the graph that Beam runs."""

import time
from dataclasses import dataclass
from pathlib import Path

from pipelines.embed import EmbedRequest, run
from pipelines.runner import Runner, Silent
from serving.embedder import copy_artifact
from transforms.engines import AUTO


@dataclass(frozen=True, slots=True)
class Stage:
    """What a run took, in seconds, and what it counted."""

    seconds: float
    """Of the graph: without listing, planning and committing."""
    cpu_seconds: float
    whole: float
    counters: dict[str, int]


def embed_once(images: str, count: int, store: Path, artifact: str, engine: str = AUTO, *beam: str) -> Stage:
    """Embed all `count` images into a new store; `SystemExit` where one is missing."""
    watch, started = _Stopwatch(), time.perf_counter()
    request = EmbedRequest((images,), str(store), copy_artifact(artifact, str(store / "embedders")), engine=engine)
    result = run(request, Runner(beam, watch))
    if result.manifest.live != count:
        raise SystemExit(f"{result.manifest.live} of {count} images were embedded; the rest is in {store}")
    return Stage(watch.seconds, watch.cpu_seconds, time.perf_counter() - started, result.counters)


class _Stopwatch(Silent):
    seconds = cpu_seconds = 0.0

    def start(self, stage: str, total: int, unit: str) -> None:  # noqa: ARG002
        self.seconds -= time.perf_counter()
        self.cpu_seconds -= time.process_time()

    def finish(self) -> None:
        self.seconds += time.perf_counter()
        self.cpu_seconds += time.process_time()
