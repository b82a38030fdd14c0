"""What the machine was doing while a run was recorded."""

import os
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import Metric

INTERVAL_SECONDS = 10.0
"""MLflow's own default; its variable MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL changes it."""

_FAILURES = (OSError, RuntimeError, AttributeError)
"""What psutil and NVML raise, or MLflow over the None that psutil gives, where a machine doesn't tell."""


class SystemMonitor:
    """Samples CPU, memory, disk, network and GPUs in a thread, with what MLflow has for it.

    MLflow's own monitor isn't used: it sends from its thread, one request a sample, and gives up with the first
    that fails. These samples go with what is recorded anyway. Without psutil there are none, without
    nvidia-ml-py none of GPUs. MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false turns it off.

    Args:
        start_ms: when the run began, in milliseconds since 1970; a sample's step is the seconds since then.
    """

    def __init__(self, start_ms: int) -> None:
        self._start_ms = start_ms
        self._samples: deque[Metric] = deque()
        self._stopped = threading.Event()
        self._monitors = _monitors() if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING") != "false" else []
        self._interval = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or INTERVAL_SECONDS)
        self._thread = threading.Thread(target=self._watch, name="sparsetune-system-metrics", daemon=True)
        if self._monitors:
            self._thread.start()

    def take(self) -> "list[Metric]":
        """Give the samples since the last time."""
        return [self._samples.popleft() for _ in range(len(self._samples))]

    def stop(self) -> None:
        """Take a last sample, and no more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._stopped.wait(self._interval)
            try:
                self._sample()
            except _FAILURES:  # a machine that no longer tells of itself, as a container may
                return

    def _collect(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.clear_metrics()
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
        return values

    def _sample(self) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        step = (now - self._start_ms) // 1000
        self._samples.extend(Metric(f"system/{name}", value, now, step) for name, value in self._collect().items())


def _monitors() -> list[Any]:
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    except ImportError:  # no psutil
        return []
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    found: list[Any] = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with suppress(ImportError, *_FAILURES):  # no nvidia-ml-py, no GPU, no network
            monitor: Any = kind()
            monitor.collect_metrics()  # utilisation is counted from here on
            found.append(monitor)
    return found
