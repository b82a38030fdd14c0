"""The winner of a search, saved as a checkpoint and judged on other prompts."""

from pathlib import Path

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint import Checkpoint, LayerShape, Manifest, git_commit, hash_prompts, save_checkpoint, versions
from sparsetune.evaluation.evaluate import evaluate
from sparsetune.evaluation.events import Listeners
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.tuning.bench import Bench
from sparsetune.tuning.events import TrialResult
from sparsetune.tuning.once import CHECKPOINT
from sparsetune.tuning.rerun import recorded


def save(bench: Bench, study_name: str, best: TrialResult) -> Path:
    """Save a trial's policy as the checkpoint of the search, with all that is known of it.

    Returns:
        The checkpoint's folder.
    """
    config, rig = bench.config, bench.rig
    identity = rig.identity
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
        dtype=rig.dtype,
        scheduler=rig.scheduler,
        kernel=rig.kernel,
        device=rig.device_name,
        tuner_settings=config.tune.model_dump(mode="json")
        | {"study_name": study_name, "trial": best.number, "params": dict(best.params)},
        search=recorded(config),
        prompts_hash=hash_prompts(bench.prompts),
        eval_prompts_hash=hash_prompts(bench.eval_prompts),
        seeds=(config.tune.seed,),
        versions=versions(),
        git_commit=git_commit(),
        metrics={name: value for name, value in measured.items() if value is not None},
    )
    return save_checkpoint(Checkpoint(best.policy, manifest), bench.output_dir / CHECKPOINT)


def judge(bench: Bench, policy: Policy | None, folder: str, checkpoint_path: Path | None = None) -> EvaluationResult:
    """Judge a policy on the eval prompts, which the search never saw.

    Args:
        bench: what the search worked with.
        policy: what to judge; None for SpargeAttn's default thresholds.
        folder: name of the folder in the output folder that gets the result.
        checkpoint_path: where the policy is saved, if it is.
    """
    config = bench.config
    return evaluate(
        bench.engine,
        policy,
        bench.eval_prompts,
        seed=config.eval.seed,
        cache=bench.cache,
        metrics=config.eval.metrics,
        gate=bench.gate,
        backend=config.backend,
        listener=Listeners([each for listener in bench.listeners for each in listener.evaluation_listeners()]),
        output_dir=bench.output_dir / folder,
        save_videos=config.eval.save_videos,
        checkpoint=None if checkpoint_path is None else str(checkpoint_path),
        tuner=None if checkpoint_path is None else config.tune.tuner,
        prompt_file=config.eval.prompt_file,
        tune_prompts=bench.prompts,
    )
