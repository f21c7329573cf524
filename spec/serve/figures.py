"""What the server counts, under the names that vLLM's dashboards know; and some of our own.

Counted in the worker's thread, read at `/metrics`. Times are in seconds. Knows nothing of requests but their numbers.
"""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..rows import Arrival
from .gears import Gear
from .job import Job

SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
LONG = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

_GAUGES = {
    "vllm:num_requests_running": "requests in rows of the batch",
    "vllm:num_requests_waiting": "requests whose texts have not begun",
    "vllm:kv_cache_usage_perc": "share of the batch's slots that hold text",
}
_COUNTERS = {
    "vllm:prefix_cache_queries": "prompt tokens that were looked up among kept beginnings",
    "vllm:prefix_cache_hits": "prompt tokens that were kept",
    "vllm:num_preemptions": "always 0: what is admitted ends",
    "vllm:prompt_tokens": "tokens of prompts",
    "vllm:generation_tokens": "new tokens",
    "vllm:spec_decode_num_drafts": "steps of rows with drafts",
    "vllm:spec_decode_num_draft_tokens": "tokens that were drafted",
    "vllm:spec_decode_num_accepted_tokens": "drafted tokens that were accepted",
    "paceline:row_steps": "steps, counted for each row that gained by them",
    "paceline:gear_shifts": "how often the batch went over to another size, tree or kind of sampling",
}
_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("from a request to its first token", SHORT),
    "vllm:inter_token_latency_seconds": ("between tokens: a step's gap, shared by its tokens", SHORT),
    "vllm:e2e_request_latency_seconds": ("from a request to its end", LONG),
    "vllm:request_queue_time_seconds": ("from a request to when its prompt begins to be read", LONG),
    "vllm:request_prefill_time_seconds": ("from then to its first token", LONG),
    "vllm:request_decode_time_seconds": ("from the first token to the end", LONG),
    "vllm:iteration_tokens_total": ("tokens that a step brought to all rows", SIZES),
}


class Figures:
    """Counters, gauges and histograms of one server; `model` is its model's name."""

    def __init__(self, model: str):
        self.registry, self.model = CollectorRegistry(), model
        made: dict[str, Any] = {"registry": self.registry}
        self._gauges = {name: Gauge(name, about, ["model_name"], **made) for name, about in _GAUGES.items()}
        self._counters = {name: Counter(name, about, ["model_name"], **made) for name, about in _COUNTERS.items()}
        self._histograms = {
            name: Histogram(name, about, ["model_name"], buckets=buckets, **made)
            for name, (about, buckets) in _HISTOGRAMS.items()
        }
        labels = ["model_name", "finished_reason"]
        self._ended = Counter("vllm:request_success", "requests that ended, by reason", labels, **made)
        labels = ["model_name", "position"]
        self._at_depth = Counter("vllm:spec_decode_num_accepted_tokens_per_pos", "accepted, by depth", labels, **made)
        labels = ["model_name", "rows", "nodes"]
        self._steps = Histogram("paceline:step_seconds", "of a step", labels, buckets=SHORT, **made)
        for name in _COUNTERS:
            self.count(name, 0)
        self.shifts, self._told_shifts = 0, 0  # of gears; how many are counted

    def count(self, name: str, number: float) -> None:
        self._counters[name].labels(self.model).inc(number)

    def set(self, name: str, value: float) -> None:
        self._gauges[name].labels(self.model).set(value)

    def observe(self, name: str, value: float) -> None:
        self._histograms[name].labels(self.model).observe(value)

    def text(self, refresh: Callable[[], None] = lambda: None) -> bytes:
        """In Prometheus' format, after the gauges were refreshed."""
        refresh()
        self.count("paceline:gear_shifts", self.shifts - self._told_shifts)
        self._told_shifts = self.shifts
        return generate_latest(self.registry)

    def prefix(self, asked: int, kept: int) -> None:
        """Count a prompt of `asked` tokens, of which `kept` need not be read."""
        self.count("vllm:prefix_cache_queries", asked)
        self.count("vllm:prefix_cache_hits", kept)

    def step(self, arrival: Arrival, gear: Gear) -> None:
        """Count a step of the batch."""
        nodes = len(gear.shape)
        self._steps.labels(self.model, str(gear.rows), str(nodes)).observe(sum(arrival.seconds.values()))
        gained = [report for report in arrival.reports.values() if report.committed]
        tokens = sum(report.committed for report in gained)
        self.observe("vllm:iteration_tokens_total", tokens)
        self.count("vllm:generation_tokens", tokens)
        self.count("paceline:row_steps", len(gained))
        if nodes > 1:
            accepted = [min(report.accepted, report.committed) for report in gained]
            self.count("vllm:spec_decode_num_drafts", len(gained))
            drafted = sum(token >= 0 for report in gained for token in report.tokens[1:])
            self.count("vllm:spec_decode_num_draft_tokens", drafted)
            self.count("vllm:spec_decode_num_accepted_tokens", sum(accepted))
            for depth in range(max(accepted, default=0)):
                self._at_depth.labels(self.model, str(depth)).inc(sum(count > depth for count in accepted))

    def aborted(self) -> None:
        """Count a request whose client has gone."""
        self._ended.labels(self.model, "abort").inc()

    def ended(self, job: Job, begun: float, read: float, first: float, end: float) -> None:
        """Count a request; the times are when it came, began to be read, got its first token (0: none), and ended."""
        self._ended.labels(self.model, job.reason).inc()
        self.count("vllm:prompt_tokens", len(job.request.tokens))
        self.observe("vllm:e2e_request_latency_seconds", end - begun)
        self.observe("vllm:request_queue_time_seconds", read - begun)
        if first:
            self.observe("vllm:time_to_first_token_seconds", first - begun)
            self.observe("vllm:request_prefill_time_seconds", first - read)
            self.observe("vllm:request_decode_time_seconds", end - first)
            for _ in range(len(job.tokens) - 1):
                self.observe("vllm:inter_token_latency_seconds", (end - first) / (len(job.tokens) - 1))
