"""The checkpoint of a run as one of MLflow's logged models."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.checkpoint import Checkpoint, Manifest, load_checkpoint
from sparsetune.files import scratch_folder
from sparsetune.tracking.flavor import FLAVOR_NAME, MODEL_NAME, MODEL_TYPE, base_reference, save_model
from sparsetune.tracking.run_logger import text
from sparsetune.tracking.store import store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

DIGEST = "sparsetune.policy_digest"
"""Tag of models: `policy_digest` of what they hold; of versions: that of the policy as it was judged, which names
layers as the model does."""


def log_checkpoint_model(client: "MlflowClient", run_id: str, checkpoint: Path, name: str = MODEL_NAME) -> str:
    """Log a checkpoint as a model output of a run, unless the run has it already; return the model's id.

    A model left unfinished by a killed process or server is completed. Unlike `flavor.log_model` this leaves MLflow's
    global state alone.
    """
    from sparsetune.evaluation.conditions import policy_digest  # which loads torch

    loaded = load_checkpoint(checkpoint)
    digest = policy_digest(loaded.policy)
    with store_errors(f"write to run {run_id}"):
        found = find_model(client, run_id, digest)
        if found is None:
            found = _unfinished(client, run_id, digest) or _create(client, run_id, loaded, name, digest)
            _fill(client, run_id, loaded, found)
    return str(found.model_id)


def find_model(client: "MlflowClient", run_id: str, digest: str) -> "LoggedModel | None":
    for model_id in _outputs(client, run_id):
        model = client.get_logged_model(model_id)
        if model.tags.get(DIGEST) == digest and str(model.status) == "READY":
            return model
    return None


def _outputs(client: "MlflowClient", run_id: str) -> list[str]:
    outputs = client.get_run(run_id).outputs
    return [output.model_id for output in outputs.model_outputs] if outputs else []


def _unfinished(client: "MlflowClient", run_id: str, digest: str) -> "LoggedModel | None":
    experiment_id = client.get_run(run_id).info.experiment_id
    created = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    return next((one for one in created if one.tags.get(DIGEST) == digest and str(one.status) != "READY"), None)


def _create(client: "MlflowClient", run_id: str, checkpoint: Checkpoint, name: str, digest: str) -> "LoggedModel":
    manifest = checkpoint.manifest
    experiment_id = client.get_run(run_id).info.experiment_id
    tags = {DIGEST: digest, "flavor": FLAVOR_NAME, "tuner": manifest.tuner, **base_reference(manifest)}
    return client.create_logged_model(
        experiment_id, name, run_id, tags=tags, params=_params(manifest), model_type=MODEL_TYPE
    )


def _fill(client: "MlflowClient", run_id: str, checkpoint: Checkpoint, created: "LoggedModel") -> None:
    """Upload a model's files and declare it the run's output."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    model_id = str(created.model_id)
    try:
        with scratch_folder() as folder:
            model = Model(
                artifact_path=created.artifact_location, run_id=run_id, model_uuid=model_id, model_id=model_id
            )
            save_model(checkpoint, folder / "model", mlflow_model=model)
            client.log_model_artifacts(model_id, str(folder / "model"))
        if model_id not in _outputs(client, run_id):
            client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
        client.finalize_logged_model(model_id, "READY")
    except BaseException:
        with suppress(Exception):  # the server is down; the error below says why, and the next call completes the model
            client.finalize_logged_model(model_id, "FAILED")
        raise


def _params(manifest: Manifest) -> dict[str, str]:
    names = (
        "num_frames", "height", "width", "num_inference_steps", "guidance_scale", "guidance_scale_2", "dtype",
        "scheduler", "kernel",
    )  # fmt: skip
    return {name: text(value) for name in names if (value := getattr(manifest, name)) is not None}
