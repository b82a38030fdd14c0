"""A whole tuning: one of the tuners finds policies, the winner is saved and evaluated on other prompts."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparsetune.attention.backends import skips_work
from sparsetune.attention.policy import Policy
from sparsetune.bench.step_time import StepSeconds
from sparsetune.checkpoint import (
    Checkpoint,
    LayerShape,
    Manifest,
    check_folder,
    git_commit,
    hash_prompts,
    load_checkpoint,
    save_checkpoint,
    versions,
)
from sparsetune.config import Config
from sparsetune.errors import CheckpointError, ModelError
from sparsetune.evaluation.compare import compare
from sparsetune.evaluation.evaluate import evaluate
from sparsetune.evaluation.events import Listeners
from sparsetune.evaluation.hand_set import Pair
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.executor import run_one
from sparsetune.files import check_replaceable
from sparsetune.locks import exclusive_if_free
from sparsetune.models.loading import LoadedModel
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.calibration.sensitivity import Sensitivity
from sparsetune.tuning.calibration.step_caches import ProbeCaches
from sparsetune.tuning.calibration.uniform_pairs import uniform_pairs
from sparsetune.tuning.context import TimeIsUp, TuningContext, calibration_signature, digest, open_context
from sparsetune.tuning.dial import Dial, dial_of
from sparsetune.tuning.events import (
    Parameter,
    PhaseClock,
    StudyState,
    TrialResult,
    TuningListener,
    TuningResult,
    notify,
)
from sparsetune.tuning.prepare import Prepared, measure_step, prepare, refined_policy
from sparsetune.tuning.record import RECORD_NAME, TuningRecord, save_record
from sparsetune.tuning.reproduce import recorded
from sparsetune.tuning.search.allocation import KernelCost, only_paying_layers
from sparsetune.tuning.search.caches import CacheSpace
from sparsetune.tuning.search.candidates import CandidateTable
from sparsetune.tuning.search.objective import TrialRunner
from sparsetune.tuning.search.run import open_search, search
from sparsetune.tuning.search.space import SHARING
from sparsetune.tuning.search.study import quiet
from sparsetune.tuning.sparge_builtin import check_builtin, run_builtin

logger = logging.getLogger(__name__)

_CHECKPOINT, _EVALUATION, _LOCK = "checkpoint", "evaluation", ".winner.lock"


def search_policy(context: TuningContext) -> TuningResult:
    """Calibrate, then search with Optuna; a study of the same name and settings is resumed.

    Raises:
        TuningError: the study can't be opened or has other settings, or trials keep failing for one reason.
        KeyboardInterrupt: Ctrl-C before any trial met the gate.
    """
    with quiet():
        study = open_search(context)
        try:
            step, caches = _shared_step(context, study), _shared_caches(context, study)
            reason = None if step is None else never_faster(step, context)
            if reason and caches is None:
                return TuningResult(study.study_name, step=step, dense_because=reason)
            # Where sparsity saves no seconds but caches do, thresholds aren't searched.
            only_caches = caches is not None and (step is None or reason is not None)
            prepared = None if only_caches else prepare(context)
        except TimeIsUp:
            return TuningResult(study.study_name)
        if prepared is None:
            result = search(context, study, None, Sensitivity(), step, caches)
        else:
            result = search(context, study, prepared.curves, prepared.sensitivity, step, caches)
            result = replace(_with_pairs(result, prepared.curves), calibration_path=prepared.path)
            if result.best is not None:
                dial = _dial(context, result, result.best, prepared, step)
                result = replace(result, dial=dial.to_bytes(), per_head=dial.per_head_gain(result.best.policy))
    reason = None if result.best else slower_at_the_gate(step, result.trials, context)
    return replace(result, step=step, dense_because=reason)


def _dial(
    context: TuningContext, result: TuningResult, best: TrialResult, prepared: Prepared, step: StepSeconds | None
) -> Dial:
    """Return the calibration that travels in the winner's checkpoint."""
    measured = [
        (trial.predicted_error, trial.psnr)
        for trial in result.trials
        if trial.state == "complete" and trial.predicted_error and trial.psnr and trial.policy.cache is None
    ]
    tune = context.config.tune
    sharing = SHARING.get(tune.granularity, "none")
    return dial_of(prepared.curves, prepared.sensitivity, step, best.params, measured, tune.orders, sharing)


def _with_pairs(result: TuningResult, curves: Curves) -> TuningResult:
    """Add the hand-set pairs to compare the winner with, unless it is a cache alone."""
    best = result.best
    if best is None or best.policy.is_dense:
        return result
    return replace(result, hand_set=uniform_pairs(curves, best.policy.keep_text, best.sparsity or 0.0))


