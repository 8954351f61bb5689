"""VllmNames: Quire's figures a second time, under vLLM's metric names (`--vllm-metrics`).

They cannot be recording rules of a Prometheus server: the endpoint picker of the Kubernetes Gateway
API inference extension scrapes /metrics of each pod, for `vllm:num_requests_waiting`,
`vllm:num_requests_running`, `vllm:kv_cache_usage_perc` and `vllm:cache_config_info`.
Every sample is derived from one of Quire's series at scrape time. What vLLM counts and Quire does
not is left out, and so is vLLM's label `engine`: here a process has one engine per model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

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
    """`queued`: requests in this process's own queue, by model."""

    def __init__(self, series: Series) -> None:
        self.queued: Mapping[str, int] = {}
        self.cache: dict[str, tuple[int, int]] = {}  # model -> block size and number of blocks
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
                labels = {**sample.labels, "model_name": sample.labels["model"]}
                del labels["model"]
                theirs.add_sample(theirs.name + suffix, labels, sample.value)
        return theirs

    def _derived(self) -> Iterator[Metric]:
        ours = self._series
        blocks, hits = _values(ours.blocks, "state"), _values(ours.prefix_hits)
        used = {
            model: each.get("used", 0.0) / max(1.0, sum(each.values()))
            for model, each in blocks.items()
        }
        waiting = {
            model: each[""] + self.queued.get(model, 0)
            for model, each in _values(ours.waiting).items()
        }
        prompt = {
            model: each[""] + hits[model][""] for model, each in _values(ours.prompt_tokens).items()
        }
        for kind, name, text, values in (
            (GaugeMetricFamily, "num_requests_waiting", "Requests waiting.", waiting),
            (GaugeMetricFamily, "kv_cache_usage_perc", "Fraction of KV blocks in use.", used),
            (CounterMetricFamily, "prompt_tokens", "Prompt tokens, computed or cached.", prompt),
            (CounterMetricFamily, "prefix_cache_queries", "Prompt tokens looked up.", prompt),
        ):
            family = kind(f"vllm:{name}", text, labels=["model_name"])
            for model, value in values.items():
                family.add_metric([model], value)
            yield family
        names = ["model_name", "block_size", "num_gpu_blocks"]
        cache = GaugeMetricFamily("vllm:cache_config_info", "Size of the cache.", labels=names)
        for model, sizes in self.cache.items():
            cache.add_metric([model, *map(str, sizes)], 1)
        yield cache
        labels = ["model_name", "finished_reason"]
        success = CounterMetricFamily("vllm:request_success", "Finished requests.", labels=labels)
        for model, reasons in _values(ours.finished, "reason").items():
            ended = dict.fromkeys(FINISHED_REASONS.values(), 0.0)
            for reason, value in reasons.items():
                ended[FINISHED_REASONS[FinishReason(reason)]] += value
            for theirs, value in ended.items():
                success.add_metric([model, theirs], value)
        yield success


def _values(metric: MetricWrapperBase, label: str = "") -> dict[str, dict[str, float]]:
    """The values of a gauge or counter by model and another label; "" is the key if it has none."""
    (family,) = metric.collect()
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for sample in family.samples:
        if not sample.name.endswith("_created"):
            found[sample.labels["model"]][sample.labels.get(label, "")] = sample.value
    return found
