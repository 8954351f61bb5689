"""VllmNames: Quire's figures a second time, under vLLM's metric names (`--vllm-metrics`).

They cannot be recording rules of a Prometheus server: the endpoint picker of the Kubernetes Gateway
API inference extension scrapes /metrics of each pod, for `vllm:num_requests_waiting`,
`vllm:num_requests_running`, `vllm:kv_cache_usage_perc` and `vllm:cache_config_info`.
Every sample is derived from one of Quire's series at scrape time. What vLLM counts and Quire does
not is left out, and so is vLLM's label `engine`: here a process is one engine.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

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
    """`model` is the label model_name; `queued` counts requests in this process's own queue."""

    def __init__(self, series: Series) -> None:
        self.model = ""
        self.queued = 0
        self.cache: tuple[int, int] | None = None  # block size and number of blocks
        self._series = series

    def collect(self) -> Iterator[Metric]:
        ours = self._series
        for name, text, metric in (
            ("num_requests_running", "Requests in the batch.", ours.running),
            ("generation_tokens", "Output tokens generated.", ours.generated_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the cache.", ours.prefix_hits),
            ("num_preemptions", "Preemptions.", ours.preemptions),
            ("time_to_first_token_seconds", "Time to first token.", ours.first_token_time),
            ("e2e_request_latency_seconds", "Time from arrival to last byte.", ours.duration),
            ("request_time_per_output_token_seconds", "Mean by request.", ours.per_token),
            ("request_queue_time_seconds", "Time from submission to claim.", ours.queue_wait),
            ("request_inference_time_seconds", "Time from claim to end.", ours.claimed_seconds),
            ("iteration_tokens_total", "Tokens per engine step.", ours.step_tokens),
        ):
            yield self._renamed(name, text, metric)
        yield from self._derived()

    def _renamed(self, name: str, text: str, metric: MetricWrapperBase) -> Metric:
        (ours,) = metric.collect()
        theirs = Metric(f"vllm:{name}", text, ours.type)
        for sample in ours.samples:
            suffix = sample.name.removeprefix(ours.name)
            if suffix != "_created":
                labels = {**sample.labels, "model_name": self.model}
                theirs.add_sample(theirs.name + suffix, labels, sample.value)
        return theirs

    def _derived(self) -> Iterator[Metric]:
        ours = self._series
        blocks = _values(ours.blocks)
        usage = blocks.get("used", 0.0) / max(1.0, sum(blocks.values()))
        waiting = _values(ours.waiting)[""] + self.queued
        prompt = _values(ours.prompt_tokens)[""] + _values(ours.prefix_hits)[""]
        for kind, name, text, value in (
            (GaugeMetricFamily, "num_requests_waiting", "Requests waiting.", waiting),
            (GaugeMetricFamily, "kv_cache_usage_perc", "Fraction of KV blocks in use.", usage),
            (CounterMetricFamily, "prompt_tokens", "Prompt tokens, computed or cached.", prompt),
            (CounterMetricFamily, "prefix_cache_queries", "Prompt tokens looked up.", prompt),
        ):
            family = kind(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self.model], value)
            yield family
        if self.cache is not None:
            names = ["model_name", "block_size", "num_gpu_blocks"]
            cache = GaugeMetricFamily("vllm:cache_config_info", "Size of the cache.", labels=names)
            cache.add_metric([self.model, *map(str, self.cache)], 1)
            yield cache
        ended = dict.fromkeys(FINISHED_REASONS.values(), 0.0)
        for reason, value in _values(ours.finished).items():
            ended[FINISHED_REASONS[FinishReason(reason)]] += value
        labels = ["model_name", "finished_reason"]
        success = CounterMetricFamily("vllm:request_success", "Finished requests.", labels=labels)
        for theirs, value in ended.items():
            success.add_metric([self.model, theirs], value)
        yield success


def _values(metric: MetricWrapperBase) -> dict[str, float]:
    """The values of a gauge or counter by its label; "" is the key if it has none."""
    (family,) = metric.collect()
    return {
        next(iter(sample.labels.values()), ""): sample.value
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
