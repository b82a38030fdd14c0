"""Estimate of what each tuner costs, in renderings, seconds and memory, before a search starts."""

from dataclasses import dataclass

from sparsetune.attention.backends import skips_work
from sparsetune.attention.device import device_name
from sparsetune.attention.step_cache import CacheKind
from sparsetune.config import Config, EngineConfig
from sparsetune.config.models import Tuner
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.evaluation.evaluate import JUDGED_STEPS
from sparsetune.executor import Phase
from sparsetune.models.generation import TIMED_STEPS
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.calibration.sensitivity import count_phases
from sparsetune.tuning.calibration.step_caches import PROBE_STEPS
from sparsetune.tuning.context import TuningContext, open_context
from sparsetune.tuning.prepare import NUM_TIMED_STEPS, curves_path, refined_path, refinement_start, sampled_steps
from sparsetune.tuning.search.space import num_groups
from sparsetune.tuning.step_costs import StepCosts, measure_costs

KERNEL_CALLS_PER_HEAD = 465
"""Calls of SpargeAttn's search for a head, at one attention call: 437 to 494 were counted at CogVideoX-2b's shape."""


@dataclass(frozen=True)
class Workload:
    """Amount of work of a tuning."""

    num_steps: int
    num_prompts: int
    num_eval_prompts: int
    n_trials: int
    num_groups: int  # of layers with a sensitivity of their own; a single one is not probed
    calibration_steps: int  # denoising steps at which every attention call is measured
    num_validation_prompts: int  # at least one of the best trials renders them
    probe_prompts: int  # prompts on which each part of the generation, and each group of layers, is probed
    eval_cached: int = 0  # eval prompts whose dense video is in the cache
    curves_kept: bool = False  # whether the calibrated curves of an earlier run are on disk
    limits_kept: bool = False  # whether its refined thresholds are, too
    skips_work: bool = False  # whether the kernel does, so that sparse renderings are timed beside dense steps
    caches: tuple[CacheKind, ...] = ()  # step caches that optuna searches


@dataclass(frozen=True)
class PhaseCost:
    name: Phase
    num_renderings: int
    seconds: float | None  # None where they can't be measured here


@dataclass(frozen=True)
class TunerCost:
    tuner: Tuner
    phases: tuple[PhaseCost, ...]  # in order
    peak_memory_gib: float
    note: str = ""  # on the figures

    @property
    def num_renderings(self) -> int:
        return sum(phase.num_renderings for phase in self.phases)

    @property
    def seconds(self) -> float | None:
        """Seconds in total; None where a phase's are unknown."""
        known = [phase.seconds for phase in self.phases if phase.seconds is not None]
        return sum(known) if len(known) == len(self.phases) else None


@dataclass(frozen=True)
class Cost:
    """Measured costs of a step, and the estimate for each tuner."""

    model: str
    device: str
    backend: str
    measured: StepCosts
    workload: Workload
    tuners: tuple[TunerCost, ...]  # calibrate, optuna and builtin
    max_minutes: float | None = None  # the configuration's time limit


def estimate(config: Config) -> Cost:
    """Load the model, measure a few steps of it, and estimate the cost of each tuner.

    Two short renderings are made, one dense and one sparse with SpargeAttn's default thresholds, and one attention call
    is calibrated; nothing is saved.
    """
    local = config.model_copy(update={"engine": EngineConfig()})  # the steps of one worker, in this process
    context = open_context(local, config.model.results_folder)
    measured, work = measure_costs(context), workload(context)
    loaded = context.renderer.loaded
    return Cost(
        model=loaded.identity.name,
        device=device_name(loaded.device),
        backend=context.backend.name,
        measured=measured,
        workload=work,
        tuners=plan(measured, work),
        max_minutes=config.tune.max_minutes,
    )


def workload(context: TuningContext) -> Workload:
    """Count the work that is left; only the headers of cached videos are read."""
    config = context.config
    cached = {entry.digest for entry in context.cache.ls()}
    keys = [baseline_key(context.renderer, prompt, config.eval.seed) for prompt in context.eval_prompts]
    curves = curves_path(context)
    start = refinement_start(context, Curves.load(curves)) if curves.is_file() else None
    return Workload(
        num_steps=config.generation.num_inference_steps,
        num_prompts=len(context.prompts),
        num_eval_prompts=len(context.eval_prompts),
        num_validation_prompts=len(context.validation_prompts),
        n_trials=config.tune.n_trials,
        num_groups=num_groups(config.tune.granularity, len(context.renderer.loaded.identity.layers)),
        calibration_steps=len(sampled_steps(context)),
        probe_prompts=len(context.probe_prompts),
        eval_cached=sum(key.digest in cached for key in keys),
        curves_kept=start is not None,
        limits_kept=start is not None and refined_path(context, start).is_file(),
        skips_work=skips_work(context.backend.name),
        caches=context.cache_kinds,
    )


