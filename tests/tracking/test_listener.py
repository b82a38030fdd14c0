import dataclasses
import json
import logging
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint import Checkpoint, Manifest, load_checkpoint, save_checkpoint
from sparsetune.config import Config
from sparsetune.evaluation.events import EvaluationListener
from sparsetune.tracking import TrackingListener
from tests.tracking.conftest import LAYERS, Evaluation, artifacts_of, make_evaluation, runs_of


def play(listener: EvaluationListener, evaluation: Evaluation) -> None:
    listener.on_start(evaluation.start)
    for prompt in evaluation.prompts:
        listener.on_prompt(prompt)
    listener.on_end(evaluation.end)


def broken(*_: object, **__: object) -> None:
    raise KeyError("sparsetune")


def test_an_evaluation_is_one_finished_run(
    config: Config, client: MlflowClient, experiment: str, evaluation: Evaluation
) -> None:
    listener = TrackingListener(config)
    play(listener, evaluation)
    (run,) = runs_of(client, experiment)
    assert (run.info.run_id, run.info.run_name, run.info.status) == (listener.run_id, "eval tuned", "FINISHED")
    assert run.data.params["model.source"] == "demo"
    assert run.data.params["policy.cdfthreshd.mean"] == "0.98"
    assert run.data.params["use_tuned"] == "true"
    assert run.data.params["metrics"] == "frame_cosine, frame_l1, psnr, frame_diff"
    assert "model.revision" not in run.data.params
    assert run.data.tags["sparsetune.kind"] == "evaluation"
    assert run.data.tags["sparsetune.model"] == "demo"
    assert (run.data.tags["verdict"], run.data.tags["gate"]) == ("good", "failed")
    assert run.data.tags["gate.failures"] == "psnr is too low"
    assert run.data.tags["mlflow.note.content"].startswith("good, gate failed (psnr is too low), ")
    assert {"version.torch", "version.python", "device", "mlflow.user"} <= run.data.tags.keys()


def test_metrics_of_prompts_are_steps_and_statistics_metrics(
    config: Config, client: MlflowClient, experiment: str, evaluation: Evaluation
) -> None:
    play(TrackingListener(config), evaluation)
    (run,) = runs_of(client, experiment)
    history = client.get_metric_history(run.info.run_id, "prompt/psnr")
    assert sorted((point.step, point.value) for point in history) == [(1, 36.0), (2, 40.0)]
    metrics = run.data.metrics
    assert (metrics["psnr/mean"], metrics["psnr/min"], len(metrics) <= 40) == (38.0, 36.0, True)
    assert (metrics["sparsity/overall"], metrics["sparsity/active"]) == (0.25, 0.5)
    assert (metrics["score"], metrics["gate_passed"], metrics["failed_prompts"]) == (85, 0, 0)
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, [tag.value for tag in used.tags]) == ("evaluation prompts", ["evaluation"])


def test_files_are_artifacts_and_tables_can_be_loaded(
    config: Config, client: MlflowClient, experiment: str, evaluation: Evaluation
) -> None:
    play(TrackingListener(config), evaluation)
    (run,) = runs_of(client, experiment)
    run_id = run.info.run_id
    assert {"result.json", "report.md", "prompts.json"} <= set(artifacts_of(client, run_id))
    assert artifacts_of(client, run_id, "videos") == ["videos/prompt_0_compare.mp4", "videos/prompt_1_compare.mp4"]
    assert artifacts_of(client, run_id, "stills") == ["stills/prompt_0_frame_3.png"]
    table = json.loads(Path(client.download_artifacts(run_id, "layers/sparsity_by_layer.json")).read_text())
    assert table["columns"] == ["index", "layer", "sparsity"]
    assert [row[1] for row in table["data"]] == list(LAYERS)
    logged = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    tables = ["prompts.json", "statistics.json", "layers/sparsity_by_layer.json"]
    assert [entry["path"] for entry in logged] == tables, "MLflow's compare opens the first"
    statistics = json.loads(Path(client.download_artifacts(run_id, "statistics.json")).read_text())
    assert "ci95_high" in statistics["columns"]


@pytest.mark.parametrize("form", ["folder", "a.safetensors"])
def test_the_judged_checkpoint_is_an_artifact_that_loads(
    config: Config, client: MlflowClient, experiment: str, tmp_path: Path, form: str
) -> None:
    policy = Policy.uniform([(name, 3) for name in LAYERS])
    path = save_checkpoint(Checkpoint(policy, Manifest(tuner="manual")), tmp_path / "folder")
    if form != "folder":
        path = (path / "policy.safetensors").rename(tmp_path / form)
    play(TrackingListener(config), make_evaluation(tmp_path / "results", tuned_path=str(path)))
    (run,) = runs_of(client, experiment)
    loaded = load_checkpoint(client.download_artifacts(run.info.run_id, "checkpoint", str(tmp_path)))
    assert loaded.policy == policy
    tables = {"layers/thresholds.json", "layers/thresholds_by_layer.json"}
    assert tables <= {entry["path"] for entry in json.loads(run.data.tags["mlflow.loggedArtifacts"])}
    (output,) = client.get_run(run.info.run_id).outputs.model_outputs
    assert str(client.get_logged_model(output.model_id).status) == "READY"


