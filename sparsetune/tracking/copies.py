"""Checkpoints copied to the side of a registry that is apart from the runs' store."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.tracking.asking import asking
from sparsetune.tracking.logged import log_checkpoint_model
from sparsetune.tracking.store import Store, experiment_id

if TYPE_CHECKING:
    from mlflow import MlflowClient

ORIGIN = "sparsetune.copy_of"
"""Tag of a run on the registry's side: the run, in its own store, whose checkpoint it keeps."""


@dataclass(frozen=True)
class LoggedIn:
    """A logged model with its run, in the store that the registry looks into."""

    run_id: str
    model_id: str


def copy_checkpoint(home: "MlflowClient", store: Store, model: str, origin: str, checkpoint: Path) -> LoggedIn:
    """Log a checkpoint, some kilobytes, on the registry's side; one that is there already is taken.

    Args:
        home: client of the registry's server.
        store: the runs' store and the registry.
        model: short name of the model.
        origin: id of the run that made the checkpoint, in the runs' store.
        checkpoint: its folder.

    Raises:
        TrackingError: the registry's server is away or refuses.
    """
    there = replace(store, uri=store.registry_uri, artifact_root=None)
    experiment = experiment_id(home, there, f"sparsetune/{model}/registered")
    with asking(f"the registry's server must keep the checkpoint of run {origin}"):
        found = home.search_runs([experiment], f"tags.`{ORIGIN}` = '{origin}'", max_results=1)
        tags = {ORIGIN: origin, "sparsetune.origin_store": store.shown}
        run_id = str((found[0] if found else home.create_run(experiment, tags=tags)).info.run_id)
        logged = log_checkpoint_model(home, run_id, checkpoint)
        home.set_terminated(run_id)
    return LoggedIn(run_id, logged)
