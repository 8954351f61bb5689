"""VllmNames: Quire's figures once more, under the names that dashboards for vLLM ask for.

Nothing is counted here: each series is read off one of ours when it is scraped. What vLLM counts
and Quire does not is left out, and so is vLLM's label `engine`: here a process is one engine.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from service.messages import FinishReason
from service.observability.series import Series

FINISHED_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.DEADLINE: "abort",
    FinishReason.ERROR: "error",
}


class VllmNames(Collector):
    """`model` is the label model_name; `queued` is how many wait in this process's own queue."""

    def __init__(self, series: Series) -> None:
        self.model = ""
        self.queued = 0
        self._series = series

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        yield from self._gauges()
        yield from self._counters()
        ours = self._series
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Time to first token.", ours.first_token_time),
            ("e2e_request_latency_seconds", "From arrival to the last byte.", ours.duration),
            ("request_time_per_output_token_seconds", "Mean, by request.", ours.per_token),
            ("request_queue_time_seconds", "From submission to claim.", ours.queue_wait),
            ("request_inference_time_seconds", "From claim to end.", ours.claimed_seconds),
            ("iteration_tokens_total", "Tokens of an engine step.", ours.step_tokens),
        ):
            yield self._histogram(name, text, histogram)

    def _gauges(self) -> Iterator[Metric]:
        ours = self._series
        blocks = {
            sample.labels["state"]: sample.value
            for sample in _samples(ours.blocks, "quire_kv_blocks")
        }
        usage = blocks.get("used", 0.0) / max(1.0, sum(blocks.values()))
        waiting = _value(ours.waiting) + self.queued
        for name, text, value in (
            ("num_requests_running", "Requests in the batch.", _value(ours.running)),
            ("num_requests_waiting", "Requests waiting to be computed.", waiting),
            ("kv_cache_usage_perc", "KV blocks in use; 1 is all of them.", usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric([self.model], value)
            yield gauge

    def _counters(self) -> Iterator[Metric]:
        ours = self._series
        hits = _value(ours.prefix_hits)
        prompt = _value(ours.prompt_tokens) + hits
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens, computed or found.", prompt),
            ("generation_tokens", "Tokens generated.", _value(ours.generated_tokens)),
            ("prefix_cache_queries", "Prompt tokens looked up.", prompt),
            ("prefix_cache_hits", "Prompt tokens found.", hits),
            ("num_preemptions", "Preemptions.", _value(ours.preemptions)),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            counter.add_metric([self.model], value)
            yield counter
        ended = dict.fromkeys(FINISHED_REASONS.values(), 0.0)
        for sample in _samples(ours.finished, "quire_requests_finished_total"):
            ended[FINISHED_REASONS[FinishReason(sample.labels["reason"])]] += sample.value
        success = CounterMetricFamily(
            "vllm:request_success",
            "Requests by their end.",
            labels=["model_name", "finished_reason"],
        )
        for reason, value in ended.items():
            success.add_metric([self.model, reason], value)
        yield success

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        (ours,) = histogram.collect()
        buckets = [(s.labels["le"], s.value) for s in ours.samples if s.name.endswith("_bucket")]
        (total,) = [sample.value for sample in ours.samples if sample.name.endswith("_sum")]
        family.add_metric([self.model], buckets=buckets, sum_value=total)
        return family


def _samples(metric: MetricWrapperBase, name: str) -> Iterator[Sample]:
    (family,) = metric.collect()
    return (sample for sample in family.samples if sample.name == name)


def _value(metric: MetricWrapperBase) -> float:
    """Of a gauge or a counter without labels."""
    (family,) = metric.collect()
    return family.samples[0].value