_STEP = "step"
"""User attribute of a study: what a step costs, which decides the policy that a trial's parameters mean."""


def _shared_step(context: TuningContext, study: StudyState) -> StepSeconds | None:
    """Return what a step costs, as the study's first process measured it; None where speed isn't the goal."""
    if context.goal != "speed" or not skips_work(context.runtime.kernel):
        return None
    return StepSeconds(**_shared(study, _STEP, lambda: measure_step(context)))


def _shared(study: StudyState, name: str, measure: Callable[[], Any]) -> dict[str, Any]:
    """Return what the first process of a study measured, a dataclass, by its fields."""
    known = study.update_attr(name, lambda known: known or "")
    if not known:
        measured = json.dumps(asdict(measure()))
        known = study.update_attr(name, lambda others: others or measured)
    return dict(json.loads(known))


_CACHES = "caches"
"""User attribute of a study: the caches that work on the model, and MagCache's ratios."""


def _shared_caches(context: TuningContext, study: StudyState) -> CacheSpace | None:
    """Return the caches to search, as the study's first process found them; None where none are wanted.

    ModelError where none of those wanted works, or one that was asked for by name doesn't.
    """
    if not context.cache_kinds:
        return None
    task = ProbeCaches(context.prompts[0], context.config.tune.seed, context.cache_kinds, context.config.backend)
    working = _shared(study, _CACHES, lambda: run_one(context.executor, task))
    reasons = dict(working["reasons"])
    if reasons and (context.config.tune.caches != ("auto",) or not working["kinds"]):
        listed = "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items())
        raise ModelError(f"caches don't work on this model: {listed}; use --caches none or others")
    for kind, reason in reasons.items():
        logger.info("the cache %s isn't searched: %s", kind, reason)
    ratios = tuple(tuple(each) for each in working["ratios"])
    return CacheSpace(tuple(working["kinds"]), context.config.generation.num_inference_steps, ratios)


_HARDLY_REACHED = 0.9
"""Sparsity beyond what videos allow: a kernel that is slower even there can't win."""


def never_faster(step: StepSeconds, context: TuningContext) -> str | None:
    """Return why no policy can be faster than dense on this GPU, in numbers; None where one may be."""
    if step.saved(_HARDLY_REACHED) > 0:
        return None
    sparse = step.dense - step.saved(_HARDLY_REACHED)
    return (
        f"{_share(step)}; even at sparsity {_HARDLY_REACHED:g} the {context.runtime.kernel} kernel takes "
        f"{sparse * 1e3:.2g} ms a layer, dense attention {step.dense * 1e3:.2g} ms: these sequences are too short"
    )


def slower_at_the_gate(step: StepSeconds | None, trials: Sequence[TrialResult], context: TuningContext) -> str | None:
    """Return why the dense model is recommended after trials, in numbers; None where quality is what lacks."""
    passed = [trial for trial in trials if trial.feasible and trial.speedup and trial.saves]
    if not passed:
        return None
    fastest = max(passed, key=lambda trial: trial.speedup or 0.0)
    if step is not None:
        return _slower(step, fastest, context)
    return (
        f"the fastest, trial {fastest.number}, is {fastest.speedup or 0.0:.2f} times as fast as dense, within twice "
        f"the timing's noise of {fastest.seconds_noise or 0.0:.0%}; if other work ran here, run it again without"
    )


def _slower(step: StepSeconds, trial: TrialResult, context: TuningContext) -> str:
    return (
        f"the fastest, trial {trial.number}, is {trial.speedup or 0.0:.2f} times as fast as dense at sparsity "
        f"{trial.sparsity or 0.0:.3f}; {_share(step)}, and {context.runtime.kernel} is faster than dense from "
        f"sparsity {step.break_even:.2f} on"
    )


def _share(step: StepSeconds) -> str:
    return (
        f"attention is {step.attention_share:.0%} of a dense step of {step.step * 1e3:.3g} ms, which limits the "
        f"speed-up to {step.ceiling:.2f}x"
    )


def _calibrate(context: TuningContext) -> TuningResult:
    """Calibrate, and search the sparsest policy with every head's error within `tune.l1` and `tune.pv_l1`."""
    name, bounds = _start(context)
    try:
        step = measure_step(context)
        prepared = prepare(context, probe=False)
        policy = refined_policy(context, prepared.curves)
        if step is not None:
            policy = only_paying_layers(CandidateTable(prepared.curves, Sensitivity()), policy, KernelCost.of(step))
        result = _run_only_trial(context, name, bounds, policy, step)
    except TimeIsUp:
        return TuningResult(name)
    return replace(_with_pairs(result, prepared.curves), calibration_path=prepared.path)