def plan(costs: StepCosts, work: Workload) -> tuple[TunerCost, ...]:
    """Cost of each tuner: renderings times their seconds. SpargeAttn's own search counts as calibration."""
    beside = (TIMED_STEPS + 1) * costs.dense_step  # dense steps that are timed before a rendering
    sparse_seconds = costs.sparse(work.num_steps) + (beside if work.skips_work else 0.0)

    def phase(name: Phase, dense: int = 0, sparse: int = 0, more_seconds: float = 0.0) -> PhaseCost:
        seconds = dense * costs.dense(work.num_steps) + sparse * sparse_seconds
        return PhaseCost(name, dense + sparse, seconds + more_seconds)

    def measuring(name: Phase, kept: bool, seconds_per_call: float) -> PhaseCost:
        prompts = 0 if kept else work.num_prompts
        return phase(name, prompts, 0, prompts * work.calibration_steps * costs.calls_per_step * seconds_per_call)

    calibration = measuring("calibration", work.curves_kept, costs.measure)
    refinement = measuring("refinement", work.limits_kept, costs.refine)
    # The probes of each kind, parts of the generation or groups of layers, add up to one sparse rendering a prompt.
    kinds = [count_phases(work.num_steps), *([work.num_groups] if work.num_groups > 1 else [])]
    probes, sparse_probes = work.probe_prompts * sum(kinds), work.probe_prompts * len(kinds)
    sensitivity = phase("sensitivity", probes - sparse_probes, sparse_probes)
    trials = phase("trials", 0, work.num_prompts)
    # Dense where the cache lacks it, with SpargeAttn's default thresholds and with the winner's.
    judged = 2 * work.num_eval_prompts
    timed = 2 * JUDGED_STEPS * costs.dense_step if work.skips_work else 0.0
    evaluation = phase("evaluation", work.num_eval_prompts - work.eval_cached, judged, judged * costs.judge + timed)
    timing = NUM_TIMED_STEPS * costs.dense_step if work.skips_work else 0.0
    preparation = (PhaseCost("preparation", 0, timing),) if work.skips_work else ()
    calls = KERNEL_CALLS_PER_HEAD * round(costs.head_calls_per_step) * work.num_steps * work.num_prompts
    note = f"{calls:,} kernel calls for one head each"
    if costs.kernel_call is None:
        note += f"; their time is unknown, since {costs.no_kernel}"
        search = PhaseCost("calibration", work.num_prompts, None)
    else:
        search = phase("calibration", work.num_prompts, 0, calls * costs.kernel_call)
    builtin = (*preparation, search, trials, evaluation)
    calibrate = (*preparation, calibration, refinement, trials, evaluation)
    renderings = work.n_trials * work.num_prompts
    validated = work.num_validation_prompts
    validation = phase("validation", validated, validated)
    search_phases: tuple[PhaseCost, ...] = (calibration, sensitivity, phase("trials", 0, renderings))
    if work.caches:
        timing += len(work.caches) * costs.dense(PROBE_STEPS)
        preparation = (phase("preparation", int("mag" in work.caches), 0, timing),)
        if not work.skips_work:  # only caches are searched; the prompts' dense videos are rendered by the first trial
            search_phases = (phase("trials", work.num_prompts + renderings, 0, renderings * beside),)
            validation = phase("validation", 2 * validated, 0, validated * beside)
    optuna = (*preparation, *search_phases, *([validation] if validated else []), evaluation)
    rendering_peak = max(costs.peak_dense_gib, costs.peak_sparse_gib)
    peak = max(rendering_peak, costs.peak_measure_gib)
    return (
        TunerCost("calibrate", calibrate, peak),
        TunerCost(
            "optuna",
            optuna,
            peak,
            f"an upper bound, since {'caches skip steps and ' if work.caches else ''}unpromising trials are pruned",
        ),
        TunerCost("builtin", builtin, rendering_peak, note),
    )
