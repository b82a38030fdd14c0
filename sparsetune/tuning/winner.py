"""The winner of a search: picked, saved as a checkpoint, and judged."""

from collections.abc import Sequence
from pathlib import Path

from sparsetune.checkpoint import Checkpoint, LayerShape, Manifest, git_commit, hash_prompts, save_checkpoint, versions
from sparsetune.evaluation.conditions import device_name, dtype_name, scheduler
from sparsetune.evaluation.events import Listeners
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.evaluation.run import evaluate
from sparsetune.tuning.bench import Bench
from sparsetune.tuning.events import TrialResult


def sparsest(trials: Sequence[TrialResult]) -> TrialResult | None:
    """Pick the sparsest trial that met the gate; None where none did, or only with no sparsity at all."""
    winners = [trial for trial in trials if trial.feasible and trial.sparsity]
    return max(winners, key=lambda trial: trial.sparsity or 0.0, default=None)


def closest(trials: Sequence[TrialResult]) -> TrialResult | None:
    """Pick the sparse trial that misses the gate by the least, one that rendered all prompts where there is one.

    Shortfalls are compared in dB, a hundredth of frame_cosine like one dB.
    """

    def largest(trial: TrialResult) -> float:
        return max(missing * (100 if name == "frame_cosine" else 1) for name, missing in trial.shortfalls.items())

    sparse = [trial for trial in trials if trial.state != "failed" and trial.sparsity and trial.shortfalls]
    complete = [trial for trial in sparse if trial.state == "complete"]
    return min(complete or sparse, key=largest, default=None)


def save(bench: Bench, study_name: str, best: TrialResult) -> Path:
    """Save a trial's policy as the checkpoint of the search, with all that is known of it.

    Returns:
        The checkpoint's folder.
    """
    config, loaded = bench.config, bench.renderer.loaded
    identity = loaded.identity
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
        dtype=dtype_name(loaded.dtype),
        scheduler=scheduler(loaded.pipe),
        kernel=bench.backend.name,
        device=device_name(loaded.device),
        tuner_settings=config.tune.model_dump(mode="json")
        | {"study_name": study_name, "trial": best.number, "params": dict(best.params)},
        prompts_hash=hash_prompts(bench.prompts),
        seeds=(config.tune.seed,),
        versions=versions(),
        git_commit=git_commit(),
        metrics={name: value for name, value in measured.items() if value is not None},
    )
    return save_checkpoint(Checkpoint(best.policy, manifest), bench.output_dir / "checkpoint")


def judge(bench: Bench, winner: TrialResult, checkpoint_path: Path) -> EvaluationResult:
    """Judge the winner on the eval prompts, which the search never saw."""
    config = bench.config
    return evaluate(
        bench.renderer,
        winner.policy,
        bench.eval_prompts,
        seed=config.eval.seed,
        cache=bench.cache,
        metrics=config.eval.metrics,
        gate=bench.gate,
        backend=config.backend,
        listener=Listeners([each for listener in bench.listeners for each in listener.evaluation_listeners()]),
        output_dir=bench.output_dir / "evaluation",
        save_videos=config.eval.save_videos,
        checkpoint=str(checkpoint_path),
        tuner=config.tune.tuner,
        prompt_file=config.eval.prompt_file,
        tune_prompts=bench.prompts,
    )
