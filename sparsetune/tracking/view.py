"""The page of MLflow's UI that shows an experiment's runs with the columns that matter."""

import json
import os
from typing import TYPE_CHECKING

from sparsetune.config import TrackingConfig
from sparsetune.errors import TrackingError
from sparsetune.tracking.runs import KIND
from sparsetune.tracking.store import Store, connect, tracking_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

SHARE_KEY = "sparsetune"
_TAG = f"mlflow.sharedViewState.{SHARE_KEY}"
"""Where MLflow's UI looks for the view that a link's `viewStateShareKey` names; its own 'Share' button writes one."""

_KIND = "mlflow.experimentKind"
"""What MLflow's UI offers for an experiment: pages for training runs and models, or for language models."""

_WIDTHS = {
    "metrics.`sparsity/overall`": 130,
    "metrics.`psnr/mean`": 110,
    "metrics.`psnr/min`": 110,
    "metrics.`score`": 80,
    "tags.`verdict`": 110,
    "tags.`gate`": 90,
    "tags.`review`": 90,
    "attributes.`Models`": 150,
}
"""Columns in order, with their width in pixels."""

VIEW = {
    "orderByKey": "attributes.start_time",
    "orderByAsc": False,
    "selectedColumns": list(_WIDTHS),
    "columnOrder": ["attributes.`Run Name`", "runDateAndNestInfo", *_WIDTHS, "duration"],
    "columnWidths": _WIDTHS,
    "chartsSearchFilter": "sparsity/overall|psnr/mean|psnr/min|score",
}
"""The view: newest run first, with how sparse it is, how good, and what was decided about it."""


def page_of(uri: str, config: TrackingConfig) -> str:
    """Do as `experiment_page` at a server; empty where that can't be read, which its own pages tell better."""
    try:
        return experiment_page(connect(Store(uri, uri, None)), config)
    except TrackingError:
        return ""


def experiment_page(client: "MlflowClient", config: TrackingConfig) -> str:
    """Give what to add to the UI's link: the experiment that the configuration names, else that of the newest run.

    The view is written on the experiment once; where that isn't permitted, the page is the plain one.

    Returns:
        The page, e.g. `#/experiments/1/runs?viewStateShareKey=...`; empty where nothing was recorded yet.

    Raises:
        TrackingError: the store can't be read.
    """
    with tracking_errors("the recorded runs must be readable"):
        found = _experiment(client, config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME"))
    if found is None:
        return ""
    page = f"#/experiments/{found.experiment_id}/runs"
    tags = {_TAG: json.dumps(VIEW), _KIND: found.tags.get(_KIND, "custom_model_development")}
    try:
        with tracking_errors("the view must be writable"):
            for tag, value in tags.items():
                if found.tags.get(tag) != value:
                    client.set_experiment_tag(found.experiment_id, tag, value)
    except TrackingError:
        return page
    return f"{page}?viewStateShareKey={SHARE_KEY}&workflowType=machine_learning"


def _experiment(client: "MlflowClient", name: str | None) -> "Experiment | None":
    if name is not None:
        return client.get_experiment_by_name(name)
    every = client.search_experiments()
    newest = client.search_runs(
        [experiment.experiment_id for experiment in every],
        f"tags.`{KIND}` LIKE '%'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    return client.get_experiment(newest[0].info.experiment_id) if newest else None
