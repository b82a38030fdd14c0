"""A whole search: calibrate, try policies on rendered video, save the winner and judge it on other prompts."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import optuna

from sparsetune.attention.backends import choose_backend
from sparsetune.config import Config
from sparsetune.errors import TuningError
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.metrics import Gate, import_metrics
from sparsetune.models.generation import Frames, Renderer
from sparsetune.models.loading import load_pipeline
from sparsetune.models.prompts import load_prompts
from sparsetune.models.sparse import default_policy, sparsify
from sparsetune.tuning import study as studies
from sparsetune.tuning.bench import Bench, calibration_signature, digest, signature
from sparsetune.tuning.builtin import refuse_builtin
from sparsetune.tuning.calibrate import calibrate, sample_steps
from sparsetune.tuning.curves import Curves, grid
from sparsetune.tuning.events import CalibrationStep, StudyStarted, TuningListener, TuningResult, tell
from sparsetune.tuning.objective import Objective
from sparsetune.tuning.space import SearchSpace
from sparsetune.tuning.winner import closest, judge, save, sparsest

logger = logging.getLogger(__name__)


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
    import_metrics(config.eval.metric_modules)
    prompts = load_prompts(config.tune.prompt_file, config.tune.num_prompts)
    eval_prompts = load_prompts(config.eval.prompt_file, config.eval.num_prompts)
    loaded = load_pipeline(config.model)
    bench = Bench(
        config=config,
        renderer=Renderer(loaded, config.generation),
        backend=choose_backend(config.backend, loaded.device),
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


def _search(bench: Bench) -> TuningResult:
    config = bench.config
    shared = signature(bench)
    name = config.tune.study_name or studies.default_name(config.model.name, shared)
    storage = config.tune.storage or f"sqlite:///{config.tracking.root / 'optuna.db'}"
    config.tracking.root.mkdir(parents=True, exist_ok=True)
    study = studies.open_study(storage, name, shared, config.tune.seed, config.tune.n_trials)
    start = StudyStarted(
        name, storage, config.model_dump(mode="json"), config.tune.n_trials, studies.num_done(study), bench.prompts,
        config.generation.num_inference_steps, bench.output_dir,
    )  # fmt: skip
    tell(bench.listeners, lambda listener: listener.on_study_start(start))
    curves_path = config.tracking.root / "calibrations" / f"{digest(calibration_signature(bench))}.npz"
    curves = Curves.load(curves_path) if curves_path.is_file() else _calibrate(bench, curves_path)
    space = SearchSpace(curves, config.tune.space, config.tune.granularity, config.tune.orders, config.tune.rules)
    objective, interrupted = _run_trials(bench, study, space)
    return _finish(bench, study, objective, curves_path, interrupted)


def _calibrate(bench: Bench, path: Path) -> Curves:
    """Calibrate on every tune prompt; the dense videos that this renders go to the cache."""
    config, renderer = bench.config, bench.renderer
    steps = sample_steps(config.generation.num_inference_steps, config.tune.calibration_steps)
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
            backend=bench.backend,
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


def _run_trials(bench: Bench, study: optuna.Study, space: SearchSpace) -> tuple[Objective, bool]:
    pipe = bench.renderer.loaded.pipe
    with sparsify(pipe, default_policy(pipe), bench.config.backend) as handle:
        objective = Objective(
            bench.renderer,
            handle,
            space,
            bench.prompts,
            bench.config.tune.seed,
            bench.cache,
            bench.search_gate,
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
    bench: Bench, study: optuna.Study, objective: Objective, curves_path: Path, interrupted: bool
) -> TuningResult:
    trials = studies.results(study, objective)
    best = sparsest(trials)
    checkpoint_path, evaluation = None, None
    if best is not None:
        checkpoint_path = save(bench, study.study_name, best)
        winner, saved = best, checkpoint_path
        tell(bench.listeners, lambda listener: listener.on_winner(winner, saved))
        evaluation = judge(bench, winner, saved)
    result = TuningResult(
        study_name=study.study_name,
        trials=trials,
        best=best,
        closest=None if best else closest(trials),
        checkpoint_path=checkpoint_path,
        evaluation=evaluation,
        calibration_path=curves_path,
        seconds=time.perf_counter() - bench.started,
        interrupted=interrupted,
    )
    tell(bench.listeners, lambda listener: listener.on_study_end(result))
    return result
