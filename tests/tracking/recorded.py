"""Runs as tuning and evaluation record them, written with MLflow's client to a test's store."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.checkpoint import Checkpoint, LayerShape, Manifest, save_checkpoint
from sparsetune.config import TrackingConfig
from sparsetune.evaluation.conditions import policy_digest
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.tracking import Store, connect, resolve_store
from sparsetune.tracking.logged_model import log_checkpoint_model
from sparsetune.tracking.promotion import judge, promote
from sparsetune.tracking.registry import Registry
from sparsetune.tracking.results import find_candidate
from sparsetune.tracking.review import Review, answer_all, record_review, video_names
from tests.tracking.conftest import LAYERS, make_result

PSNRS = (36.0, 37.0, 38.0, 39.0, 40.0, 41.0)
"""Of six prompts."""


def policy_of(cdfthreshd: float) -> Policy:
    head = HeadThresholds(simthreshd1=0.5, cdfthreshd=cdfthreshd)
    return Policy.uniform([(name, 3) for name in LAYERS], head, keep_text=True)


def checkpoint_of(cdfthreshd: float, **manifest: Any) -> Checkpoint:
    known: dict[str, Any] = {
        "tuner": "optuna",
        "base_model": "demo",
        "base_source": "demo",
        "base_revision": "0123abc",
        "layers": tuple(LayerShape(name=name, num_heads=3, head_dim=64) for name in LAYERS),
        "num_frames": 17,
        "height": 64,
        "width": 64,
        "num_inference_steps": 10,
        "guidance_scale": 1.0,
        "dtype": "float32",
    }
    return Checkpoint(policy_of(cdfthreshd), Manifest.model_validate(known | manifest))


def result_of(
    psnrs: tuple[float, ...] = PSNRS,
    sparsity: float = 0.25,
    digest: str = "d" * 64,
    bound: float = 35.0,
    **config: Any,
) -> EvaluationResult:
    """A result with these PSNRs and about this sparsity; the gate requires a mean above `bound`."""
    value = make_result(psnrs).to_dict()
    mean = sum(psnrs) / len(psnrs)
    passed = mean > bound
    condition = {"name": "mean psnr", "unit": "dB", "measured": mean, "bound": bound, "met": passed}
    value["gate"] = {"passed": passed, "failures": [] if passed else ["psnr"], "conditions": [condition]}
    value["config"] |= {"use_tuned": True, **config}
    value["config"]["policy"]["digest"] = digest
    value["sparsity"]["overall"] = sparsity
    for index, row in enumerate(value["detailed_results"]):
        row["sparsity"] = sparsity + 0.001 * (index % 2)
    return EvaluationResult.model_validate(value)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A tuning with the evaluation of its winner."""

    tuning: str
    evaluation: str
    result: EvaluationResult


@dataclasses.dataclass(frozen=True)
class World:
    """Recorded runs, all about the model demo.

    Args:
        database: of their store.
        champion: reviewed, sparsity 0.25, promoted as version 1 of demo-sparse.
        sparser: reviewed, sparsity 0.3; with an evaluation of the default thresholds before it.
        sparsest: reviewed, sparsity 0.4.
        unreviewed: sparsity 0.5.
    """

    database: Path
    champion: Recorded
    sparser: Recorded
    sparsest: Recorded
    unreviewed: Recorded


def make_world(empty: Path, folder: Path) -> World:
    """Record and promote the runs of `World`, in a copy of an empty store."""
    database = folder / "mlflow.db"
    shutil.copy(empty, database)
    place = Place(database, folder)
    champion = place.reviewed(place.tuned(0.9, sparsity=0.25))
    promote(place.registry(), judge(place.registry(), find_candidate(place.client, champion.tuning)))
    sparser = place.reviewed(place.tuned(0.8, sparsity=0.3, before=True))
    sparsest = place.reviewed(place.tuned(0.7, sparsity=0.4))
    for recorded, cdfthreshd in ((sparser, 0.8), (sparsest, 0.7)):
        log_checkpoint_model(
            place.client, recorded.tuning, save_checkpoint(checkpoint_of(cdfthreshd), folder / "again")
        )
    return World(database, champion, sparser, sparsest, place.tuned(0.6, sparsity=0.5))


