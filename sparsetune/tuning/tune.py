"""A whole search: calibrate, try policies on rendered video, save the winner and judge it on other prompts."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna

from sparsetune.attention.backends import choose_backend
from sparsetune.checkpoint import Checkpoint, LayerShape, Manifest, git_commit, hash_prompts, save_checkpoint, versions
from sparsetune.config import Config
from sparsetune.errors import TuningError
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.conditions import baseline_key, device_kind, device_name, dtype_name, scheduler
from sparsetune.evaluation.events import Listeners
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.evaluation.run import evaluate
from sparsetune.metrics import Gate
from sparsetune.models.generation import Frames, Renderer
from sparsetune.models.loading import load_pipeline
from sparsetune.models.prompts import load_prompts
from sparsetune.models.sparse import default_policy, sparsify
from sparsetune.tuning import study as studies
from sparsetune.tuning.builtin import refuse_builtin
from sparsetune.tuning.calibrate import calibrate, sample_steps
from sparsetune.tuning.curves import Curves, grid
from sparsetune.tuning.events import CalibrationStep, StudyStarted, TrialResult, TuningListener, TuningResult, tell
from sparsetune.tuning.objective import Objective
from sparsetune.tuning.space import SearchSpace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Bench:
    """What a search works with."""

    config: Config
    renderer: Renderer
    prompts: tuple[str, ...]
    eval_prompts: tuple[str, ...]
    cache: BaselineCache
    gate: Gate
    listeners: tuple[TuningListener, ...]
    output_dir: Path
    started: float

    @property
    def seconds_left(self) -> float | None:
        """Seconds until `tune.max_minutes` are over; None without that bound."""
        if self.config.tune.max_minutes is None:
            return None
        return max(0.0, self.config.tune.max_minutes * 60.0 - (time.perf_counter() - self.started))


def tune(config: Config, *, output_dir: Path, listeners: Sequence[TuningListener] = ()) -> TuningResult:
    """Search for the sparsest policy whose videos pass the gate, save it as a checkpoint and judge it.

    Calibrated curves tell what each error budget allows every head; Optuna searches budgets, dense steps and token
    order on rendered tune prompts; the winner is judged on the eval prompts, which the search never saw.

    Args:
        config: the configuration; its `tune` section says how to search.
        output_dir: gets `checkpoint/` and the winner's evaluation in `evaluation/`.
        listeners: told what happens, in order.

    Returns:
        All trials and the winner. Without a trial that meets the gate there is no winner and nothing is saved;
        `closest` is then the complete trial that misses it by the least. Ctrl-C while trials run ends the search
        with the best so far.

    Raises:
        PromptError, ModelError, BackendError, TuningError, GenerationError: what was asked for can't be done.
    """
    if config.tune.tuner == "builtin":
        refuse_builtin()
    if config.backend == "dense":
        raise TuningError("tuning must have a backend that can run sparse, but backend is dense; use --backend auto")
    prompts = load_prompts(config.tune.prompt_file, config.tune.num_prompts)
    eval_prompts = load_prompts(config.eval.prompt_file, config.eval.num_prompts)
    bench = _Bench(
        config=config,
        renderer=Renderer(load_pipeline(config.model), config.generation),
        prompts=prompts,
        eval_prompts=eval_prompts,
        cache=BaselineCache(config.cache.folder, config.cache.max_gb),
        gate=Gate(**config.gate.model_dump()),
        listeners=tuple(listeners),
        output_dir=output_dir,
        started=time.perf_counter(),
    )
    try:
        with studies.quiet():
            return _search(bench)
    except BaseException as error:
        failure = error
        tell(bench.listeners, lambda listener: listener.on_failure(failure))
        raise


def _search(bench: _Bench) -> TuningResult:
    config = bench.config
    signature = _signature(bench)
    name = config.tune.study_name or studies.default_name(config.model.name, signature)
    storage = config.tune.storage or f"sqlite:///{config.tracking.root / 'optuna.db'}"
    config.tracking.root.mkdir(parents=True, exist_ok=True)
    study = studies.open_study(storage, name, signature, config.tune.seed, config.tune.n_trials)
    start = StudyStarted(
        name, storage, config.model_dump(mode="json"), config.tune.n_trials, studies.num_done(study), bench.prompts,
        config.generation.num_inference_steps, bench.output_dir,
    )  # fmt: skip
    tell(bench.listeners, lambda listener: listener.on_study_start(start))
    curves_path = config.tracking.root / "calibrations" / f"{_digest(_measured(bench))}.npz"
    curves = Curves.load(curves_path) if curves_path.is_file() else _calibrate(bench, curves_path)
    space = SearchSpace(curves, config.tune.space, config.tune.granularity, config.tune.orders, config.tune.rules)
    objective, interrupted = _run_trials(bench, study, space)
    return _finish(bench, study, objective, curves_path, interrupted)


def _calibrate(bench: _Bench, path: Path) -> Curves:
    """Calibrate on every tune prompt; the dense videos that this renders go to the cache."""
    config, renderer = bench.config, bench.renderer
    steps = sample_steps(config.generation.num_inference_steps, config.tune.calibration_steps)
    backend = choose_backend(config.backend, renderer.loaded.device)
    merged: Curves | None = None
    for index, prompt in enumerate(bench.prompts):

        def on_step(step: int, num_steps: int, index: int = index) -> None:
            event = CalibrationStep(index, len(bench.prompts), step, num_steps)
            tell(bench.listeners, lambda listener: listener.on_calibration_step(event))

        curves, rendering = calibrate(
            renderer,
            prompt,
            config.tune.seed,
            steps=steps,
            orders=config.tune.orders,
            points=grid(config.tune.rules),
            backend=backend,
            on_step=on_step,
        )

        def rendered(frames: Frames = rendering.frames, seconds: float = rendering.seconds) -> tuple[Frames, float]:
            return frames, seconds

        bench.cache.get_or_render(baseline_key(renderer, prompt, config.tune.seed), rendered)
        merged = curves if merged is None else merged.merged(curves)
    if merged is None:
        raise ValueError("load_prompts gives at least one prompt")
    merged.save(path)
    return merged


def _run_trials(bench: _Bench, study: optuna.Study, space: SearchSpace) -> tuple[Objective, bool]:
    pipe = bench.renderer.loaded.pipe
    with sparsify(pipe, default_policy(pipe), bench.config.backend) as handle:
        objective = Objective(
            bench.renderer,
            handle,
            space,
            bench.prompts,
            bench.config.tune.seed,
            bench.cache,
            bench.gate,
            bench.listeners,
        )
        try:
            studies.search(study, objective, bench.config.tune.n_trials, bench.seconds_left)
        except KeyboardInterrupt:
            if not studies.feasible(study, space):
                raise
            return objective, True
        except TuningError as error:
            if not studies.feasible(study, space):
                raise
            logger.warning("the search stops with the best so far: %s", error)
    _check_ran_sparse(objective)
    return objective, False


def _check_ran_sparse(objective: Objective) -> None:
    """Check that not every call of this run's trials fell back to dense."""
    stats = [prompt.stats for trial in objective.results.values() for prompt in trial.prompts if prompt.stats]
    reasons = sorted({reason for each in stats for reason in each.fallbacks})
    if stats and reasons and not any(each.num_calls["sparse"] for each in stats):
        raise TuningError(
            f"some attention calls must run sparse, but all fell back to dense: {'; '.join(reasons)}; "
            "try another --backend or --dtype"
        )


