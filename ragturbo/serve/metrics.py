"""What Prometheus sees. A registry of its own for every application: two in one process do not mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ragturbo.output import Output

# Seconds. Images take milliseconds: the library's own defaults would put all of them into two buckets.
BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0),
)
TIERS = {"device_hits": "device", "host_hits": "host", "disk_reads": "disk"}


class Metrics:
    def __init__(self, stats: Callable[[], dict[str, Any] | None]) -> None:
        """stats: `Generator.stats()`, or None while there is no Generator."""
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("ragturbo_requests", "HTTP requests answered.", ["path", "status"], **own)
        self.in_flight = Gauge("ragturbo_in_flight", "Image requests between arrival and answer.", **own)
        self.seconds = Histogram(
            "ragturbo_request_seconds", "Image requests answered with an image.", buckets=BUCKETS, **own
        )
        self.stages = Histogram("ragturbo_stage_seconds", "Time by stage.", ["stage"], buckets=BUCKETS, **own)
        self.images = Counter("ragturbo_images", "Images made.", ["mode"], **own)
        self.rejections = Counter("ragturbo_rejections", "Requests that got no image, by reason.", ["reason"], **own)
        self.cancellations = Counter("ragturbo_cancellations", "Clients that left before their answer.", **own)
        self.swaps = Counter("ragturbo_database_swaps", "Databases put in place of another.", ["outcome"], **own)
        self.registry.register(_FromStats(stats))

    def made(self, output: Output, seconds: float) -> None:
        self.seconds.observe(seconds)
        self.images.labels(output.mode).inc(len(output.seeds))
        for stage, taken in output.timings.items():
            self.stages.labels(stage).observe(taken)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _FromStats(Collector):
    """What the Generator counts itself, read when somebody looks."""

    def __init__(self, stats: Callable[[], dict[str, Any] | None]) -> None:
        self._stats = stats

    def describe(self) -> list[Any]:
        # Registering must not ask for values: there is no Generator yet.
        return []

    def collect(self) -> Iterator[Any]:
        stats = self._stats()
        if stats is None:
            return
        yield GaugeMetricFamily("ragturbo_queue_waiting", "Batches that wait for the device.", stats["waiting"])
        yield GaugeMetricFamily("ragturbo_rows_running", "Rows on the device now, padded.", stats["running"])
        outcomes = CounterMetricFamily("ragturbo_executor", "What became of queued work.", labels=["outcome"])
        for outcome in ("accepted", "finished", "failed", "cancelled", "expired", "rejected"):
            outcomes.add_metric([outcome], stats[outcome])
        yield outcomes
        yield CounterMetricFamily("ragturbo_non_finite", "Outputs that were NaN or infinite.", stats["non_finite"])
        batches = CounterMetricFamily("ragturbo_batches", "Batches run, by rows.", labels=["rows"])
        for rows, count in stats["batches"].items():
            batches.add_metric([str(rows)], count)
        yield batches
        rows = CounterMetricFamily("ragturbo_cache_rows", "Feature rows read, by tier.", labels=["tier"])
        for name, tier in TIERS.items():
            if name in stats["cache"]:
                rows.add_metric([tier], stats["cache"][name])
        yield rows
        if stats["generation"] is not None:
            yield GaugeMetricFamily(
                "ragturbo_database_generation", "Generation of the database in use.", stats["generation"]
            )
