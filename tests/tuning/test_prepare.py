"""Refinement on the demo model: bounds met on every input, results saved to disk and resumed."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparsetune.attention.backends import ReferenceBackend
from sparsetune.attention.handle import kept_blocks
from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import PVTHRESHD_OFF
from sparsetune.attention.unmask import UnmaskedCall
from sparsetune.checkpoint import load_checkpoint
from sparsetune.config import Config
from sparsetune.errors import TuningError
from sparsetune.executor import StepDone, run_one
from sparsetune.models.pipelines import demo_config
from sparsetune.tuning import tune
from sparsetune.tuning.calibration.attention_tap import render_tapped, reordered
from sparsetune.tuning.calibration.bounded_policy import Bounds
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.calibration.refine import RefinedThresholds, RefinePrompt
from sparsetune.tuning.context import TimeIsUp, TuningContext, open_context
from sparsetune.tuning.events import TuningListener, TuningResult
from sparsetune.tuning.prepare import (
    curves_path,
    prepare,
    refined_path,
    refined_policy,
    refinement_start,
    sampled_steps,
)
from sparsetune.tuning.reproduce import config_from_manifest

BOUNDS = Bounds(0.1, 0.12)


def config(folder: Path, **overrides: object) -> Config:
    small = {
        "model.device": "cpu",
        "generation.num_frames": 9,
        "generation.num_inference_steps": 2,
        "tune.tuner": "calibrate",
        "tune.num_prompts": 2,
        "tune.calibration_steps": 1,
        "tune.orders": ("raster", "tiles"),
        "tune.caches": ("none",),
        "tune.l1": BOUNDS.l1,
        "tune.pv_l1": BOUNDS.pv_l1,
        "eval.num_prompts": 1,
        "eval.save_videos": False,
        "gate.min_psnr": 20.0,
        "gate.min_psnr_worst": None,
        "tracking.root": folder / "mlruns",
        "cache.dir": folder / "cache",
    }
    return demo_config(small | {name.replace("__", "."): value for name, value in overrides.items()})


class Recorder(TuningListener):
    """Records the steps."""

    def __init__(self) -> None:
        self.calibrated: list[StepDone] = []
        self.refined: list[StepDone] = []

    def on_step(self, event: StepDone) -> None:
        if event.phase == "calibration":
            self.calibrated.append(event)
        elif event.phase == "refinement":
            self.refined.append(event)


@dataclass(frozen=True)
class Place:
    """A context with calibrated prompts, and the result of their refinement."""

    folder: Path
    context: TuningContext
    curves: Curves
    start: Policy
    policy: Policy
    recorder: Recorder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder, recorder = tmp_path_factory.mktemp("refinement"), Recorder()
    context = open_context(config(folder), folder, (recorder,))
    curves = prepare(context, probe=False).curves
    return Place(folder, context, curves, refinement_start(context, curves), refined_policy(context, curves), recorder)


def test_every_head_holds_both_bounds_on_every_call(place: Place) -> None:
    tensors = [layer.tensors(torch.device("cpu"), select_partial=True) for layer in place.policy.layers]
    sparsities = []

    def look(layer: int, step: int, plain: UnmaskedCall) -> None:
        q, k, v = reordered(plain, place.policy.orders[layer])
        dense = F.scaled_dot_product_attention(q, k, v, scale=plain.scale)
        backend = ReferenceBackend()
        keep = kept_blocks(True, plain.layout, backend.blocks)
        off = replace(tensors[layer], pvthreshd=torch.full_like(tensors[layer].pvthreshd, PVTHRESHD_OFF))
        for thresholds, bound in ((off, BOUNDS.l1), (tensors[layer], BOUNDS.pv_l1)):
            attended = backend.attend(q, k, v, thresholds, scale=plain.scale, keep=keep)
            error = (attended.output - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
            assert error.max() <= bound * 1.001
        num_q, num_k = backend.blocks.counts(q.shape[-2], k.shape[-2])
        sparsities.append(1 - attended.computed / (q.shape[0] * num_q * num_k))

    for prompt in place.context.prompts:
        render_tapped(
            place.context.renderer, prompt, 42, look, steps=sampled_steps(place.context), backend=ReferenceBackend()
        )
    assert len(sparsities) == 2 * 8
    assert torch.stack(sparsities).mean() > 0.02


def test_orders_and_similarity_thresholds_are_those_of_the_start(place: Place) -> None:
    assert place.policy.orders == place.start.orders and place.policy.select_partial and place.policy.keep_text
    for layer, start in zip(place.policy.layers, place.start.layers, strict=True):
        for head, begun in zip(layer.heads, start.heads, strict=True):
            assert not head.is_sparse or head.simthreshd1 == begun.simthreshd1
    heads = [head for layer in place.policy.layers for head in layer.heads if head.is_sparse]
    assert any(head.pvthreshd < PVTHRESHD_OFF for head in heads)
    assert len({head.cdfthreshd for head in heads}) > 0.9 * len(heads)


def test_steps_are_told_and_the_limits_kept(place: Place) -> None:
    assert place.recorder.refined == [
        StepDone("refinement", "dense", step, 2, prompt, 2, worker=place.context.executor.workers[0])
        for prompt in (0, 1)
        for step in (1, 2)
    ]
    limits = RefinedThresholds.load(refined_path(place.context, place.start))
    assert limits.num_inputs == 2 and limits.policy(place.start) == place.policy
    assert refined_path(place.context, place.start).parent.parent == curves_path(place.context).parent
    assert [path.suffixes for path in refined_path(place.context, place.start).parent.iterdir()] == [[".npz"]]


def context_at(place: Place, root: Path, *listeners: TuningListener, **changes: float) -> TuningContext:
    """The same context with a separate cache for measurements, and the first one's curves."""
    tuned = place.context.config
    tuned = tuned.model_copy(
        update={
            "tracking": tuned.tracking.model_copy(update={"root": root}),
            "tune": tuned.tune.model_copy(update=changes),
        }
    )
    return replace(place.context, config=tuned, listeners=listeners)


