"""What every test starts from: no network, no user's settings, no user's folders."""

import os
from pathlib import Path

import pytest

from sparsetune.metrics import registry

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture(autouse=True)
def isolated_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hide the developer's own settings, and keep the dense baselines of a session in a temporary folder."""
    for variable in list(os.environ):
        if variable.startswith("SPARSETUNE_") or variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("SPARSETUNE_CACHE__DIR", str(tmp_path_factory.getbasetemp() / "baselines"))


@pytest.fixture(autouse=True)
def isolated_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the metrics that a test registers."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
