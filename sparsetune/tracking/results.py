"""Results of runs: read from a store, and listed."""

import itertools
import logging
import math
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.errors import ResultError, TrackingError
from sparsetune.evaluation.result import EvaluationResult, load_result
from sparsetune.files import scratch_folder
from sparsetune.tracking.local_runs import read_aliases, read_runs
from sparsetune.tracking.lookup import (
    LATEST,
    ModelReference,
    check_files_host,
    evaluations_of,
    evaluations_of_policy,
    find_run,
    find_version,
    is_reference,
    kind_of,
    model_of,
    parent_of,
    search,
)
from sparsetune.tracking.registry import EVALUATION, RUN, TOOL
from sparsetune.tracking.review import TAG as REVIEW
from sparsetune.tracking.store import KIND, Store, connect, paged, store_errors
from sparsetune.urls import sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_LOG = logging.getLogger(__name__)

RESULT = "result.json"


@dataclass(frozen=True)
class RunRow:
    """One run in `sparsetune runs`; None where something isn't recorded."""

    run_id: str
    name: str
    kind: str  # tuning or evaluation
    model: str | None
    status: str
    started: str  # UTC, ISO 8601
    sparsity: float | None  # fraction of block pairs not computed on the eval prompts
    psnr: float | None  # mean in dB
    psnr_worst: float | None  # of the worst prompt, in dB
    score: float | None  # of 100
    gate: str | None  # passed or failed
    review: str | None  # ok, rejected or incomplete
    aliases: tuple[str, ...]  # of its versions, e.g. `demo-sparse@champion`


def list_runs(store: Store, model: str | None = None) -> tuple[RunRow, ...]:
    """List tunings, and evaluations that are no part of one, the best first.

    Best is: the gate held, then sparser, then higher psnr; runs without a result come last, the newest first. Nothing
    is created: a SQLite store that isn't there yet has no runs.
    """
    runs, aliases = _read_runs(store)
    reviews = _reviews(runs)
    rows = [
        _row(run, aliases.get(str(run.info.run_id), ()), reviews.get(str(run.info.run_id)))
        for run in runs
        if parent_of(run) is None and model in (None, model_of(run))
    ]
    return tuple(sorted(rows, key=_rank))


def _read_runs(store: Store) -> "tuple[list[Run], dict[str, tuple[str, ...]]]":
    """Read all runs but trials, and aliases by run; SQLite without MLflow, which takes seconds to import."""
    database = None if store.registry_is_apart else sqlite_path(store.uri)
    if database is not None:
        if not database.exists():
            return [], {}
        # A damaged file or another tool's database: MLflow's client, below, finds out what is wrong.
        with suppress(sqlite3.Error):
            return list(read_runs(database, KIND, "trial")), read_aliases(
                database, (TOOL, "sparsetune"), (RUN, EVALUATION)
            )
    client = connect(store)
    return list(search(client, f"tags.`{KIND}` != 'trial'")), _aliases(client)


def _reviews(runs: "Sequence[Run]") -> dict[str, str]:
    """Return the verdict on each run's policy, by run id: of any run with it; a tuning has its winner's."""
    policies: dict[str, tuple[str | None, str]] = {}
    verdicts: dict[tuple[str | None, str], str] = {}
    for run in reversed(runs):  # the newest winner and verdict count
        run_id, tuning = str(run.info.run_id), parent_of(run)
        if digest := run.data.params.get("policy.digest"):
            policies[run_id] = policy = (model_of(run), digest)
            if tuning is not None and run.data.tags.get("policy", "tuned") == "tuned":
                policies[tuning] = policy
            if REVIEW in run.data.tags:
                verdicts[policy] = run.data.tags[REVIEW]
    return {run_id: verdicts[policy] for run_id, policy in policies.items() if policy in verdicts}


def _rank(row: RunRow) -> tuple[bool, bool, float, float]:
    measured = row.psnr is not None
    return (not measured, row.gate != "passed", -(row.sparsity or 0.0), -(row.psnr or -math.inf) if measured else 0.0)


def _row(run: "Run", aliases: tuple[str, ...], review: str | None) -> RunRow:
    tags, metrics, kind = run.data.tags, run.data.metrics, run.data.tags[KIND]
    # In the tunings of earlier versions the plain keys are of the tune prompts.
    prefix = "eval/" if "eval/psnr/mean" in metrics else ""
    started = datetime.fromtimestamp(run.info.start_time / 1000, UTC)
    return RunRow(
        run_id=str(run.info.run_id),
        name=str(run.info.run_name),
        kind=kind,
        model=model_of(run),
        status=str(run.info.status),
        started=started.isoformat(timespec="seconds"),
        sparsity=metrics.get(f"{prefix}sparsity/overall"),
        psnr=metrics.get(f"{prefix}psnr/mean"),
        psnr_worst=metrics.get(f"{prefix}psnr/min"),
        score=metrics.get("score"),
        gate=tags.get("gate", tags.get("eval.gate")),
        review=review,
        aliases=aliases,
    )


