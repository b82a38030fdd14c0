import sys
import time

import pytest
from mlflow import MlflowClient

from sparsetune.config import Config
from sparsetune.tracking import TrackingListener
from sparsetune.tracking.monitor import SystemMonitor
from tests.tracking.conftest import Evaluation, runs_of


def test_samples_are_timed_from_the_runs_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monitor = SystemMonitor(time.time_ns() // 1_000_000 - 5000)
    time.sleep(0.2)
    monitor.stop()
    samples = monitor.take()
    memory = [sample for sample in samples if sample.key == "system/system_memory_usage_percentage"]
    assert len(memory) >= 2
    assert all(0 < sample.value <= 100 and sample.step == 5 for sample in memory)
    assert "system/cpu_utilization_percentage" in {sample.key for sample in samples}
    assert monitor.take() == []


def test_without_psutil_there_are_no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("mlflow.system_metrics.metrics")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "psutil", None)
    monitor = SystemMonitor(0)
    monitor.stop()
    assert monitor.take() == []


def test_mlflows_own_variable_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monitor = SystemMonitor(0)
    monitor.stop()
    assert monitor.take() == []


def test_an_evaluations_run_has_them(
    config: Config, client: MlflowClient, experiment: str, evaluation: Evaluation
) -> None:
    listener = TrackingListener(config)
    listener.on_start(evaluation.start)
    listener.on_end(evaluation.end)
    (run,) = runs_of(client, experiment)
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0
