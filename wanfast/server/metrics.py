"""Counts the server's videos, failures and forwards, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from wanfast.runtime.machine.gpus import visible_gpus
from wanfast.server.store import Store

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


class Metrics:
    """This class holds the metrics of one server."""

    def __init__(self, store: Store, *, has_gpus: bool) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Now(store, has_gpus=has_gpus))
        named: dict[str, Any] = {"registry": self._registry, "namespace": "wanfast"}
        self._completed = Counter("completed", "Videos that were made.", **named)
        self._failed = Counter("failures", "Jobs that failed, by the code of their error.", ["code"], **named)
        self._forwards = Counter("forwards", "Forwards of the experts.", ["kind"], **named)
        self._stages = Histogram("stage_seconds", "Seconds of each stage.", ["stage"], buckets=_SECONDS, **named)
        self._restarts = Counter("rank_failures", "Times that ranks died or hung.", **named)
        for kind in ("computed", "skipped"):
            self._forwards.labels(kind)

    def completed(self, seconds: Mapping[str, float], computed: int, skipped: int) -> None:
        """Counts a finished video.

        `seconds`: the seconds of each stage. `computed` and `skipped`: the numbers of computed and of skipped forwards.
        """
        self._completed.inc()
        self._forwards.labels("computed").inc(computed)
        self._forwards.labels("skipped").inc(skipped)
        for stage, value in seconds.items():
            self._stages.labels(stage).observe(value)

    def failed(self, code: str, number: int = 1) -> None:
        """Counts `number` jobs that ended without a video; `code` is the code of their error."""
        self._failed.labels(code).inc(number)

    def ranks_failed(self) -> None:
        """Counts one failure of the ranks: the ranks died, or they hung."""
        self._restarts.inc()

    def text(self) -> bytes:
        """Returns all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Now(Collector):
    """This class reads the values that are not counted but read on request: the queue, and the memory of the GPUs."""

    def __init__(self, store: Store, *, has_gpus: bool) -> None:
        self._store, self._has_gpus = store, has_gpus

    def describe(self) -> Iterator[Metric]:
        """Returns no metrics, so that registering this collector queries neither the database nor the GPU driver."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yields the number of queued and of running jobs, and the used and the total memory of each GPU in bytes."""
        jobs = GaugeMetricFamily("wanfast_jobs", "Jobs that have not ended.", labels=["status"])
        for status, count in self._store.counts().items():
            jobs.add_metric([status], count)
        yield jobs
        memory = GaugeMetricFamily("wanfast_gpu_memory_bytes", "Memory of a GPU.", labels=["gpu", "kind"])
        for index, gpu in enumerate(visible_gpus() if self._has_gpus else []):
            memory.add_metric([str(index), "used"], gpu.total_bytes - gpu.free_bytes)
            memory.add_metric([str(index), "total"], gpu.total_bytes)
        yield memory