class Place:
    """A store with methods to record runs.

    Args:
        store: a SQLite file, or a tracking server's URI.
        folder: where checkpoints, and artifacts of a SQLite file, are kept.
        registry: the model registry's URI; None is the store's own.
    """

    def __init__(self, store: Path | str, folder: Path, registry: str | None = None) -> None:
        uri = store if isinstance(store, str) else f"sqlite:///{store}"
        self.store: Store = resolve_store(TrackingConfig(uri=uri), {"MLFLOW_REGISTRY_URI": registry or uri})
        self.client: MlflowClient = connect(self.store)
        self.folder = folder
        self._number = 0
        experiment = self.client.get_experiment_by_name("sparsetune/demo")
        if experiment is not None:
            self._number = len(self.client.search_runs([experiment.experiment_id]))

    def registry(self, name: str = "demo-sparse") -> Registry:
        return Registry(self.client, self.store, name)

    def tuned(
        self,
        cdfthreshd: float = 0.9,
        *,
        before: bool = False,
        videos: int = 2,
        checkpoint: Checkpoint | None = None,
        **result: Any,
    ) -> Recorded:
        """Record a tuning, its winner and the winner's evaluation; `before` adds that of the default thresholds."""
        winner = checkpoint or checkpoint_of(cdfthreshd)
        tuning = self.run("tuning", f"tune {self._number}", {"best.trial": "1", "gate": "passed"})
        if before:
            value = result_of((60.0,) * 6, 0.01).to_dict()
            value["config"]["use_tuned"] = False
            self._evaluation(tuning, EvaluationResult.model_validate(value), None, 0)
        judged = result_of(**{"digest": policy_digest(winner.policy)} | result)
        folder = save_checkpoint(winner, self.folder / f"checkpoint-{self._number}")
        evaluation = self._evaluation(tuning, judged, folder, videos)
        self.client.log_artifacts(tuning, str(folder), "checkpoint")
        metrics = {"sparsity/overall": judged.sparsity.overall, "psnr/mean": _mean(judged), "score": 85.0}
        self._metrics(tuning, metrics)
        return Recorded(tuning, evaluation, judged)

    def evaluated(self, cdfthreshd: float = 0.9, *, model: str = "demo", **result: Any) -> Recorded:
        """Record an evaluation of a checkpoint that doesn't belong to a tuning."""
        judged = result_of(**{"digest": policy_digest(policy_of(cdfthreshd))} | result)
        checkpoint = save_checkpoint(checkpoint_of(cdfthreshd), self.folder / f"checkpoint-{self._number}")
        evaluation = self._evaluation(None, judged, checkpoint, 2)
        self.client.set_tag(evaluation, "sparsetune.model", model)
        return Recorded(evaluation, evaluation, judged)

    def reviewed(self, recorded: Recorded, *, ok: bool = True) -> Recorded:
        """Record a review of an evaluation."""
        review = Review(
            evaluation_id=recorded.evaluation,
            policy_digest=recorded.result.config.policy.digest,
            reviewer="Ada",
            videos=answer_all(video_names(self.client, recorded.evaluation).values(), ok=ok),
        )
        record_review(self.client, review, (recorded.evaluation, recorded.tuning))
        return recorded

    def foreign(self) -> str:
        """Record a run of another tool."""
        return str(self.client.create_run(self._experiment(), run_name="other").info.run_id)

    def runs(self, at_least: int) -> list[Run]:
        """Return all runs, after adding trials up to this number."""
        while len(found := list(self.client.search_runs([self._experiment()]))) < at_least:
            self.run("trial", "trial", {})
        return found

    def tags(self, run_id: str) -> dict[str, str]:
        return dict(self.client.get_run(run_id).data.tags)

    def _evaluation(self, parent: str | None, result: EvaluationResult, checkpoint: Path | None, videos: int) -> str:
        policy = "tuned" if checkpoint is not None else "default"
        parents = {} if parent is None else {"mlflow.parentRunId": parent}
        gate = "passed" if result.gate.passed else "failed"
        run_id = self.run("evaluation", f"eval {policy}", {"policy": policy, "gate": gate, **parents})
        self.client.log_param(run_id, "policy.digest", result.config.policy.digest)
        self._metrics(run_id, {"sparsity/overall": result.sparsity.overall, "psnr/mean": _mean(result)})
        self.client.log_text(run_id, json.dumps(result.to_dict()), "result.json")
        for index in range(videos):
            self.client.log_text(run_id, f"video {index}", f"videos/prompt_{index}_compare.mp4")
        if checkpoint is not None:
            self.client.log_artifacts(run_id, str(checkpoint), "checkpoint")
        self.client.set_terminated(run_id)
        return run_id

    def _metrics(self, run_id: str, values: dict[str, float | None]) -> None:
        metrics = [Metric(name, value or 0.0, 1_700_000_000_000, 0) for name, value in values.items()]
        self.client.log_batch(run_id, metrics=metrics)

    def run(self, kind: str, name: str, tags: dict[str, str]) -> str:
        self._number += 1
        written = {"sparsetune.kind": kind, "sparsetune.model": "demo", **tags}
        # Distinct start times order runs that start within the same millisecond.
        created = self.client.create_run(
            self._experiment(), start_time=1_700_000_000_000 + self._number, tags=written, run_name=name
        )
        return str(created.info.run_id)

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name("sparsetune/demo")
        if found is not None:
            return str(found.experiment_id)
        location = None if self.store.is_server else (self.folder / "artifacts").as_uri()
        return str(self.client.create_experiment("sparsetune/demo", artifact_location=location))


def _mean(result: EvaluationResult) -> float:
    values = [row.psnr for row in result.detailed_results if row.psnr is not None]
    return sum(values) / len(values)
