"""Cost estimates of a search: computed from known numbers, and measured on the demo model."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsetune.attention.backends import Backend
from sparsetune.attention.interception import AttentionCall
from sparsetune.cli.tune import cost_dict, cost_text
from sparsetune.errors import PromptError, TuningError
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.evaluation.evaluate import JUDGED_STEPS
from sparsetune.models.pipelines import demo_config
from sparsetune.tuning import step_costs
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.calibration.refine import RefinedThresholds
from sparsetune.tuning.context import TuningContext, open_context
from sparsetune.tuning.cost_estimate import Cost, PhaseCost, Workload, estimate, plan, workload
from sparsetune.tuning.prepare import NUM_TIMED_STEPS, curves_path, refined_path, refinement_start
from sparsetune.tuning.step_costs import StepCosts, measure_costs

COSTS = StepCosts(
    dense_step=2.0,
    sparse_step=1.0,
    fixed=10.0,
    calls_per_step=30.0,
    head_calls_per_step=900.0,
    measure=0.5,
    refine=1.5,
    judge=4.0,
    peak_dense_gib=20.0,
    peak_sparse_gib=21.0,
    peak_measure_gib=23.0,
    kernel_call=0.002,
)
WORK = Workload(
    num_steps=50,
    num_prompts=4,
    num_eval_prompts=5,
    n_trials=40,
    num_groups=3,
    calibration_steps=6,
    num_validation_prompts=3,
    probe_prompts=2,
    eval_cached=2,
)
# A dense rendering takes 110 s, a sparse one 60 s; measuring a prompt 6 x 30 calls.
EVALUATION = PhaseCost("evaluation", 3 + 10, 3 * 110.0 + 10 * (60.0 + 4.0))


def test_calibrate_renders_the_tune_prompts_twice_dense_and_then_once_sparse() -> None:
    calibrate = plan(COSTS, WORK)[0]
    assert calibrate.tuner == "calibrate"
    assert calibrate.phases == (
        PhaseCost("calibration", 4, 4 * (110.0 + 180 * 0.5)),
        PhaseCost("refinement", 4, 4 * (110.0 + 180 * 1.5)),
        PhaseCost("trials", 4, 4 * 60.0),
        EVALUATION,
    )
    assert calibrate.num_renderings == 25
    assert calibrate.seconds == 800.0 + 1520.0 + 240.0 + 970.0
    assert calibrate.peak_memory_gib == 23.0


def test_optuna_probes_and_renders_every_trial() -> None:
    optuna = plan(COSTS, WORK)[1]
    assert optuna.phases == (
        PhaseCost("calibration", 4, 4 * (110.0 + 180 * 0.5)),
        # 10 phases and 3 groups, each kind adding up to one sparse rendering a prompt.
        PhaseCost("sensitivity", 26, 4 * 60.0 + 22 * 110.0),
        PhaseCost("trials", 160, 160 * 60.0),
        PhaseCost("validation", 6, 3 * (110.0 + 60.0)),
        EVALUATION,
    )
    assert optuna.note == "an upper bound, since unpromising trials are pruned"


@pytest.mark.parametrize(
    ("changed", "renderings", "seconds"),
    [
        ({"num_groups": 1}, 20, 2 * 60.0 + 18 * 110.0),
        ({"num_groups": 30}, 80, 4 * 60.0 + 76 * 110.0),
        ({"probe_prompts": 0}, 0, 0.0),
    ],
)
def test_only_what_is_probed_costs(changed: dict[str, int], renderings: int, seconds: float) -> None:
    assert plan(COSTS, replace(WORK, **changed))[1].phases[1] == PhaseCost("sensitivity", renderings, seconds)


def test_where_the_kernel_skips_work_a_step_is_timed_first() -> None:
    for tuner in plan(COSTS, replace(WORK, skips_work=True)):
        assert tuner.phases[0] == PhaseCost("preparation", 0, NUM_TIMED_STEPS * 2.0)
        assert tuner.phases[-1].seconds == 3 * 110.0 + 10 * (60.0 + 5 * 2.0 + 4.0) + 2 * JUDGED_STEPS * 2.0


def test_caches_are_probed_and_searched_alone_where_the_kernel_skips_nothing() -> None:
    calibrate, optuna, _ = plan(COSTS, replace(WORK, caches=("mag", "taylorseer")))
    assert calibrate == plan(COSTS, WORK)[0]
    assert optuna.phases == (
        PhaseCost("preparation", 1, 110.0 + 2 * (10.0 + 5 * 2.0)),  # MagCache's calibration; two short renderings
        PhaseCost("trials", 4 + 160, 4 * 110.0 + 160 * (110.0 + 5 * 2.0)),
        PhaseCost("validation", 6, 3 * (2 * 110.0 + 5 * 2.0)),
        EVALUATION,
    )
    assert optuna.note == "an upper bound, since caches skip steps and unpromising trials are pruned"


def test_caches_are_searched_together_with_sparsity_where_the_kernel_skips_work() -> None:
    without, together = (plan(COSTS, replace(WORK, skips_work=True, caches=kinds))[1] for kinds in ((), ("mag",)))
    assert [phase.name for phase in together.phases] == [
        "preparation",
        "calibration",
        "sensitivity",
        "trials",
        "validation",
        "evaluation",
    ]
    assert together.phases[1:] == without.phases[1:]
    assert together.phases[0] == PhaseCost("preparation", 1, NUM_TIMED_STEPS * 2.0 + 110.0 + 20.0)


def test_curves_and_limits_that_are_kept_cost_nothing() -> None:
    calibrate, optuna, _ = plan(COSTS, replace(WORK, curves_kept=True))
    assert calibrate.phases == (PhaseCost("calibration", 0, 0.0), *plan(COSTS, WORK)[0].phases[1:])
    assert optuna.phases == (PhaseCost("calibration", 0, 0.0), *plan(COSTS, WORK)[1].phases[1:])
    calibrate = plan(COSTS, replace(WORK, curves_kept=True, limits_kept=True))[0]
    assert calibrate.phases[:2] == (PhaseCost("calibration", 0, 0.0), PhaseCost("refinement", 0, 0.0))


def test_builtin_costs_its_kernel_calls() -> None:
    builtin = plan(COSTS, WORK)[2]
    calls = 465 * 900 * 50 * 4
    assert builtin.phases[0] == PhaseCost("calibration", 4, 4 * 110.0 + calls * 0.002)
    assert 44 < builtin.seconds / 3600 < 48
    assert builtin.note == "83,700,000 kernel calls for one head each"
    assert builtin.peak_memory_gib == 21.0


def test_where_the_kernel_cant_run_the_calls_are_told_and_not_their_time() -> None:
    builtin = plan(replace(COSTS, kernel_call=None, no_kernel="the model is on cpu"), WORK)[2]
    assert builtin.seconds is None
    assert builtin.note == (
        "83,700,000 kernel calls for one head each; their time is unknown, since the model is on cpu"
    )


def test_the_text_has_a_line_for_each_tuner_and_phase() -> None:
    measured = replace(COSTS, kernel_call=None, no_kernel="the model is on cpu")
    cost = Cost("cogvideox-2b", "a GPU", "sparge", measured, WORK, plan(measured, WORK), max_minutes=90.0)
    lines = cost_text(cost).splitlines()
    assert lines[0] == (
        "cogvideox-2b on a GPU, backend sparge: 2 s a dense step, 1 s a sparse step, 10 s a rendering for the rest; "
        "50 steps"
    )
    cells = {line.split("  ")[0] if line[:1] != " " else line.strip().split("  ")[0]: line.split() for line in lines}
    assert cells["optuna"][1:] == ["209", "4:02:20", "23.0", "GiB"]
    assert ["trials", "160", "2:40:00"] in [line.split() for line in lines]
    assert cells["builtin"][1:] == ["21", "-", "21.0", "GiB"]
    assert lines[-1] == "--max-minutes 90 ends a search earlier, with the best so far"
    value = json.loads(json.dumps(cost_dict(cost)))
    assert [tuner["seconds"] for tuner in value["tuners"]] == [3530.0, 14540.0, None]
    assert value["measured"]["fixed"] == 10.0
    assert value["workload"]["eval_cached"] == 2


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> TuningContext:
    folder = tmp_path_factory.mktemp("cost")
    small = {"generation.num_frames": 9, "generation.num_inference_steps": 3, "model.device": "cpu"}
    few = {"tune.num_prompts": 2, "eval.num_prompts": 2, "tune.orders": ("raster",), "tune.caches": ("none",)}
    places = {"cache.dir": folder / "cache", "tracking.root": folder / "mlruns"}
    return open_context(demo_config(small | few | places), folder)


def test_steps_and_calls_of_the_demo_model_are_measured(context: TuningContext) -> None:
    started = time.perf_counter()
    measured = measure_costs(context)
    spent = time.perf_counter() - started
    assert measured.calls_per_step == 8.0
    assert measured.head_calls_per_step == 24.0
    for seconds in (measured.dense_step, measured.sparse_step, measured.measure, measured.refine):
        assert 0.0 < seconds < spent
    assert measured.dense(3) + measured.sparse(3) < 1.5 * spent
    assert 0.1 < measured.peak_dense_gib < 16.0
    assert (measured.kernel_call, measured.no_kernel) == (None, "the model is on cpu")
    assert not any("forward" in vars(module) for module in context.renderer.loaded.pipe.transformer.modules())


def smooth_curves(context: TuningContext) -> Curves:
    """Arbitrary curves of the context's layers."""
    shape = (len(context.arrangements), len(context.runtime.layers), 3, 3)
    error = np.broadcast_to(np.linspace(1.0, 0.0, len(context.points)), (*shape, len(context.points))).astype(
        np.float32
    )
    size = np.ones(shape[1:], np.float32)
    return Curves(
        context.runtime.layers, context.arrangements, (0, 1, 2), 3, context.points, error, error, error, size, 2, True
    )  # fmt: skip