def _finish(
    bench: _Bench, study: optuna.Study, objective: Objective, curves_path: Path, interrupted: bool
) -> TuningResult:
    trials = studies.results(study, objective)
    winners = [trial for trial in trials if trial.feasible and trial.sparsity]
    best = max(winners, key=lambda trial: trial.sparsity or 0.0, default=None)
    checkpoint_path, evaluation = None, None
    if best is not None:
        checkpoint_path = _save(bench, study.study_name, best)
        winner, saved = best, checkpoint_path
        tell(bench.listeners, lambda listener: listener.on_winner(winner, saved))
        evaluation = _judge(bench, winner, saved)
    result = TuningResult(
        study_name=study.study_name,
        trials=trials,
        best=best,
        closest=None if best else _closest(trials, bench.gate),
        checkpoint_path=checkpoint_path,
        evaluation=evaluation,
        calibration_path=curves_path,
        seconds=time.perf_counter() - bench.started,
        interrupted=interrupted,
    )
    tell(bench.listeners, lambda listener: listener.on_study_end(result))
    return result


def _closest(trials: Sequence[TrialResult], gate: Gate) -> TrialResult | None:
    """Pick the sparse trial that misses the gate by the least, one that rendered all prompts where there is one.

    Shortfalls are compared in dB, a hundredth of frame_cosine like one dB.
    """

    def shortfall(trial: TrialResult) -> float:
        worst = (gate.min_psnr_worst or 0.0) - (trial.psnr_worst or 0.0)
        cosine = 100 * (gate.min_frame_cosine - (trial.frame_cosine or 0.0))
        return max(gate.min_psnr - (trial.psnr or 0.0), worst if gate.min_psnr_worst is not None else cosine, cosine)

    sparse = [trial for trial in trials if trial.state != "failed" and trial.sparsity]
    complete = [trial for trial in sparse if trial.state == "complete"]
    return min(complete or sparse, key=shortfall, default=None)


def _save(bench: _Bench, study_name: str, best: TrialResult) -> Path:
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
        kernel=choose_backend(config.backend, loaded.device).name,
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


def _judge(bench: _Bench, winner: TrialResult, checkpoint_path: Path) -> EvaluationResult:
    """Judge the winner on the eval prompts."""
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


def _signature(bench: _Bench) -> dict[str, Any]:
    """Name all that the trials of one study share, as JSON values."""
    config = bench.config
    return _measured(bench) | {
        "space": config.tune.space,
        "granularity": config.tune.granularity,
        "gate": asdict(bench.gate),
    }


def _measured(bench: _Bench) -> dict[str, Any]:
    """Name all that decides the calibrated curves, as JSON values."""
    config, loaded = bench.config, bench.renderer.loaded
    backend = choose_backend(config.backend, loaded.device)
    return {
        "model": loaded.identity.fingerprint,
        "layers": [[name, heads] for name, heads, _ in loaded.identity.layers],
        "generation": config.generation.model_dump(mode="json"),
        "scheduler": scheduler(loaded.pipe),
        "dtype": dtype_name(loaded.dtype),
        "device": device_kind(loaded.device),
        "kernel": backend.name,
        "blocks": asdict(backend.blocks),
        "prompts": hash_prompts(bench.prompts),
        "seed": config.tune.seed,
        "orders": list(config.tune.orders),
        "rules": list(config.tune.rules),
        "grid": [asdict(point) for point in grid(config.tune.rules)],
        "calibration_steps": config.tune.calibration_steps,
    }


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
