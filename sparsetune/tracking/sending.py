"""What is done on a tracking server, and may be done twice."""

from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.tracking.operations import Begin, Dataset, Files, Inputs, Model, Operation, Status, Text, Write

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

KEY = "sparsetune.key"
"""The tag by which a run is found again that may have been begun already."""


def perform(client: "MlflowClient", operation: Operation, files: Path, *, repeated: bool) -> str:
    """Do an operation on a server; doing it again changes nothing.

    MLflow's stores drop a metric that they have with the same name, value, time and step, take a parameter that
    they have with the same value, and overwrite tags and artifacts.

    Args:
        client: of the server.
        operation: what to do.
        files: folder of the files kept for it.
        repeated: whether it may have been done before; then a run is looked for before it is made.

    Returns:
        The run's id.

    Raises:
        Exception: whatever MLflow raises.
    """
    from mlflow.entities import Metric, Param, RunTag

    run_id = operation.run
    match operation:
        case Begin():
            return _begin(client, operation, repeated=repeated)
        case Write():
            client.log_batch(
                run_id,
                [Metric(*metric) for metric in operation.metrics],
                [Param(*param) for param in operation.params.items()],
                [RunTag(*tag) for tag in operation.tags.items()],
                synchronous=True,
            )
        case Text():
            client.log_text(run_id, operation.text, operation.path)
        case Files():
            client.log_artifacts(run_id, str(files), operation.folder)
        case Inputs():
            client.log_inputs(run_id, [dataset_input(dataset) for dataset in operation.datasets])
        case Model():
            _log_model(client, run_id, files)
        case Status(end_ms=None):
            client.update_run(run_id, status=operation.status)
        case Status():
            client.set_terminated(run_id, operation.status, operation.end_ms)
    return run_id


def find_runs(client: "MlflowClient", experiment_id: str, stand_in: str) -> list[str]:
    """Find the run that a stand-in stands for, with its twins if it was made twice; none where it wasn't begun.

    The one that most was written to is the first. One that somebody deleted is found too, after the others: it isn't
    to be made again.

    Raises:
        Exception: whatever MLflow raises.
    """
    from mlflow.entities import ViewType

    query = f"tags.`{KEY}` = '{stand_in.removeprefix('run-')}'"
    found = client.search_runs([experiment_id], query, ViewType.ALL)

    def rank(run: "Run") -> tuple[bool, int, str]:
        written = len(run.data.metrics) + len(run.data.params) + len(run.data.tags)
        return run.info.lifecycle_stage != "active", -written, str(run.info.run_id)

    return [str(run.info.run_id) for run in sorted(found, key=rank)]


def delete_twins(client: "MlflowClient", experiment_id: str, stand_in: str, kept: str) -> None:
    """Delete runs that a server made of a request which it was thought to have missed, but for the one that is kept.

    Raises:
        Exception: whatever MLflow raises.
    """
    for twin in find_runs(client, experiment_id, stand_in):
        if twin != kept and client.get_run(twin).info.lifecycle_stage == "active":
            client.delete_run(twin)


def _begin(client: "MlflowClient", begin: Begin, *, repeated: bool) -> str:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES

    found = find_runs(client, begin.experiment_id, begin.run) if repeated else []
    if found:
        return found[0]
    tags = begin.tags | {KEY: begin.run.removeprefix("run-")}
    made = client.create_run(begin.experiment_id, begin.start_ms, tags, begin.name)
    if not int(MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()):  # type: ignore[no-untyped-call]
        return str(made.info.run_id)
    # MLflow may have asked again by itself, where only the answer was lost.
    delete_twins(client, begin.experiment_id, begin.run, str(made.info.run_id))
    return str(made.info.run_id)


def _log_model(client: "MlflowClient", run_id: str, files: Path) -> None:
    from sparsetune.tracking.logged_model import log_checkpoint_model

    log_checkpoint_model(client, run_id, files)


def dataset_input(dataset: Dataset) -> "DatasetInput":
    """Say it in MLflow's own kinds."""
    from mlflow.entities import Dataset as MlflowDataset
    from mlflow.entities import DatasetInput, InputTag

    described = MlflowDataset(
        dataset.name, dataset.digest, dataset.source_type, dataset.source, profile=dataset.profile
    )
    return DatasetInput(described, [InputTag("mlflow.data.context", dataset.context)])


def refused(error: BaseException) -> bool:
    """Whether a server understood and said no, in this error or what caused it; otherwise trying later may help."""
    from mlflow.exceptions import RestException
    from requests import HTTPError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RestException):
            return 400 <= int(cause.get_http_status_code()) < 500  # type: ignore[no-untyped-call]
        if isinstance(cause, HTTPError) and cause.response is not None:
            return 400 <= cause.response.status_code < 500
        cause = cause.__cause__
    return False
