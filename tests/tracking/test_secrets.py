"""No credential reaches a run, a file or a message."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsetune.checkpoint import Manifest
from tests.tracking.servers import MlflowServer

TUNE = [
    *("tune", "--model", "demo", "--device", "cpu", "--n-trials", "1", "--num-prompts", "1", "--num-eval-prompts", "1"),
    *("--num-inference-steps", "2", "--probe-prompts", "0", "--calibration-steps", "1", "--min-psnr", "1"),
    *("--min-frame-cosine", "0.1", "--margin-db", "0", "--orders", "raster", "--rules", "cdf", "--caches", "none"),
]


def sparsetune(folder: Path, *arguments: str, **environment: str) -> str:
    """Run a command in a folder; return all that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "sparsetune", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | environment,
        timeout=300,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_search_writes_none_of_its_credentials_anywhere(tmp_path: Path) -> None:
    planted = {name: f"{name}-s3cret-0b1d" for name in ("storage", "server", "password", "token", "key")}
    (tmp_path / "server").mkdir()
    server = MlflowServer(f"sqlite:///{tmp_path}/server/mlflow.db", tmp_path / "server")
    server.start()
    try:
        said = sparsetune(
            tmp_path,
            *TUNE,
            "--storage",
            f"sqlite:///file:{tmp_path}/optuna.db?mode=rwc&uri=true&password={planted['storage']}",
            MLFLOW_TRACKING_URI=server.uri.replace("://", f"://ada:{planted['server']}@"),
            MLFLOW_TRACKING_PASSWORD=planted["password"],
            HF_TOKEN=planted["token"],
            SOME_API_KEY=planted["key"],
            SPARSETUNE_CACHE__DIR=str(tmp_path / "cache"),
        )
    finally:
        server.kill()
    assert "checkpoint: results/demo/checkpoint" in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"optuna.db", "mlflow.db", "manifest.json", "MLmodel", "tuning.json", "result.json"} <= names
    assert any(path.is_relative_to(tmp_path / "server" / "artifacts") for path in files)
    everything = b"\n".join([said.encode(), *(path.read_bytes() for path in files)])
    assert [name for name, secret in planted.items() if secret.encode() in everything] == []


@pytest.mark.parametrize(
    "uri",
    [
        "postgres://u:s3cret@h/db",
        "postgresql://u:s3cret@127.0.0.1:1/db",
        "mongodb://u:s3cret@h/db",
        "http://ada:s3/cret@h:9",
        "http://ada:s3cret@127.0.0.1:9",
        "http://ada:s3cret@[::1",
        "postgresql://h:s3cret/db",
    ],
)
@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"])
def test_a_store_that_cannot_be_used_is_told_without_its_password(
    own_store: Path, monkeypatch: pytest.MonkeyPatch, variable: str, uri: str
) -> None:
    from click.testing import CliRunner

    from sparsetune.cli.main import main

    monkeypatch.setenv(variable, uri)
    result = CliRunner().invoke(main, ["runs"])
    assert result.exit_code == 1
    assert result.output.startswith("sparsetune: ") and len(result.output.splitlines()) == 1
    assert "unexpected" not in result.output
    assert not any(part in result.output for part in ("s3", "cret", "ada:"))


def test_a_manifest_of_an_earlier_version_loses_its_storage() -> None:
    written = Manifest(tuner="optuna").model_dump(mode="json")
    written["tuner_settings"] = {"seed": 1, "storage": "postgresql://u:s3cret@h/db"}
    assert Manifest.model_validate(written).tuner_settings == {"seed": 1}
