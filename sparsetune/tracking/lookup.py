"""Finding runs, registered versions and checkpoints in a store."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sparsetune.checkpoint import hub
from sparsetune.config import Config, resolve
from sparsetune.errors import TrackingError, UsageError
from sparsetune.files import atomic_folder
from sparsetune.tracking.flavor import FOLDER, checkpoint_folder
from sparsetune.tracking.store import (
    KIND,
    MODEL,
    PARENT,
    MissingError,
    Store,
    connect,
    paged,
    resolve_store,
    store_errors,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

SHORTEST_ID = 6
LATEST = "latest"
"""In place of a run id: the newest tuning run that has a winner."""

_LISTED = "list runs with `sparsetune runs`"


def find_run(client: "MlflowClient", reference: str, model: str | None = None) -> "Run":
    """Find a run by its id, the beginning of it, or `latest`, for which `model` may be a model's short name.

    Raises UsageError where it is neither or begins several ids, MissingError where there is no such run, TrackingError
    where it is another tool's.
    """
    if reference == LATEST:
        return _latest(client, model)
    if not re.fullmatch(rf"[0-9a-f]{{{SHORTEST_ID},32}}", reference):
        raise UsageError(
            f"{reference!r} is not a run: give its id, at least {SHORTEST_ID} characters of it, or {LATEST}; {_LISTED}"
        )
    if len(reference) == 32:
        with store_errors(f"find run {reference}", missing=_LISTED):
            found = [client.get_run(reference)]
    else:
        found = list(search(client, f"attributes.run_id LIKE '{reference}%'"))
    if not found:
        raise MissingError(f"no run id starts with {reference}; {_LISTED}")
    if len(found) > 1:
        ids = ", ".join(str(run.info.run_id)[: len(reference) + 4] for run in found[:4])
        raise UsageError(f"{len(found)} run ids start with {reference}: {ids}; give more characters")
    kind_of(found[0])
    check_files_host(found[0].info.artifact_uri, client.tracking_uri)
    return found[0]


def check_files_host(artifact_uri: str, store_uri: str) -> None:
    """Raise TrackingError where files are on a server other than the store's: it would get the user's credentials.

    Whoever may create an experiment chooses where its artifacts are.
    """
    files, store = urlsplit(artifact_uri), urlsplit(store_uri)
    if files.scheme not in ("http", "https", "mlflow-artifacts") or not files.hostname:
        return
    if files.hostname != store.hostname or files.port not in (None, store.port):
        raise TrackingError(
            f"the files are on {files.hostname}, not on the configured server, and aren't read, since your credentials "
            "would be sent there; set MLFLOW_TRACKING_URI to that server if it is yours"
        )


def search(client: "MlflowClient", filter_string: str) -> "Iterator[Run]":
    with store_errors("read the tracking store"):
        experiments = [str(one.experiment_id) for one in paged(client.search_experiments)]
        for start in range(0, len(experiments), 100):
            yield from paged(
                client.search_runs,
                experiment_ids=experiments[start : start + 100],
                filter_string=filter_string,
                order_by=["attributes.start_time DESC"],
            )


def kind_of(run: "Run") -> str:
    """Return tuning, trial or evaluation; raises TrackingError where the run is another tool's."""
    kind = run.data.tags.get(KIND)
    if kind is None:
        raise TrackingError(f"run {run.info.run_id} is another tool's: it has no tag {KIND}; {_LISTED}")
    return str(kind)


def model_of(run: "Run") -> str | None:
    params = run.data.params
    return run.data.tags.get(MODEL) or params.get("short_name") or params.get("model_name") or params.get("model.name")


def parent_of(run: "Run") -> str | None:
    parent: str | None = run.data.tags.get(PARENT)
    return parent


def evaluations_of(client: "MlflowClient", tuning_id: str) -> "dict[str, Run]":
    """Find the newest finished evaluations of a tuning: `default` before it, `tuned` after it."""
    found: dict[str, Run] = {}
    for run in search(client, f"tags.`{PARENT}` = '{tuning_id}' and tags.`{KIND}` = 'evaluation'"):
        if run.info.status == "FINISHED":
            check_files_host(run.info.artifact_uri, client.tracking_uri)
            found.setdefault(run.data.tags.get("policy", "tuned"), run)
    return found


def evaluations_of_policy(client: "MlflowClient", digest: str, model: str | None = None) -> "Iterator[Run]":
    """Find the evaluations of a policy, on one model or on any, the newest first."""
    for run in search(client, f"params.`policy.digest` = '{digest}' and tags.`{KIND}` = 'evaluation'"):
        if model in (None, model_of(run)):
            yield run


def _latest(client: "MlflowClient", model: str | None) -> "Run":
    for run in search(client, f"tags.`{KIND}` = 'tuning'"):
        if run.data.tags.get("best.trial", "none") != "none" and model in (None, model_of(run)):
            return run
    about = "" if model is None else f" of the model {model}"
    raise MissingError(
        f"no tuning run{about} has a winner; run `sparsetune tune{'' if model is None else f' --model {model}'}`"
    )


_RUN_ID = re.compile(rf"[0-9a-f]{{{SHORTEST_ID},32}}")
_MODEL_ID = re.compile(r"m-[0-9a-f]{32}")
_SCHEMES = ("runs:/", "models:/")


@dataclass(frozen=True)
class ModelReference:
    """`models:/NAME@ALIAS` or `models:/NAME/VERSION`; a version `latest` is the newest one."""

    name: str
    alias: str | None = None
    version: str | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelReference":
        found = re.fullmatch(r"models:/+([^/@]+)(?:@([^/@]+)|/(\d+|latest))/?", text)
        if found is None:
            raise UsageError(
                f"{text} is not models:/NAME@ALIAS or models:/NAME/VERSION; give e.g. models:/demo-sparse@champion"
            )
        return cls(*found.groups())


