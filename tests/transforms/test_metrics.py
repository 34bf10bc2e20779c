from dataclasses import dataclass, field
from types import SimpleNamespace

import apache_beam as beam
import pytest
from apache_beam.metrics import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from transforms.metrics import NAMESPACE, StageMetrics, counters


class Count(beam.DoFn):
    """Counts in our namespace, and once in another's."""

    def process(self, number):
        metrics = StageMetrics("stage")
        metrics.count("items")
        metrics.count("sum", number)
        metrics.count("nothing", 0)
        metrics.observe("size", number + 0.4)
        StageMetrics("other").count("items", 10)
        beam.metrics.Metrics.counter("elsewhere", "items").inc()
        yield number


@pytest.fixture(scope="module")
def result():
    pipeline = beam.Pipeline(FnApiRunner(), options=PipelineOptions(["--allow_unsafe_triggers"]))
    _ = pipeline | beam.Create(list(range(1, 8))) | beam.ParDo(Count())
    result = pipeline.run()
    result.wait_until_finish()
    return result


def test_counters_are_ours_by_stage_and_name(result):
    assert counters(result) == {"stage/items": 7, "stage/sum": 28, "other/items": 70}


def test_distributions_keep_whole_numbers(result):
    (found,) = result.metrics().query(MetricsFilter().with_namespace(NAMESPACE))["distributions"]
    assert found.key.metric.name == "stage/size"
    values = found.committed
    assert (values.count, values.sum, values.min, values.max) == (7, 28, 1, 7)


@dataclass
class FakeResult:
    """Says of each counter what a runner may say: (name, namespace, committed, attempted)."""

    said: list = field(default_factory=list)

    def metrics(self):
        found = [
            SimpleNamespace(
                key=SimpleNamespace(metric=SimpleNamespace(name=name, namespace=namespace)),
                committed=committed,
                attempted=attempted,
            )
            for name, namespace, committed, attempted in self.said
        ]
        return SimpleNamespace(query=lambda: {"counters": found, "distributions": [], "gauges": []})


def test_committed_counts_stand_before_attempted_ones():
    said = [("a", NAMESPACE, 5, 8), ("b", NAMESPACE, 0, 3), ("c", NAMESPACE, None, 4), ("d", "elsewhere", 1, 1)]
    assert counters(FakeResult(said)) == {"a": 5, "b": 0, "c": 4}
    assert counters(FakeResult()) == {}


def test_counting_outside_a_pipeline_is_no_error():
    metrics = StageMetrics("alone")
    metrics.count("items", 3)
    metrics.observe("size", 2.5)