def test_what_earlier_runs_kept_is_found(context: TuningContext) -> None:
    before = workload(context)
    assert (before.num_eval_prompts, before.eval_cached) == (2, 0)
    assert (before.num_steps, before.num_prompts, before.calibration_steps) == (3, 2, 3)
    frames = torch.zeros(9, 64, 64, 3, dtype=torch.uint8).numpy()
    context.cache.put(baseline_key(context.renderer, context.eval_prompts[1], context.config.eval.seed), frames, 1.0)
    assert workload(context).eval_cached == 1
    assert (before.curves_kept, before.limits_kept) == (False, False)
    curves = smooth_curves(context)
    curves.save(curves_path(context))
    assert (workload(context).curves_kept, workload(context).limits_kept) == (True, False)
    RefinedThresholds.zeros(curves.layers).save(refined_path(context, refinement_start(context, curves)))
    assert workload(context).limits_kept


def test_a_model_without_a_call_to_measure_is_said(context: TuningContext, monkeypatch: pytest.MonkeyPatch) -> None:
    unmasked_call = step_costs.unmasked_call

    def causal(call: AttentionCall, backend: Backend) -> object:
        return unmasked_call(replace(call, is_causal=True), backend)

    monkeypatch.setattr(step_costs, "unmasked_call", causal)
    with pytest.raises(TuningError, match="none of its attention calls can run sparse: the call is causal"):
        measure_costs(context)


def test_an_estimate_begins_as_a_search_does(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="backend is dense; use --backend auto"):
        estimate(demo_config({"backend": "dense"}))
    with pytest.raises(PromptError, match="the number of prompts must be from 1"):
        estimate(demo_config({"tune.num_prompts": 0}))
