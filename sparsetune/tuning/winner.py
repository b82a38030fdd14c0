"""The winner of a search, saved as a checkpoint and judged on other prompts."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint import (
    Checkpoint,
    LayerShape,
    Manifest,
    git_commit,
    hash_prompts,
    load_checkpoint,
    save_checkpoint,
    versions,
)
from sparsetune.errors import CheckpointError
from sparsetune.evaluation.evaluate import evaluate
from sparsetune.evaluation.events import Listeners
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.locks import exclusive_if_free
from sparsetune.tuning.context import TuningContext
from sparsetune.tuning.events import SearchStatistics, TrialResult, TuningResult
from sparsetune.tuning.reproduce import recorded
from sparsetune.tuning.search.ranking import closest

CHECKPOINT = "checkpoint"
"""Folder of the winner's checkpoint in the output folder."""

EVALUATION = "evaluation"
"""Folder of its evaluation there."""

_LOCK = ".winner.lock"


class WinnersFolder:
    """Tells whether this process is to save and judge a winner, or another one of the same study does or did.

    To be made when the search begins: a winner that was judged before that is judged again, as a user expects of a
    command that is given again; one that was judged since then was judged by another process of this search.

    Args:
        folder: the output folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = self._stamp()

    @contextlib.contextmanager
    def take(self, study_name: str, trial: int) -> Iterator[bool]:
        """Keep the folder while the block runs, and give whether it is this process's turn to judge a trial.

        Raises:
            CacheError: the folder can't be written to.
        """
        with exclusive_if_free(self._folder / _LOCK, setting="--output-dir") as free:
            yield free and not (self._stamp() != self._before and self._holds(study_name, trial))

    def _holds(self, study_name: str, trial: int) -> bool:
        try:
            settings = load_checkpoint(self._folder / CHECKPOINT).manifest.tuner_settings
        except CheckpointError:
            return False
        return (settings.get("study_name"), settings.get("trial")) == (study_name, trial)

    def _stamp(self) -> frozenset[tuple[str, int, int]]:
        """Give what changes when an evaluation ends: its result is the last file to be written."""
        found = ((path.name, path.stat()) for path in (self._folder / EVALUATION).glob("*.json"))
        return frozenset((name, status.st_mtime_ns, status.st_ino) for name, status in found)


def save(context: TuningContext, study_name: str, best: TrialResult) -> Path:
    """Save a trial's policy as the checkpoint of the search, with all that is known of it.

    Returns:
        The checkpoint's folder.
    """
    config, runtime = context.config, context.runtime
    identity = runtime.identity
    measured = {
        "sparsity": best.sparsity, "psnr": best.psnr, "psnr_worst": best.psnr_worst, "frame_cosine": best.frame_cosine
    }  # fmt: skip
    manifest = Manifest(
        tuner=config.tune.tuner,
        base_model=identity.name,
        base_source=identity.source,
        base_revision=identity.revision,
        base_fingerprint=identity.fingerprint,
        pipeline_class=identity.pipeline_class,
        transformer_class=identity.transformer_class,
        layers=tuple(LayerShape(name=name, num_heads=heads, head_dim=dim) for name, heads, dim in identity.layers),
        num_frames=config.generation.num_frames,
        height=config.generation.height,
        width=config.generation.width,
        num_inference_steps=config.generation.num_inference_steps,
        guidance_scale=config.generation.guidance_scale,
        guidance_scale_2=config.generation.guidance_scale_2,
        dtype=runtime.dtype,
        scheduler=runtime.scheduler,
        kernel=runtime.kernel,
        device=runtime.device_name,
        tuner_settings=config.tune.model_dump(mode="json")
        | {"study_name": study_name, "trial": best.number, "params": dict(best.params)},
        search=recorded(config),
        prompts_hash=hash_prompts(context.prompts),
        eval_prompts_hash=hash_prompts(context.eval_prompts),
        seeds=(config.tune.seed,),
        versions=versions(),
        git_commit=git_commit(),
        metrics={name: value for name, value in measured.items() if value is not None},
    )
    return save_checkpoint(Checkpoint(best.policy, manifest), context.output_dir / CHECKPOINT)


def judge(
    context: TuningContext, policy: Policy | None, folder: str, checkpoint_path: Path | None = None
) -> EvaluationResult:
    """Judge a policy on the eval prompts, which the search never saw.

    Args:
        context: what the search worked with.
        policy: what to judge; None for SpargeAttn's default thresholds.
        folder: name of the folder in the output folder that gets the result.
        checkpoint_path: where the policy is saved, if it is.
    """
    config = context.config
    return evaluate(
        context.executor,
        policy,
        context.eval_prompts,
        seed=config.eval.seed,
        cache=context.cache,
        metrics=config.eval.metrics,
        gate=context.gate,
        backend=config.backend,
        listener=Listeners([each for listener in context.listeners for each in listener.evaluation_listeners()]),
        output_dir=context.output_dir / folder,
        save_videos=config.eval.save_videos,
        checkpoint=None if checkpoint_path is None else str(checkpoint_path),
        tuner=None if checkpoint_path is None else config.tune.tuner,
        prompt_file=config.eval.prompt_file,
        tune_prompts=context.prompts,
    )


@dataclass(frozen=True)
class Found:
    """The outcome of a tuner.

    Args:
        study_name: its study's name.
        trials: all trials, in order.
        best: the winner; None where there is none.
        calibration_path: the calibrated curves; None where nothing was calibrated.
        interrupted: whether Ctrl-C ended it before its time.
        insight: what the trials say of the search.
        num_elsewhere: trials that other processes still run.
    """

    study_name: str
    trials: Sequence[TrialResult]
    best: TrialResult | None
    calibration_path: Path | None = None
    interrupted: bool = False
    insight: SearchStatistics | None = None
    num_elsewhere: int = 0

    def result(self, seconds: float) -> TuningResult:
        """Give the result without what judging adds."""
        return TuningResult(
            study_name=self.study_name,
            trials=tuple(self.trials),
            best=self.best,
            closest=None if self.best else closest(self.trials),
            checkpoint_path=None,
            evaluation=None,
            calibration_path=self.calibration_path,
            seconds=seconds,
            interrupted=self.interrupted,
            insight=self.insight,
        )
