"""What a search will cost, known before it is begun."""

from dataclasses import dataclass

from sparsetune.attention.device import device_name
from sparsetune.config import Config, EngineConfig
from sparsetune.config.models import Tuner
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.calibration.sensitivity import count_phases
from sparsetune.tuning.context import TuningContext, open_context
from sparsetune.tuning.prepare import curves_path, sampled_steps
from sparsetune.tuning.refinement import limits_path, start_of
from sparsetune.tuning.search.space import num_groups
from sparsetune.tuning.step_costs import StepCosts, measure_costs

KERNEL_CALLS_PER_HEAD = 465
"""Calls of SpargeAttn's search for a head, at one attention call: 437 to 494 were counted at CogVideoX-2b's shape."""


@dataclass(frozen=True)
class Workload:
    """How much a search does.

    Args:
        num_steps: denoising steps of a rendering.
        num_prompts, num_eval_prompts: prompts.
        n_trials: trials that an optuna search has at most.
        num_groups: groups of layers whose sensitivity is told apart; one is not probed.
        calibration_steps: denoising steps at which every attention call is measured.
        probe_prompts: prompts on which each part of the generation, and each group of layers, is tried alone.
        eval_cached: eval prompts whose dense video is in the cache.
        curves_kept: whether an earlier run has left the calibrated curves.
        limits_kept: whether it has left what each head's thresholds were searched to be, too.
    """

    num_steps: int
    num_prompts: int
    num_eval_prompts: int
    n_trials: int
    num_groups: int
    calibration_steps: int
    probe_prompts: int
    eval_cached: int = 0
    curves_kept: bool = False
    limits_kept: bool = False


@dataclass(frozen=True)
class Phase:
    """A part of a search: its renderings, and its seconds; None where they can't be told here."""

    name: str
    num_renderings: int
    seconds: float | None


@dataclass(frozen=True)
class TunerCost:
    """What a tuner costs.

    Args:
        tuner: as `--tuner` takes it.
        phases: in order.
        peak_memory_gib: the most memory held at a time.
        note: what the figures don't say; empty where there is nothing.
    """

    tuner: Tuner
    phases: tuple[Phase, ...]
    peak_memory_gib: float
    note: str = ""

    @property
    def num_renderings(self) -> int:
        """Renderings in all."""
        return sum(phase.num_renderings for phase in self.phases)

    @property
    def seconds(self) -> float | None:
        """Seconds in all; None where a phase's can't be told."""
        known = [phase.seconds for phase in self.phases if phase.seconds is not None]
        return sum(known) if len(known) == len(self.phases) else None


@dataclass(frozen=True)
class Cost:
    """What was measured, and what each tuner would cost.

    Args:
        model, device, backend: what it was measured with.
        measured: the costs of one step.
        workload: how much is to be done.
        tuners: calibrate, optuna and builtin.
        max_minutes: the configuration's bound on the search; None without one.
    """

    model: str
    device: str
    backend: str
    measured: StepCosts
    workload: Workload
    tuners: tuple[TunerCost, ...]
    max_minutes: float | None = None


def estimate(config: Config) -> Cost:
    """Load the model, measure a few steps of it, and say what each tuner would cost.

    Two short renderings are made, one dense and one sparse by SpargeAttn's default thresholds, besides one attention
    call that is measured as calibration does; nothing is kept of them.

    Raises:
        PromptError, ModelError, BackendError, TuningError, GenerationError: what was asked for can't be done.
    """
    alone = config.model_copy(update={"engine": EngineConfig()})  # one worker's steps are measured, in this process
    bench = open_context(alone, config.model.results_folder)
    measured = measure_costs(bench)
    work = workload(bench)
    return Cost(
        model=bench.renderer.loaded.identity.name,
        device=device_name(bench.renderer.loaded.device),
        backend=bench.backend.name,
        measured=measured,
        workload=work,
        tuners=plan(measured, work),
        max_minutes=config.tune.max_minutes,
    )


