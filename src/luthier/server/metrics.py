"""What Prometheus asks of a server: requests, streams, and the queue as it stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from luthier.jobs.queue import Queue
    from luthier.jobs.store import JobStore

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0)


class Metrics:
    """The figures of one process; those of the queue are read when asked."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, jobs: JobStore, queue: Queue) -> None:
        self._registry = CollectorRegistry()
        self.requests = Histogram(
            "luthier_http_request_seconds",
            "Seconds until the end of an answer, by route",
            ["method", "route", "status"],
            registry=self._registry,
            buckets=_SECONDS,
        )
        self.streams = Gauge("luthier_event_streams", "Event streams that are open", registry=self._registry)
        self.events_sent = Counter("luthier_events_sent", "Events sent on streams", registry=self._registry)
        self.bytes_received = Counter("luthier_file_bytes_received", "Bytes of files received", registry=self._registry)
        self.errors = Counter("luthier_errors", "Answers by error code", ["code"], registry=self._registry)
        self._registry.register(_Standing(jobs, queue))

    def render(self) -> bytes:
        """All figures, in Prometheus' text."""
        return generate_latest(self._registry)


class _Standing(Collector):
    """Jobs by state and workers by age, read from the database at each asking."""

    def __init__(self, jobs: JobStore, queue: Queue) -> None:
        self._jobs, self._queue = jobs, queue

    def describe(self) -> Iterator[Metric]:
        """Nothing: the names are known once they are collected, and registering asks no database."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The queue as it stands."""
        depth = GaugeMetricFamily("luthier_jobs", "Jobs by state", labels=["state"])
        for state, count in self._jobs.count_by_state().items():
            depth.add_metric([str(state)], count)
        yield depth
        ended = CounterMetricFamily("luthier_attempts_ended", "Attempts by how they ended", labels=["ending"])
        for ending, count in self._jobs.count_endings().items():
            ended.add_metric([ending], count)
        yield ended
        yield GaugeMetricFamily("luthier_workers", "Workers that are known", value=len(self._queue.list_workers()))