def is_reference(checkpoint: Path | str) -> bool:
    """Whether a text names something in MLflow rather than a path; a path that exists is a path."""
    text = str(checkpoint)
    return text.startswith(_SCHEMES) or (_RUN_ID.fullmatch(text) is not None and not Path(text).exists())


def resolve_checkpoint(checkpoint: Path | str, config: Config | None = None) -> Path:
    """Find the local folder or file of a checkpoint; one in MLflow or on the Hub is downloaded to a cache.

    `checkpoint` is a path; a run id or its beginning; `runs:/ID`, `runs:/ID/PATH` with an artifact's path or a logged
    model's name; `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/MODEL_ID`; `hf://OWNER/NAME`, also with
    `@REVISION`. What is none of these is returned as a path, whether it exists or not.

    Raises UsageError, MissingError and TrackingError as `find_run` and `find_version` do, TrackingError where the run
    has no checkpoint, CheckpointError where the model is of another flavour, and as `hub.download` does.
    """
    text = str(checkpoint)
    if text.startswith(hub.SCHEME):
        return hub.download(hub.HubReference.parse(text))
    if not is_reference(checkpoint):
        return Path(checkpoint)
    config = config or resolve()
    store = resolve_store(config.tracking)
    client = connect(store)
    stores = f"{store.uri} {store.registry_uri}" if store.registry_is_apart else store.uri
    cache = config.cache.folder / "checkpoints" / hashlib.sha256(stores.encode()).hexdigest()[:8]
    if text.startswith("models:/"):
        return _download_model(client, store, text, cache)
    run_id, _, path = re.sub("^runs:/+", "", text).partition("/")
    run = find_run(client, run_id)
    for output in run.outputs.model_outputs if run.outputs else ():
        if path and client.get_logged_model(output.model_id).name == path.rstrip("/"):
            return _download_model(client, store, f"models:/{output.model_id}", cache)
    return download_run_checkpoint(
        client, run, cache / _file_name(f"run-{run.info.run_id}"), path.rstrip("/") or FOLDER
    )


def find_version(client: "MlflowClient", reference: ModelReference) -> "ModelVersion":
    """Find a version by its number, by an alias, or the newest."""
    name = reference.name
    with store_errors(f"find the registered model {name}", missing="register one with `sparsetune promote RUN`"):
        aliases = client.get_registered_model(name).aliases
    version = reference.version
    if reference.alias is not None:
        version = aliases.get(reference.alias)
        if version is None:
            there = ", ".join(f"{alias} (version {number})" for alias, number in sorted(aliases.items())) or "none"
            raise MissingError(
                f"the model {name} has no alias {reference.alias}, only {there}; give another one, or set it "
                f"with `sparsetune promote RUN --name {name} --alias {reference.alias}`"
            )
    with store_errors(f"find version {version} of the model {name}", missing="give another version"):
        if version == "latest":
            found = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
            if not found:
                raise MissingError(f"the model {name} has no version; promote a run")
            return found[0]
        return client.get_model_version(name, str(version))


def download_run_checkpoint(client: "MlflowClient", run: "Run", target: Path, path: str = FOLDER) -> Path:
    """Download a run's checkpoint, the artifact folder `path`, in place of an earlier download; return its folder."""
    run_id = str(run.info.run_id)
    kind = kind_of(run)
    check_files_host(run.info.artifact_uri, client.tracking_uri)
    with store_errors(f"read the artifacts of run {run_id}"):
        there = [one.path for one in client.list_artifacts(run_id, path)]
        if not there:
            advice = {
                "trial": "give its tuning run",
                "tuning": "the search had no winner; tune with more trials",
            }.get(kind, "it judged SpargeAttn's default thresholds; give the run of a tuned checkpoint")
            raise TrackingError(f"run {run_id} has no checkpoint {path}; {advice}")
        with atomic_folder(target) as temporary:
            client.download_artifacts(run_id, path, str(temporary))
    return checkpoint_folder(target / path)


def _file_name(text: str) -> str:
    """Return a name from a server as one of a file or folder, which can't lead out of its folder."""
    return re.sub(r"[^-.\w ]", "_", text).strip(".") or "_"


def _download_model(client: "MlflowClient", store: Store, text: str, cache: Path) -> Path:
    import mlflow.artifacts

    model_id, home = text.removeprefix("models:").strip("/"), store.uri
    if _MODEL_ID.fullmatch(model_id):
        with store_errors(f"read the logged model {model_id}"):
            target, source = cache / _file_name(model_id), client.get_logged_model(model_id).artifact_location
    else:
        version = find_version(client, ModelReference.parse(text))
        target = cache / _file_name(version.name) / _file_name(str(version.version))
        with store_errors(f"read {text}"):
            source = client.get_model_version_download_uri(version.name, str(version.version))
        home = store.registry_uri if store.copies_models else store.uri
    check_files_host(source, home)
    with store_errors(f"read the files of {text}"), atomic_folder(target) as temporary:
        # Not by its models:/ name, which MLflow would look up in its global stores.
        downloaded = mlflow.artifacts.download_artifacts(
            artifact_uri=source, dst_path=str(temporary / "files"), tracking_uri=home
        )
        shutil.copytree(downloaded, temporary / "model")
        shutil.rmtree(temporary / "files")
    return checkpoint_folder(target / "model")
