"""Prometheus metrics of one server, in a registry of its own.

Labels are routes and projects, never ids: their number does not grow with use.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from agentlightning.errors import StoreError

from ..store import Store

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
COUNT_EVERY_S = 10.0  # rollouts are counted no more often, since that reads an index
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """What happened in this process, and how its store stands."""

    def __init__(self, store: Store) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "agentlightning_http_requests",
            "Requests answered.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "agentlightning_http_request_seconds",
            "Time until the answer was sent, long polls included.",
            ("route",),
            buckets=BUCKETS,
            registry=self._registry,
        )
        in_flight = Gauge(
            "agentlightning_http_requests_in_flight", "Requests under way.", registry=self._registry
        )
        self.in_flight = 0
        """Requests under way; counted on the event loop alone."""
        in_flight.set_function(lambda: self.in_flight)
        self._registry.register(_StoreCollector(store))
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        key = (method, route, status)
        found = self._children.get(key)
        if found is None:  # looking labels up costs more than counting
            found = self._requests.labels(method, route, str(status)), self._seconds.labels(route)
            self._children[key] = found
        found[0].inc()
        found[1].observe(seconds)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)


class _StoreCollector(Collector):
    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._counted_s = float("-inf")
        self._counts: Mapping[str, Mapping[str, int]] = {}

    def describe(self) -> Iterator[Metric]:
        """Nothing: a store is not asked for its metrics before somebody wants them."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The store as it is now."""
        store, done = self._store, self._store.statistics
        yield _gauge("store_up", "Whether the store can read and write.", float(store.healthy))
        yield _gauge("store_pending_writes", "Writes that wait for a commit.", store.pending)
        yield _gauge("store_pending_bytes", "Bytes of writes that wait for a commit.", store.pending_bytes)
        yield _counter("store_commits", "Transactions committed.", done.commits)
        yield _counter("store_writes", "Writes committed, many in one transaction.", done.writes)
        yield _counter("store_failures", "Writes that failed.", done.failures)
        yield _counter("store_commit_seconds", "Time spent in transactions.", done.seconds)
        yield _gauge("workers_waiting", "Workers that wait for work.", store.waiting_for_work_count)
        rollouts = GaugeMetricFamily(
            "agentlightning_rollouts", "Rollouts by status.", labels=("project", "status")
        )
        for project, counts in self._rollouts().items():
            for status, count in counts.items():
                rollouts.add_metric((project, status), count)
        yield rollouts

    def _rollouts(self) -> Mapping[str, Mapping[str, int]]:
        with self._lock:
            if time.monotonic() - self._counted_s > COUNT_EVERY_S:
                try:
                    names = self._store.projects()
                    self._counts = {name: self._store.of(name).counts() for name in names}
                except StoreError:
                    self._counts = {}
                self._counted_s = time.monotonic()
            return self._counts


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"agentlightning_{name}", text, value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"agentlightning_{name}", text, value)
