"""Counters and distributions of the pipelines, under one namespace."""

from typing import Any

from apache_beam.metrics import Metrics

NAMESPACE = "lookalike"


class StageMetrics:
    """What a stage counts. Runners may attempt a bundle twice, so these inform; the manifests account."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter."""
        if amount:
            Metrics.counter(NAMESPACE, f"{self._stage}/{name}").inc(amount)

    def observe(self, name: str, value: float) -> None:
        """Add a value to a distribution (Beam keeps whole numbers)."""
        Metrics.distribution(NAMESPACE, f"{self._stage}/{name}").update(round(value))


def counters(result: Any) -> dict[str, int]:
    """Read a finished run's counters, committed where the runner says so, attempted elsewhere."""
    found = result.metrics().query()["counters"]
    return {
        metric.key.metric.name: metric.committed if metric.committed is not None else metric.attempted
        for metric in found
        if metric.key.metric.namespace == NAMESPACE
    }