def _run_builtin(context: TuningContext) -> TuningResult:
    """Run SpargeAttn's own search with the bounds `tune.l1` and `tune.pv_l1`."""
    name, bounds = _start(context)
    policy = run_builtin(context)
    return _run_only_trial(context, name, bounds, policy, measure_step(context))


def _start(context: TuningContext) -> tuple[str, dict[str, Parameter]]:
    """Notify listeners of a tuning of one trial; returns its name and parameters."""
    config = context.config
    bounds: dict[str, Parameter] = {"l1": config.tune.l1, "pv_l1": config.tune.pv_l1}
    name = f"{config.model.name}-{config.tune.tuner}-{digest(calibration_signature(context) | bounds)[:8]}"
    context.start(name, storage="", n_trials=1)
    return name, bounds


def _run_only_trial(
    context: TuningContext, name: str, params: Mapping[str, Parameter], policy: Policy, step: StepSeconds | None
) -> TuningResult:
    """Render the one policy; it wins unless nothing ran sparse or, where speed is the goal, dense is faster."""
    trial = TrialRunner.of(context).run(0, params, policy)
    notify(context.listeners, lambda listener: listener.on_trial(trial))
    wins, reason = trial.state == "complete" and bool(trial.sparsity), None
    if step is not None and trial.state == "complete" and not (trial.sparsity and trial.is_faster):
        wins, reason = False, _slower(step, trial, context)
    return TuningResult(name, (trial,), trial if wins else None, step=step, dense_because=reason)


_TUNERS = {"optuna": search_policy, "calibrate": _calibrate, "builtin": _run_builtin}


def tune(
    config: Config,
    *,
    output_dir: Path,
    listeners: Sequence[TuningListener] = (),
    loaded: LoadedModel | None = None,
) -> TuningResult:
    """Find a policy with the configuration's tuner, save it as a checkpoint and evaluate it.

    `optuna` searches for the fastest policy whose videos pass the gate on the tune prompts (the sparsest, where the
    kernel computes every pair; see `--objective`); `calibrate` and `builtin`
    return the policy within `tune.l1` and `tune.pv_l1`. The winner and SpargeAttn's default thresholds are evaluated on
    the eval prompts, which no tuner saw.

    Args:
        config: the configuration; its `tune` section says how to search.
        output_dir: gets `checkpoint/`, the winner's evaluation in `evaluation/`, the defaults' in `before/`, and all
            of the tuning as `tuning.json`.
        listeners: notified of every event, in order.
        loaded: the model that the configuration describes; None loads it.

    Returns:
        All trials and the winner. Where no trial of a search meets the gate there is no winner and nothing is saved;
        `closest` is then the trial that misses it by the least. Ctrl-C while trials run ends the search with the best
        so far. The one policy of the other tuners is the winner whether or not it meets the gate. Of several processes
        on one study and output folder, one saves and evaluates the winner; the others' results name it in `left_to`.

    Raises:
        PromptError, ModelError, BackendError, ExecutorError, TuningError, GenerationError: see their messages.
    """
    if config.tune.tuner == "builtin":
        check_builtin(parallel=config.tune.parallel_tune)
    check_folder(output_dir / _CHECKPOINT)
    check_replaceable(output_dir / RECORD_NAME, '"study_name"')
    clock = PhaseClock()
    lock = WinnerLock(output_dir)
    context = open_context(config, output_dir, (clock, *listeners), loaded)
    clock.restart(context.started)
    try:
        result = _with_evaluation(context, _TUNERS[config.tune.tuner](context), lock)
        result = replace(result, seconds_by_phase=clock.stop())
        if result.left_to is None:
            result = replace(result, record_path=output_dir / RECORD_NAME)
            save_record(TuningRecord.of(result, config), output_dir / RECORD_NAME)
    except BaseException as error:
        failure = error
        context.executor.cancel_all()
        notify(context.listeners, lambda listener: listener.on_failure(failure))
        raise
    finally:
        context.executor.close()
    notify(context.listeners, lambda listener: listener.on_study_end(result))
    return result


def _with_evaluation(context: TuningContext, result: TuningResult, lock: "WinnerLock") -> TuningResult:
    """Add times, incidents and, unless another process of the study does that, the winner's evaluation."""
    result = replace(result, seconds=time.perf_counter() - context.started, incidents=context.executor.incidents)
    if result.best is None or result.left_to:
        return result
    with lock.acquire(result.study_name, result.best.number) as is_ours:
        if not is_ours:
            return replace(result, left_to=f"another process of the study saves and judges it in {context.output_dir}")
        return _evaluated(context, result, result.best)


