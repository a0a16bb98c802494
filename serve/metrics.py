"""What the server counts about requests, and the engine about itself, in Prometheus' format.

All of it is touched on the event loop alone, so counting costs an addition and no lock; families are built at scrape time
by custom collectors in a registry of our own.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dynamo.serve.engine.request import Engine
from dynamo.serve.merging import Batch
from dynamo.serve.openai import Usage

__all__ = ["EngineCollector", "GenerationMetrics", "Histogram", "ServerMetrics"]

_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_DURATION_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """Observations in seconds, counted in buckets with inclusive upper bounds."""

    def __init__(self, name: str, help_text: str, bounds_s: Sequence[float]) -> None:
        self._name = name
        self._help = help_text
        self._bounds = tuple(bounds_s)
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum = 0.0

    def observe(self, value_s: float, count: int = 1) -> None:
        """Counts `count` observations of the same value."""
        self._counts[bisect_left(self._bounds, value_s)] += count
        self._sum += value_s * count

    def family(self) -> HistogramMetricFamily:
        """The cumulative form that Prometheus reads."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family = HistogramMetricFamily(self._name, self._help)
        family.add_metric([], buckets, self._sum)
        return family


class ServerMetrics(Collector):
    """Counters of the HTTP front."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.stream_errors: Counter[str] = Counter()
        self.num_active = 0
        self.disconnects = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.first_token = Histogram(
            "dynamo_time_to_first_token_seconds", "From a request's arrival to its first token.", _LATENCY_BUCKETS_S
        )
        self.inter_token = Histogram(
            "dynamo_inter_token_latency_seconds", "Between two tokens of one sequence.", _TOKEN_BUCKETS_S
        )
        self.duration = Histogram(
            "dynamo_request_duration_seconds", "From a generating request's arrival to its end.", _DURATION_BUCKETS_S
        )

    def collect(self) -> Iterator[Metric]:
        """All families; called by the registry at scrape time."""
        requests = CounterMetricFamily(
            "dynamo_requests", "HTTP requests answered; 499 where the client left first.", labels=["endpoint", "status"]
        )
        for labels, count in sorted(self.requests.items()):
            requests.add_metric(labels, count)
        yield requests
        errors = CounterMetricFamily(
            "dynamo_stream_errors", "Errors told inside a stream that began with 200.", labels=["code"]
        )
        for code, count in sorted(self.stream_errors.items()):
            errors.add_metric([code], count)
        yield errors
        yield GaugeMetricFamily("dynamo_active_requests", "Generating requests not yet answered.", self.num_active)
        for name, text, value in (
            ("disconnects", "Requests whose client left before the answer was complete.", self.disconnects),
            ("prompt_tokens", "Prompt tokens of all requests.", self.prompt_tokens),
            ("completion_tokens", "Tokens generated for all requests.", self.completion_tokens),
            ("cached_tokens", "Prompt tokens whose KV came from the cache.", self.cached_tokens),
        ):
            yield CounterMetricFamily(f"dynamo_{name}", text, value)
        for histogram in (self.first_token, self.inter_token, self.duration):
            yield histogram.family()


class GenerationMetrics:
    """Times the tokens of one request's choices."""

    def __init__(self, metrics: ServerMetrics, num_choices: int, started_s: float) -> None:
        self._metrics = metrics
        self._started_s = started_s
        self._last_s: list[float | None] = [None] * num_choices
        self._any_token = False
        metrics.num_active += 1

    def observe(self, batch: Batch, now: float) -> None:
        """Counts what arrived; tokens that came together share the time since the last.

        Args:
            now: `time.perf_counter()` when it came.
        """
        counts: dict[int, int] = {}
        for index, delta in batch:
            if delta.token_ids:
                counts[index] = counts.get(index, 0) + len(delta.token_ids)
        for index, num_tokens in counts.items():
            last, self._last_s[index] = self._last_s[index], now
            if last is not None:
                self._metrics.inter_token.observe((now - last) / num_tokens, num_tokens)
            elif not self._any_token:
                self._any_token = True
                self._metrics.first_token.observe(now - self._started_s)

    def finish(self, usage: Usage) -> None:
        """Ends the request; called once, whatever its end was."""
        metrics = self._metrics
        metrics.num_active -= 1
        metrics.prompt_tokens += usage.prompt_tokens
        metrics.completion_tokens += usage.completion_tokens
        metrics.cached_tokens += usage.prompt_tokens_details.cached_tokens
        metrics.duration.observe(time.perf_counter() - self._started_s)


class EngineCollector(Collector):
    """Reads `Engine.stats()` at scrape time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All families of the engine."""
        stats = self._engine.stats()
        yield GaugeMetricFamily(
            "dynamo_engine_running_sequences", "Sequences in the engine's batch.", stats.num_running
        )
        yield GaugeMetricFamily(
            "dynamo_engine_waiting_sequences", "Sequences waiting for the batch.", stats.num_waiting
        )
        for name, text, value in (
            ("preemptions", "Sequences put back to waiting for want of KV blocks.", stats.num_preemptions),
            ("steps", "Steps of the engine.", stats.num_steps),
            ("prompt_tokens", "Prompt tokens of admitted sequences.", stats.prompt_tokens),
            ("cached_prompt_tokens", "Prompt tokens whose KV came from the cache.", stats.cached_prompt_tokens),
            ("generated_tokens", "Tokens generated.", stats.generated_tokens),
        ):
            yield CounterMetricFamily(f"dynamo_engine_{name}", text, value)