def workload(bench: TuningContext) -> Workload:
    """Count what a search of this configuration does; of the cache only the headers are read."""
    config = bench.config
    kept = {entry.digest for entry in bench.cache.ls() if entry.info is not None}
    keys = [baseline_key(bench.renderer, prompt, config.eval.seed) for prompt in bench.eval_prompts]
    num_steps, curves = config.generation.num_inference_steps, curves_path(bench)
    return Workload(
        num_steps=num_steps,
        num_prompts=len(bench.prompts),
        num_eval_prompts=len(bench.eval_prompts),
        n_trials=config.tune.n_trials,
        num_groups=num_groups(config.tune.granularity, len(bench.renderer.loaded.identity.layers)),
        calibration_steps=len(sampled_steps(bench)),
        probe_prompts=len(bench.probe_prompts),
        eval_cached=sum(key.digest in kept for key in keys),
        curves_kept=curves.is_file(),
        limits_kept=curves.is_file() and limits_path(bench, start_of(bench, Curves.load(curves))).is_file(),
    )


def plan(costs: StepCosts, work: Workload) -> tuple[TunerCost, ...]:
    """Work out what each tuner costs: renderings times steps times the seconds of a step.

    A dense rendering costs `fixed + num_steps · dense_step`, a sparse one the same with `sparse_step`. Probes of the
    generation's parts run one part of it sparse each, so that all of them together are as one sparse rendering and the
    rest dense; those of the groups of layers likewise.
    """
    evaluation = _evaluation(costs, work)
    trials = work.n_trials * work.num_prompts
    largest = max(costs.peak_dense_gib, costs.peak_sparse_gib, costs.peak_measure_gib)
    calibrate = (
        _measured("calibration", costs, work, work.curves_kept, costs.measure),
        _measured("refinement", costs, work, work.limits_kept, costs.refine),
        Phase("trials", work.num_prompts, work.num_prompts * costs.sparse(work.num_steps)),
        evaluation,
    )
    optuna = (
        _measured("calibration", costs, work, work.curves_kept, costs.measure),
        _sensitivity(costs, work),
        Phase("trials", trials, trials * costs.sparse(work.num_steps)),
        evaluation,
    )
    calls = KERNEL_CALLS_PER_HEAD * round(costs.head_calls_per_step) * work.num_steps * work.num_prompts
    rendering = work.num_prompts * costs.dense(work.num_steps)
    search = None if costs.kernel_call is None else rendering + calls * costs.kernel_call
    builtin = (
        Phase("calibration", work.num_prompts, search),
        Phase("trials", work.num_prompts, work.num_prompts * costs.sparse(work.num_steps)),
        evaluation,
    )
    note = f"{calls:,} kernel calls for one head each"
    if costs.kernel_call is None:
        note += f"; their time can't be told here, since {costs.no_kernel}"
    return (
        TunerCost("calibrate", calibrate, largest),
        TunerCost("optuna", optuna, largest, "this is the most, since hopeless trials are given up early"),
        TunerCost("builtin", builtin, max(costs.peak_dense_gib, costs.peak_sparse_gib), note),
    )


def _measured(name: str, costs: StepCosts, work: Workload, kept: bool, seconds: float) -> Phase:
    """The tune prompts dense, with so many seconds for each attention call of the sampled steps."""
    if kept:
        return Phase(name, 0, 0.0)
    calls = work.num_prompts * work.calibration_steps * costs.calls_per_step
    return Phase(name, work.num_prompts, work.num_prompts * costs.dense(work.num_steps) + calls * seconds)


def _sensitivity(costs: StepCosts, work: Workload) -> Phase:
    phases = count_phases(work.num_steps)
    kinds = [phases, work.num_groups] if work.num_groups > 1 else [phases]
    sparse = work.probe_prompts * len(kinds)
    total = work.probe_prompts * sum(kinds)
    seconds = sparse * costs.sparse(work.num_steps) + (total - sparse) * costs.dense(work.num_steps)
    return Phase("sensitivity", total, seconds)


def _evaluation(costs: StepCosts, work: Workload) -> Phase:
    """The eval prompts dense, where the cache lacks them, with SpargeAttn's default thresholds and the winner's."""
    dense, sparse = work.num_eval_prompts - work.eval_cached, 2 * work.num_eval_prompts
    seconds = dense * costs.dense(work.num_steps) + sparse * costs.sparse(work.num_steps)
    return Phase("evaluation", dense + sparse, seconds)