def _aliases(client: "MlflowClient") -> dict[str, tuple[str, ...]]:
    """Read the aliases of our registered models, by the run and the evaluation of each version."""
    found: dict[str, list[str]] = defaultdict(list)
    with store_errors("read the model registry"):
        for model in paged(client.search_registered_models, filter_string=f"tags.`{TOOL}` = 'sparsetune'"):
            for alias, number in sorted(model.aliases.items()):
                version = client.get_model_version(model.name, number)
                for run_id in {version.tags[tag] for tag in (RUN, EVALUATION) if tag in version.tags}:
                    found[run_id].append(f"{model.name}@{alias}")
    return {run_id: tuple(names) for run_id, names in found.items()}


def read_result(client: "MlflowClient", run_id: str) -> EvaluationResult:
    """Read an evaluation run's result; raises TrackingError where it has none, ResultError where it can't be read."""
    with store_errors(f"read the artifacts of run {run_id}"):
        check_files_host(client.get_run(run_id).info.artifact_uri, client.tracking_uri)
        if RESULT not in [one.path for one in client.list_artifacts(run_id)]:
            raise TrackingError(f"run {run_id} has no {RESULT}: its evaluation didn't finish; evaluate again")
        with scratch_folder() as folder:
            return load_result(Path(client.download_artifacts(run_id, RESULT, str(folder))))


def evaluation_of(client: "MlflowClient", run: "Run", policy: str = "tuned") -> "Run":
    """Return a run's evaluation: itself, or a tuning's newest one: `default` before it, `tuned` after it."""
    run_id, kind = run.info.run_id, kind_of(run)
    if kind == "evaluation":
        return run
    if kind == "trial":
        raise TrackingError(f"run {run_id} is a trial, which has no evaluation; give its tuning run {parent_of(run)}")
    found = evaluations_of(client, str(run.info.run_id)).get(policy)
    if found is None:
        what = "the winner" if policy == "tuned" else "SpargeAttn's default thresholds"
        raise TrackingError(
            f"the tuning run {run_id} has no evaluation of {what}; evaluate with `sparsetune eval`, and give that run"
        )
    return found


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to promote: the run that stands for it, and the evaluation it is judged by."""

    run_id: str
    evaluation_id: str
    model: str
    result: EvaluationResult


def find_candidate(client: "MlflowClient", reference: str, model: str | None = None) -> Candidate:
    evaluation = evaluation_of(client, find_run(client, reference, model))
    evaluation_id = str(evaluation.info.run_id)
    result = read_result(client, evaluation_id)
    return Candidate(
        parent_of(evaluation) or evaluation_id, evaluation_id, model_of(evaluation) or result.config.short_name, result
    )


def is_run(reference: str) -> bool:
    """Whether a text names a run or a registered model; a path that exists is a path."""
    return not Path(reference).exists() and (reference == LATEST or is_reference(reference))


def result_of(client: "MlflowClient", reference: str, model: str | None = None) -> EvaluationResult:
    """Read the result of a run as `find_run` takes it, `runs:/ID`, `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
    if reference.startswith("models:/"):
        version = find_version(client, ModelReference.parse(reference))
        if EVALUATION not in version.tags:
            raise TrackingError(f"{reference} was not promoted by sparsetune; give a run")
        return read_result(client, version.tags[EVALUATION])
    reference = re.sub("^runs:/+", "", reference).rstrip("/")
    return read_result(client, str(evaluation_of(client, find_run(client, reference, model)).info.run_id))


def before_and_after(
    client: "MlflowClient", reference: str, model: str | None = None
) -> tuple[EvaluationResult, EvaluationResult]:
    """Read the results of SpargeAttn's default thresholds and of the winner, of a tuning or one of its evaluations."""
    run = find_run(client, reference, model)
    parent = parent_of(run)
    tuning = run if parent is None else find_run(client, parent)
    if kind_of(tuning) != "tuning":
        raise TrackingError(
            f"run {reference} is an evaluation, which has no before and after; compare two runs: "
            "sparsetune compare RUN_A RUN_B"
        )
    sides = (evaluation_of(client, tuning, policy) for policy in ("default", "tuned"))
    before, after = (read_result(client, str(side.info.run_id)) for side in sides)
    return before, after


def results_of_policy(client: "MlflowClient", digest: str, preferred: str) -> Iterator[EvaluationResult]:
    """Read the results of a policy's evaluations that can be read, a preferred run's first, then the newest."""
    runs = (str(run.info.run_id) for run in evaluations_of_policy(client, digest))
    for run_id in itertools.chain([preferred], runs):
        try:
            yield read_result(client, run_id)
        except (TrackingError, ResultError) as error:
            _LOG.info("run %s is not compared: %s", run_id, error)