def searched(context: TuningContext, start: Policy, index: int, bounds: Bounds = BOUNDS) -> RefinedThresholds:
    """A worker's result for one prompt."""
    return run_one(
        context.executor, RefinePrompt(context.prompts[index], 42, start, bounds, sampled_steps(context), "reference")
    )


@pytest.mark.slow
def test_prompts_that_others_did_in_any_order_are_gone_on_with_to_the_same_end(place: Place, tmp_path: Path) -> None:
    recorder = Recorder()
    context = context_at(place, tmp_path, recorder)
    path = refined_path(context, place.start)
    path.parent.mkdir(parents=True)
    second = searched(context, place.start, 1)
    second.save(path.with_suffix(".1.npz"))
    assert refined_policy(context, place.curves) == place.policy != second.policy(place.start)
    assert {event.index for event in recorder.refined} == {0}
    assert [each.suffixes for each in path.parent.iterdir()] == [[".npz"]]


def test_a_damaged_part_says_what_to_do(place: Place, tmp_path: Path) -> None:
    context = context_at(place, tmp_path)
    path = refined_path(context, place.start)
    path.parent.mkdir(parents=True)
    for part in ("0", "1"):
        path.with_suffix(f".{part}.npz").write_bytes(b"nothing")
    with pytest.raises(TuningError, match=r"cannot read the thresholds .*\.0\.npz .*; remove it to search them again"):
        refined_policy(context, place.curves)


def test_no_time_is_told(place: Place, tmp_path: Path) -> None:
    with pytest.raises(TimeIsUp):
        refined_policy(context_at(place, tmp_path, max_minutes=1e-6), place.curves)


def test_all_that_decides_the_limits_is_in_their_name(place: Place, tmp_path: Path) -> None:
    path = refined_path(context_at(place, tmp_path), place.start)
    in_order_of_policy = tuple(replace(layer, order=None) for layer in place.start.layers)
    others = [
        refined_path(context_at(place, tmp_path, l1=0.09), place.start),
        refined_path(context_at(place, tmp_path, pv_l1=0.13), place.start),
        refined_path(context_at(place, tmp_path), replace(place.start, keep_text=False)),
        refined_path(context_at(place, tmp_path), replace(place.start, order="hilbert", layers=in_order_of_policy)),
    ]
    assert len({path, *others}) == 5
    assert refined_path(context_at(place, tmp_path), place.start) == path


@pytest.mark.slow
def test_a_larger_bound_leaves_more_out(place: Place) -> None:
    limits = searched(place.context, place.start, 0, Bounds(0.2, 0.25))
    kept = RefinedThresholds.load(refined_path(place.context, place.start))
    there = np.isfinite(kept.mask_threshold)
    assert (limits.mask_threshold <= kept.mask_threshold)[there].all()
    assert (limits.mask_threshold < kept.mask_threshold)[there].mean() > 0.9


@dataclass(frozen=True)
class Tuned:
    folder: Path
    recorder: Recorder
    result: TuningResult


@pytest.fixture(scope="module")
def tuned(place: Place) -> Tuned:
    """A tuning that goes on from the place's measurements."""
    folder, recorder = place.folder / "tuned", Recorder()
    return Tuned(folder, recorder, tune(config(place.folder), output_dir=folder, listeners=(recorder,)))


@pytest.mark.slow
def test_the_tuner_renders_saves_and_judges_it(place: Place, tuned: Tuned) -> None:
    recorder, result = tuned.recorder, tuned.result
    assert not recorder.calibrated and not recorder.refined  # both are stored
    assert [trial.params for trial in result.trials] == [{"l1": 0.1, "pv_l1": 0.12}]
    assert result.best.sparsity > 0 and result.evaluation is not None
    saved = load_checkpoint(tuned.folder / "checkpoint")
    assert saved.policy == place.policy == result.best.policy
    assert (saved.manifest.search["tune"]["l1"], saved.manifest.tuner_settings["pv_l1"]) == (0.1, 0.12)
    assert result.calibration_path == curves_path(place.context)


def test_a_search_with_optuna_uses_the_same_curves(place: Place) -> None:
    searching = config(place.folder, tune__tuner="optuna")
    context = replace(place.context, config=searching)
    assert curves_path(context) == curves_path(place.context)


@pytest.mark.slow
def test_the_search_repeated_from_its_manifest_finds_the_same_policy(
    place: Place, tuned: Tuned, tmp_path: Path
) -> None:
    again = config_from_manifest(tuned.folder / "checkpoint", config(tmp_path))
    assert again.tracking.root == tmp_path / "mlruns"
    assert tune(again, output_dir=tmp_path / "again").best.policy == place.policy