def _evaluated(context: TuningContext, result: TuningResult, best: TrialResult) -> TuningResult:
    saved = _save(context, result, best)
    notify(context.listeners, lambda listener: listener.on_winner(best, saved))
    before = _evaluate(context, None, "before")
    after = _evaluate(context, best.policy, _EVALUATION, saved, result.hand_set)
    return replace(
        result,
        checkpoint_path=saved,
        before=before,
        evaluation=after,
        comparison=compare(before, after),
        seconds=time.perf_counter() - context.started,
        incidents=context.executor.incidents,
    )


class WinnerLock:
    """An inter-process lock on the winner in an output folder.

    Make it when the search begins: a winner that was evaluated before that is evaluated again, as a user expects of a
    command that is repeated; one that was evaluated since then was evaluated by another process of this search.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = self._stamp()

    @contextlib.contextmanager
    def acquire(self, study_name: str, trial: int) -> Iterator[bool]:
        """Hold the lock, if it is free, and return whether this process has to save and evaluate a trial.

        Raises:
            CacheError: the folder can't be written to.
        """
        with exclusive_if_free(self._folder / _LOCK, setting="--output-dir") as is_free:
            yield is_free and not (self._stamp() != self._before and self._holds(study_name, trial))

    def _holds(self, study_name: str, trial: int) -> bool:
        try:
            settings = load_checkpoint(self._folder / _CHECKPOINT).manifest.tuner_settings
        except CheckpointError:
            return False
        return (settings.get("study_name"), settings.get("trial")) == (study_name, trial)

    def _stamp(self) -> frozenset[tuple[str, int, int]]:
        """Return what changes when an evaluation ends: its result is the last file to be written."""
        found = ((path.name, path.stat()) for path in (self._folder / _EVALUATION).glob("*.json"))
        return frozenset((name, status.st_mtime_ns, status.st_ino) for name, status in found)


def _save(context: TuningContext, result: TuningResult, best: TrialResult) -> Path:
    """Save a trial's policy as a checkpoint and return its folder."""
    config, runtime = context.config, context.runtime
    identity = runtime.identity
    measured = {
        "sparsity": best.sparsity, "psnr": best.psnr, "psnr_worst": best.psnr_worst,
        "frame_cosine": best.frame_cosine, "speedup": best.speedup, "blocks_run": best.blocks_run,
    }  # fmt: skip
    manifest = Manifest(
        tuner=config.tune.tuner,
        base_model=identity.name,
        base_source=identity.source,
        base_revision=identity.revision,
        base_fingerprint=identity.fingerprint,
        base_lora=identity.lora,
        base_lora_scale=identity.lora_scale,
        pipeline_class=identity.pipeline_class,
        transformer_class=identity.transformer_class,
        layers=tuple(LayerShape(name=name, num_heads=heads, head_dim=dim) for name, heads, dim in identity.layers),
        num_frames=config.generation.num_frames,
        height=config.generation.height,
        width=config.generation.width,
        num_inference_steps=config.generation.num_inference_steps,
        guidance_scale=config.generation.guidance_scale,
        guidance_scale_2=config.generation.guidance_scale_2,
        sigmas=config.generation.sigmas,
        dtype=runtime.dtype,
        scheduler=runtime.scheduler,
        flow_shift=identity.flow_shift,
        compile=runtime.compiled,
        kernel=runtime.kernel,
        device=runtime.device_name,
        tuner_settings=config.tune.model_dump(mode="json", exclude={"storage"})
        | {"study_name": result.study_name, "trial": best.number, "params": dict(best.params)},
        search=recorded(config),
        prompts_hash=hash_prompts(context.prompts),
        eval_prompts_hash=hash_prompts(context.eval_prompts),
        seeds=(config.tune.seed,),
        versions=versions(),
        git_commit=git_commit(),
        hand_set=tuple(tuple(pair) for pair in result.hand_set),
        metrics={name: value for name, value in measured.items() if value is not None},
    )
    return save_checkpoint(Checkpoint(best.policy, manifest, result.dial), context.output_dir / _CHECKPOINT)


def _evaluate(
    context: TuningContext,
    policy: Policy | None,
    folder: str,
    checkpoint_path: Path | None = None,
    hand_set: Sequence[Pair] = (),
) -> EvaluationResult:
    """Evaluate a policy, None for SpargeAttn's default thresholds, on the eval prompts, which the search never saw."""
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
        tune_prompts=(*context.prompts, *context.validation_prompts),
        hand_set=hand_set,
    )
