"""Checkpoints by any name: a path, a run or a registered model."""

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.config import Config, resolve
from sparsetune.errors import TrackingError, UsageError
from sparsetune.files import atomic_folder
from sparsetune.tracking.asking import MissingError, asking
from sparsetune.tracking.flavor import FOLDER, checkpoint_folder
from sparsetune.tracking.lookup import SHORTEST_ID, find_run, kind_of
from sparsetune.tracking.store import Store, connect, resolve_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

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
        """Read `models:/...`.

        Raises:
            UsageError: it is of neither form.
        """
        found = re.fullmatch(r"models:/+([^/@]+)(?:@([^/@]+)|/(\d+|latest))/?", text)
        if found is None:
            raise UsageError(
                f"a registered model must be named models:/NAME@ALIAS or models:/NAME/VERSION, but is {text}; "
                "give e.g. models:/demo-sparse@champion"
            )
        return cls(*found.groups())


def is_reference(checkpoint: Path | str) -> bool:
    """Whether a text names something in MLflow rather than a path; a path that exists is a path."""
    text = str(checkpoint)
    return text.startswith(_SCHEMES) or (_RUN_ID.fullmatch(text) is not None and not Path(text).exists())


def resolve_checkpoint(checkpoint: Path | str, config: Config | None = None) -> Path:
    """Find the local folder or file of a checkpoint; one in MLflow is downloaded to the cache.

    Args:
        checkpoint: a folder or file; a run id or its beginning; `runs:/ID`, `runs:/ID/PATH` with an artifact's path
            or a logged model's name; `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `models:/MODEL_ID`. What is none
            of these is taken for a path.
        config: says which store and cache; None is what environment and defaults say.

    Returns:
        What `sparsetune.checkpoint.load_checkpoint` reads. A path is given back as it is, whether it exists or not.

    Raises:
        UsageError: a `models:/` of another form, or the beginning of several runs' ids.
        MissingError: there is no such run, model, version or alias.
        TrackingError: the run has no checkpoint or is another tool's, the store is away, or you aren't permitted.
        CheckpointError: the model is of another flavour.
    """
    if not is_reference(checkpoint):
        return Path(checkpoint)
    text = str(checkpoint)
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
    return download_run_checkpoint(client, run, cache / f"run-{run.info.run_id}", path.rstrip("/") or FOLDER)


def find_version(client: "MlflowClient", reference: ModelReference) -> "ModelVersion":
    """Ask the registry for a version by its number, by an alias, or for the newest.

    Raises:
        MissingError: there is no such model, version or alias; the message names the aliases that there are.
        TrackingError: the registry refuses or is away.
    """
    name = reference.name
    with asking(f"the model {name} must be registered", missing="`sparsetune promote RUN` registers one"):
        aliases = client.get_registered_model(name).aliases
    version = reference.version
    if reference.alias is not None:
        version = aliases.get(reference.alias)
        if version is None:
            there = ", ".join(f"{alias} (version {number})" for alias, number in sorted(aliases.items())) or "none"
            raise MissingError(
                f"the model {name} must have the alias {reference.alias}, but has {there}; give another one, "
                f"or set it with `sparsetune promote RUN --name {name} --alias {reference.alias}`"
            )
    with asking(f"version {version} of the model {name} must be there", missing="give another version"):
        if version == "latest":
            found = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
            if not found:
                raise MissingError(f"the model {name} must have a version, but has none; promote a run")
            return found[0]
        return client.get_model_version(name, str(version))


def download_run_checkpoint(client: "MlflowClient", run: "Run", target: Path, path: str = FOLDER) -> Path:
    """Download the checkpoint that a run recorded, in place of an earlier download.

    Args:
        client: of the run's store.
        run: of kind tuning or evaluation.
        target: folder to put it in.
        path: the checkpoint's among the run's artifacts.

    Returns:
        The checkpoint's folder.

    Raises:
        TrackingError: the run is another tool's, or has no checkpoint there.
    """
    run_id = str(run.info.run_id)
    kind = kind_of(run)
    with asking(f"the artifacts of run {run_id} must be readable"):
        there = [one.path for one in client.list_artifacts(run_id, path)]
        if not there:
            advice = {
                "trial": "give its tuning run, which has the winner's",
                "tuning": "the search had no winner; tune with more trials",
            }.get(kind, "it judged SpargeAttn's default thresholds; give the run of a tuned checkpoint")
            raise TrackingError(f"run {run_id} must have the checkpoint {path}, but has none; {advice}")
        with atomic_folder(target) as temporary:
            client.download_artifacts(run_id, path, str(temporary))
    return checkpoint_folder(target / path)


def _download_model(client: "MlflowClient", store: Store, text: str, cache: Path) -> Path:
    import mlflow.artifacts

    model_id, home = text.removeprefix("models:").strip("/"), store.uri
    if _MODEL_ID.fullmatch(model_id):
        with asking(f"the logged model {model_id} must be readable"):
            target, source = cache / model_id, client.get_logged_model(model_id).artifact_location
    else:
        version = find_version(client, ModelReference.parse(text))
        target = cache / version.name / str(version.version)
        with asking(f"{text} must be readable"):
            source = client.get_model_version_download_uri(version.name, str(version.version))
        home = store.registry_uri if store.copies_models else store.uri
    with asking(f"the files of {text} must be readable"), atomic_folder(target) as temporary:
        # Not by its models:/ name, which MLflow would look up in its global stores.
        downloaded = mlflow.artifacts.download_artifacts(
            artifact_uri=source, dst_path=str(temporary / "files"), tracking_uri=home
        )
        shutil.copytree(downloaded, temporary / "model")
        shutil.rmtree(temporary / "files")
    return checkpoint_folder(target / "model")
