"""Runs of sparsetune, found in a store."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sparsetune.errors import TrackingError, UsageError
from sparsetune.tracking.asking import MissingError, asking
from sparsetune.tracking.runs import KIND, MODEL, PARENT

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SHORTEST_ID = 6
LATEST = "latest"
"""In place of a run id: the newest tuning run that has a winner."""

_PAGE = 1000
_LISTED = "`sparsetune runs` lists them"


def find_run(client: "MlflowClient", reference: str, model: str | None = None) -> "Run":
    """Find a run of sparsetune.

    Args:
        client: of the store.
        reference: its id, the beginning of it, or `latest`.
        model: for `latest`, the model's short name; None takes any.

    Raises:
        UsageError: it is neither, or begins several ids.
        MissingError: there is no such run.
        TrackingError: it is another tool's, or the store is away.
    """
    if reference == LATEST:
        return _latest(client, model)
    if not re.fullmatch(rf"[0-9a-f]{{{SHORTEST_ID},32}}", reference):
        raise UsageError(
            f"a run must be named by its id, its first {SHORTEST_ID} or more characters, or {LATEST}, "
            f"but is {reference!r}; {_LISTED}"
        )
    if len(reference) == 32:
        with asking(f"run {reference} must be there", missing=_LISTED):
            found = [client.get_run(reference)]
    else:
        found = list(search(client, f"attributes.run_id LIKE '{reference}%'"))
    if not found:
        raise MissingError(f"run {reference} must be there, but the store has none whose id begins so; {_LISTED}")
    if len(found) > 1:
        ids = ", ".join(str(run.info.run_id)[: len(reference) + 4] for run in found[:4])
        raise UsageError(f"{reference} must begin the id of one run, but begins {len(found)}: {ids}; give more of it")
    kind_of(found[0])
    return found[0]


def search(client: "MlflowClient", filter_string: str, order_by: list[str] | None = None) -> "Iterator[Run]":
    """Give the runs of all experiments that match; active ones only, the newest first unless told otherwise.

    Raises:
        TrackingError: the store is away or refuses.
    """
    with asking("the tracking store must be readable"):
        experiments = [str(one.experiment_id) for one in paged(client.search_experiments)]
        for start in range(0, len(experiments), 100):
            yield from paged(
                client.search_runs,
                experiment_ids=experiments[start : start + 100],
                filter_string=filter_string,
                order_by=order_by or ["attributes.start_time DESC"],
            )


def kind_of(run: "Run") -> str:
    """Tell what a run is: tuning, trial or evaluation.

    Raises:
        TrackingError: it is another tool's.
    """
    kind = run.data.tags.get(KIND)
    if kind is None:
        raise TrackingError(
            f"run {run.info.run_id} must be one of sparsetune's, but has no tag {KIND}: another tool made it; {_LISTED}"
        )
    return str(kind)


def model_of(run: "Run") -> str | None:
    """Tell the short name of the model that a run is about; None where it doesn't say."""
    return run.data.tags.get(MODEL) or run.data.params.get("model_name") or run.data.params.get("model.name")


def parent_of(run: "Run") -> str | None:
    """Tell the id of the run that a run is a part of."""
    parent: str | None = run.data.tags.get(PARENT)
    return parent


def evaluations_of(client: "MlflowClient", tuning_id: str) -> "dict[str, Run]":
    """Find the newest finished evaluations of a tuning: `default` before it, `tuned` after it, as far as there are."""
    found: dict[str, Run] = {}
    for run in search(client, f"tags.`{PARENT}` = '{tuning_id}' and tags.`{KIND}` = 'evaluation'"):
        if run.info.status == "FINISHED":
            found.setdefault(run.data.tags.get("policy", "tuned"), run)
    return found


def _latest(client: "MlflowClient", model: str | None) -> "Run":
    for run in search(client, f"tags.`{KIND}` = 'tuning'"):
        if run.data.tags.get("best.trial", "none") != "none" and model in (None, model_of(run)):
            return run
    about = "" if model is None else f" of the model {model}"
    raise MissingError(
        f"there must be a tuning run{about} that has a winner, but the store has none; "
        f"run `sparsetune tune{'' if model is None else f' --model {model}'}`"
    )


def paged(ask: Any, **arguments: Any) -> Iterator[Any]:
    """Go through all pages of one of MLflow's searches."""
    token: str | None = None
    while True:
        page = ask(**arguments, max_results=_PAGE, page_token=token)
        yield from page
        token = page.token or None
        if token is None:
            return