@pytest.mark.parametrize(
    ("error", "status", "tag"),
    [(ValueError("bad\nvery"), "FAILED", "ValueError: bad"), (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt")],
)
def test_an_evaluation_that_fails_ends_its_run_with_the_cause(
    config: Config,
    client: MlflowClient,
    experiment: str,
    evaluation: Evaluation,
    error: BaseException,
    status: str,
    tag: str,
) -> None:
    listener = TrackingListener(config)
    listener.on_start(evaluation.start)
    listener.on_prompt(evaluation.prompts[0])
    listener.on_failure(error)
    (run,) = runs_of(client, experiment)
    assert (run.info.status, run.data.tags["error"]) == (status, tag)
    assert run.data.metrics["prompt/psnr"] == 36.0


def test_two_evaluations_with_one_listener_are_two_runs(
    config: Config, client: MlflowClient, experiment: str, tmp_path: Path
) -> None:
    listener = TrackingListener(config)
    for name, tuned in (("before", False), ("after", True)):
        play(listener, make_evaluation(tmp_path / name, use_tuned=tuned))
    assert [run.info.run_name for run in runs_of(client, experiment)] == ["eval default", "eval tuned"]


def test_a_run_left_open_at_exit_is_killed(
    config: Config, client: MlflowClient, experiment: str, evaluation: Evaluation
) -> None:
    listener = TrackingListener(config)
    listener.on_start(evaluation.start)
    listener.recorder.abandon()
    assert [run.info.status for run in runs_of(client, experiment)] == ["KILLED"]


def test_a_store_that_fails_midway_is_told_once_and_ends_nothing(
    config: Config,
    client: MlflowClient,
    experiment: str,
    evaluation: Evaluation,
    caplog: pytest.LogCaptureFixture,
) -> None:
    listener = TrackingListener(config)
    listener.on_start(evaluation.start)
    assert listener.run_id is not None
    client.delete_run(listener.run_id)
    with caplog.at_level(logging.WARNING, "sparsetune"):
        listener.on_prompt(evaluation.prompts[0])
        listener.on_prompt(evaluation.prompts[1])
        listener.on_end(evaluation.end)
    assert [record.message for record in caplog.records] == [
        f"nothing is recorded in MLflow from here on: {listener.recorder.problem}"
    ]
    client.restore_run(listener.run_id)
    listener.recorder.abandon()


def test_a_bug_in_the_set_up_is_not_the_stores_error(
    config: Config, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsetune.tracking.store._create_experiment", broken)
    with pytest.raises(KeyError, match="sparsetune"):
        TrackingListener(config).on_start(evaluation.start)


def test_a_bug_midway_is_logged_as_one_and_ends_only_recording(
    config: Config, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sparsetune.tracking.listener.log_prompt", broken)
    listener = TrackingListener(config)
    with caplog.at_level(logging.WARNING, "sparsetune"):
        play(listener, evaluation)
    assert caplog.messages == ["nothing is recorded in MLflow from here on: unexpected KeyError: 'sparsetune'"]
    listener.recorder.abandon()


def test_a_run_whose_recording_failed_ends_as_failed(
    config: Config, client: MlflowClient, experiment: str, evaluation: Evaluation
) -> None:
    listener = TrackingListener(config)
    listener.on_start(evaluation.start)
    listener.on_end(dataclasses.replace(evaluation.end, artifacts=(Path("gone.png"),)))
    assert "gone.png" in (listener.recorder.problem or "")
    listener.recorder.abandon()
    assert [run.info.status for run in runs_of(client, experiment)] == ["FAILED"]


def test_the_experiment_is_the_settings_the_environments_or_named_after_the_model(
    config: Config, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = config.model_copy(update={"tracking": config.tracking.model_copy(update={"experiment": None})})
    assert TrackingListener(plain).recorder.experiment == "sparsetune/demo"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert TrackingListener(plain).recorder.experiment == "mine"
    assert TrackingListener(config).recorder.experiment == experiment


def test_a_run_has_system_metrics_unless_mlflows_variable_turns_them_off(
    config: Config, client: MlflowClient, experiment: str, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = TrackingListener(config)
    listener.on_start(evaluation.start)
    listener.on_end(evaluation.end)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    play(listener, evaluation)
    monitored, other = runs_of(client, experiment)
    assert monitored.data.metrics["system/system_memory_usage_megabytes"] > 0
    assert not [name for name in other.data.metrics if name.startswith("system/")]


def test_without_psutil_there_are_no_system_metrics(
    config: Config, client: MlflowClient, experiment: str, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("mlflow.system_metrics")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "psutil", None)
    play(TrackingListener(config), evaluation)
    (run,) = runs_of(client, experiment)
    assert not [name for name in run.data.metrics if name.startswith("system/")]
