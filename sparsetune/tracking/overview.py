"""All runs of a store at a glance."""

import math
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sparsetune.tracking.asking import asking
from sparsetune.tracking.lookup import model_of, paged, parent_of, search
from sparsetune.tracking.registry import EVALUATION, RUN, TOOL
from sparsetune.tracking.review import TAG as REVIEW
from sparsetune.tracking.runs import KIND

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@dataclass(frozen=True)
class RunRow:
    """One run; None means that it doesn't say.

    Args:
        run_id: its id.
        name: in MLflow's UI.
        kind: tuning or evaluation.
        model: short name of the model.
        status: FINISHED, RUNNING, FAILED or KILLED.
        started: in UTC as ISO 8601.
        sparsity: fraction of block pairs not computed on the eval prompts, in [0, 1].
        psnr: mean on the eval prompts in dB.
        score: out of 100.
        gate: passed or failed.
        review: ok or rejected.
        aliases: of its registered versions, e.g. `demo-sparse@champion`.
    """

    run_id: str
    name: str
    kind: str
    model: str | None
    status: str
    started: str
    sparsity: float | None
    psnr: float | None
    score: float | None
    gate: str | None
    review: str | None
    aliases: tuple[str, ...]


def list_runs(client: "MlflowClient", model: str | None = None) -> tuple[RunRow, ...]:
    """List tunings, and evaluations that are no part of one, the best first.

    Best is: the gate held, then sparser, then higher psnr; runs without a result come last, the newest first.

    Args:
        client: of the store.
        model: short name of the only model to list; None lists all.

    Raises:
        TrackingError: the store is away or refuses.
    """
    aliases = _aliases(client)
    rows = [
        _row(run, aliases.get(str(run.info.run_id), ()))
        for run in search(client, f"tags.`{KIND}` != 'trial'")
        if parent_of(run) is None and model in (None, model_of(run))
    ]
    return tuple(sorted(rows, key=_rank))


def _rank(row: RunRow) -> tuple[bool, bool, float, float]:
    measured = row.psnr is not None
    return (not measured, row.gate != "passed", -(row.sparsity or 0.0), -(row.psnr or -math.inf) if measured else 0.0)


def _row(run: "Run", aliases: tuple[str, ...]) -> RunRow:
    tags, metrics, kind = run.data.tags, run.data.metrics, run.data.tags[KIND]
    prefix = "eval/" if kind == "tuning" else ""
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
        score=metrics.get(f"{prefix}score"),
        gate=tags.get("eval.gate" if prefix else "gate"),
        review=tags.get(REVIEW),
        aliases=aliases,
    )


def _aliases(client: "MlflowClient") -> dict[str, tuple[str, ...]]:
    """Read the aliases of our registered models, by the run that each version was made of or judged by."""
    found: dict[str, list[str]] = defaultdict(list)
    with asking("the model registry must be readable"):
        for model in paged(client.search_registered_models, filter_string=f"tags.`{TOOL}` = 'sparsetune'"):
            for alias, number in sorted(model.aliases.items()):
                version = client.get_model_version(model.name, number)
                for run_id in {version.tags[tag] for tag in (RUN, EVALUATION) if tag in version.tags}:
                    found[run_id].append(f"{model.name}@{alias}")
    return {run_id: tuple(names) for run_id, names in found.items()}
