"""Prometheus metrics. Every application has its own registry, so that two in one process do not mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ragturbo.output import Output

# Seconds. Images take milliseconds; prometheus_client's default buckets are too coarse.
BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0),
)
TIERS = {"device_hits": "device", "host_hits": "host", "disk_reads": "disk"}


class Metrics(Collector):
    """Counters of the application, and those of the Generator, which are read at every scrape."""

    def __init__(self, stats: Callable[[], dict[str, Any] | None]) -> None:
        # `stats` returns `Generator.stats()`, or None while there is no Generator.
        self._stats = stats
        self.registry = CollectorRegistry()
        kwargs: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("ragturbo_requests", "HTTP responses.", ["path", "status"], **kwargs)
        self.in_flight = Gauge("ragturbo_in_flight", "Image requests between arrival and response.", **kwargs)
        self.seconds = Histogram(
            "ragturbo_request_seconds", "Time of successful image requests.", buckets=BUCKETS, **kwargs
        )
        self.stages = Histogram("ragturbo_stage_seconds", "Time by stage.", ["stage"], buckets=BUCKETS, **kwargs)
        self.images = Counter("ragturbo_images", "Generated images.", ["mode"], **kwargs)
        self.rejections = Counter("ragturbo_rejections", "Error responses by reason.", ["reason"], **kwargs)
        self.cancellations = Counter("ragturbo_cancellations", "Clients that disconnected before the end.", **kwargs)
        self.swaps = Counter("ragturbo_database_swaps", "Database swaps.", ["outcome"], **kwargs)
        self.registry.register(self)

    def record(self, output: Output, seconds: float) -> None:
        self.seconds.observe(seconds)
        self.images.labels(output.mode).inc(len(output.seeds))
        for stage, taken in output.timings.items():
            self.stages.labels(stage).observe(taken)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def describe(self) -> list[Any]:
        # Registering would call collect() otherwise, and there is no Generator yet.
        return []

    def collect(self) -> Iterator[Any]:
        stats = self._stats()
        if stats is None:
            return
        yield GaugeMetricFamily("ragturbo_queue_waiting", "Batches waiting for the device.", stats["waiting"])
        yield GaugeMetricFamily("ragturbo_rows_running", "Rows on the device, with padding.", stats["running"])
        outcomes = CounterMetricFamily("ragturbo_executor", "Queued work by outcome.", labels=["outcome"])
        for outcome in ("accepted", "finished", "failed", "cancelled", "expired", "rejected"):
            outcomes.add_metric([outcome], stats[outcome])
        yield outcomes
        yield CounterMetricFamily("ragturbo_non_finite", "Outputs that were NaN or infinite.", stats["non_finite"])
        batches = CounterMetricFamily("ragturbo_batches", "Batches by number of rows.", labels=["rows"])
        for rows, count in stats["batches"].items():
            batches.add_metric([str(rows)], count)
        yield batches
        cache = CounterMetricFamily("ragturbo_cache_rows", "Feature rows read, by tier.", labels=["tier"])
        for name, tier in TIERS.items():
            if name in stats["cache"]:
                cache.add_metric([tier], stats["cache"][name])
        yield cache
        if stats["generation"] is not None:
            text = "Generation of the database in use."
            yield GaugeMetricFamily("ragturbo_database_generation", text, stats["generation"])
