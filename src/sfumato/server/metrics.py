"""Prometheus metrics. Labels hold routes, methods, codes and states: never what a client wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """A server's metrics.

    Args:
        counts: → number of jobs in each state, in one transaction.
        workers: → (workers that are ready, lives of all workers so far).
    """

    def __init__(self, counts: Callable[[], dict[str, int]], workers: Callable[[], tuple[int, int]]) -> None:
        self._counts, self._workers = counts, workers
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "sfumato_http_requests", "Answers", ["route", "method", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "sfumato_http_seconds", "Time to answer", ["route"], buckets=SECONDS, registry=self.registry
        )
        self._waited = Histogram(
            "sfumato_job_wait_seconds", "From accepted to started", buckets=SECONDS, registry=self.registry
        )
        self._ran = Histogram(
            "sfumato_job_run_seconds", "From started to ended", buckets=SECONDS, registry=self.registry
        )
        self.registry.register(self)  # pyright: ignore[reportArgumentType]
        ProcessCollector(registry=self.registry)

    def seen(self, route: str, method: str, status: int, seconds: float) -> None:
        """Note an answer."""
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def job(self, waited: float, ran: float) -> None:
        """Note a job that has ended."""
        self._waited.observe(max(0.0, waited))
        self._ran.observe(max(0.0, ran))

    def describe(self) -> list[Metric]:
        """Nothing beforehand: the numbers are asked for when they are read."""
        return []

    def collect(self) -> Iterator[Any]:
        """Jobs by state, so that accepted = done + failed + cancelled + queued + running, and workers."""
        counts = self._counts()
        yield CounterMetricFamily("sfumato_jobs_accepted", "Jobs accepted", value=sum(counts.values()))
        states = GaugeMetricFamily("sfumato_jobs", "Jobs by state", labels=["state"])
        for state, number in counts.items():
            states.add_metric([state], number)
        yield states
        ready, lives = self._workers()
        yield GaugeMetricFamily("sfumato_workers_ready", "Workers that are ready", value=ready)
        yield CounterMetricFamily("sfumato_worker_starts", "Worker processes started", value=lives)

    def text(self) -> bytes:
        """The metrics as they are scraped."""
        return generate_latest(self.registry)
