"""Policies for other budgets from the calibration in a checkpoint."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest

from sparsetune import sparsify
from sparsetune.api import TunedCheckpoint
from sparsetune.attention.step_cache import StepCache
from sparsetune.bench.step_time import StepSeconds
from sparsetune.checkpoint import Manifest
from sparsetune.errors import CheckpointError
from sparsetune.tuning.calibration.curves import Arrangement, Curves, grid
from sparsetune.tuning.calibration.sensitivity import Sensitivity
from sparsetune.tuning.dial import Dial, dial_of
from tests.tuning.tables import LAYERS, curves, smooth

PARAMS = {"order": "best", "rule": "cdf", "keep_text": True, "steepness": 0.2, "dense_fraction": 0.1, "weight_01": 1.5}
MEASURED = [(error, 20.0 - 20.0 * math.log10(error)) for error in (0.01, 0.02, 0.05, 0.1)]


def dial(table: Curves, step: StepSeconds | None = None) -> Dial:
    sensitivity = Sensitivity((2.0, 0.5), (1.0, 1.0))
    return dial_of(table, sensitivity, step, PARAMS, MEASURED, ("raster", "tiles"))


def checkpoint(table: Curves) -> TunedCheckpoint:
    made = dial(table)
    manifest = Manifest(tuner="optuna", metrics={"psnr": 40.0})
    return TunedCheckpoint(made.policy(budget=0.02), manifest, made.to_bytes())


def test_what_is_saved_is_what_is_read_but_for_eight_bits() -> None:
    saved = dial(curves())
    read = Dial.from_bytes(saved.to_bytes())
    rest = {"curves", "_candidates"}
    assert {k: v for k, v in vars(read).items() if k not in rest} == {
        k: v for k, v in vars(saved).items() if k not in rest
    }
    there = ~np.isnan(saved.curves.error_rms)
    assert np.array_equal(there, ~np.isnan(read.curves.error_rms))
    np.testing.assert_allclose(read.curves.error_rms[there], saved.curves.error_rms[there], rtol=0.029)
    np.testing.assert_allclose(read.curves.sparsity[there], saved.curves.sparsity[there], atol=0.002)
    np.testing.assert_array_equal(read.curves.size, saved.curves.size)


@pytest.mark.parametrize("value", [0.0, np.inf, 1e-9, 1e4])
def test_extreme_errors_stay_extreme(value: float) -> None:
    table = smooth()
    read = Dial.from_bytes(dial(replace(table, error_rms=np.full_like(table.error_rms, value))).to_bytes())
    nearest = {1e-9: 1e-5, 1e4: 10.0}.get(value, value)
    assert read.curves.error_rms.flat[0] == pytest.approx(nearest)


def test_the_calibration_of_cogvideox_2b_is_small() -> None:
    """30 layers of 30 heads, five orders and six steps; errors of heads and steps differ, as do those of points."""
    random, points = np.random.default_rng(0), grid(("cdf",))
    shape = (5, 30, 6, 30, len(points))
    dropped = np.array([1.0 - (point.cdfthreshd or 0.0) for point in points])
    factor = np.exp(random.normal(0, 1, shape[:-1]))[..., None] * np.exp(random.normal(0, 0.02, shape))
    error = (dropped * factor).astype(np.float32)
    sparsity = np.clip(1.0 + 0.15 * np.log(dropped / factor + 1e-9), 0.0, 1.0).astype(np.float32)
    layers = tuple((f"transformer.transformer_blocks.{index}.attn1", 30) for index in range(30))
    arrangements = tuple(Arrangement(order, True) for order in ("raster", "hfw", "wfh", "whf", "hilbert"))
    size = random.random((30, 6, 30), dtype=np.float32)
    table = Curves(layers, arrangements, (0, 10, 20, 30, 40, 49), 50, points, error, error, sparsity, size, 4, True)
    assert len(Dial(table).to_bytes()) < 2_000_000


def test_a_sparsity_is_met_with_a_warning_and_a_prediction(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        changed = checkpoint(smooth()).with_sparsity(0.4)
    assert changed.prediction is not None
    assert changed.prediction.sparsity == pytest.approx(0.4, abs=0.03)
    assert (
        "not rendered; predicted for the tune prompts and settings: sparsity 0." in caplog.text and "dB" in caplog.text
    )
    assert changed.manifest.metrics == {}
    assert changed.policy.schedule.dense_fraction == 0.1
    sparser = changed.with_sparsity(0.5).prediction
    assert sparser is not None and sparser.psnr is not None and changed.prediction.psnr is not None
    assert sparser.psnr < changed.prediction.psnr


def test_the_predicted_psnr_is_the_trials_line() -> None:
    made = dial(smooth())
    policy = made.policy(budget=0.05)
    prediction = made.predict(policy)
    assert prediction.psnr == pytest.approx(20.0 - 20.0 * math.log10(0.05), abs=3.0)
    assert prediction.psnr_error == pytest.approx(0.0, abs=1e-6)
    assert replace(made, measured=()).predict(policy).psnr is None
    lone = replace(made, measured=(MEASURED[0],)).predict(policy)
    assert lone.psnr == pytest.approx(prediction.psnr) and lone.psnr_error is None


def test_a_larger_budget_is_sparser_and_an_equal_one_the_same_policy() -> None:
    tuned = checkpoint(smooth())
    found = [tuned.with_budget(budget) for budget in (0.02, 0.1)]
    assert found[0].policy == tuned.policy
    low, high = (one.prediction.sparsity for one in found if one.prediction is not None)
    assert low < high


def test_a_cache_stays_and_the_quality_with_it_is_not_known() -> None:
    tuned = checkpoint(smooth())
    cached = replace(tuned, policy=replace(tuned.policy, cache=StepCache("first_block", threshold=0.1)))
    changed = cached.with_budget(0.05)
    assert changed.policy.cache == cached.policy.cache
    assert changed.prediction is not None and changed.prediction.psnr is None


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.2, math.nan])
def test_a_sparsity_is_a_fraction(sparsity: float) -> None:
    with pytest.raises(CheckpointError, match="must be between 0 and 1"):
        checkpoint(smooth()).with_sparsity(sparsity)


def test_what_is_out_of_reach_or_missing_is_said() -> None:
    with pytest.raises(CheckpointError, match=r"sparsity 0.99 is out of reach: the calibration allows up to 0\.\d+"):
        checkpoint(smooth()).with_sparsity(0.99)
    with pytest.raises(CheckpointError, match="has no calibration"):
        replace(checkpoint(smooth()), dial=None).with_budget(0.1)
    with pytest.raises(CheckpointError, match="cannot read the checkpoint's calibration"):
        replace(checkpoint(smooth()), dial=b"damaged").with_sparsity(0.4)
    with pytest.raises(CheckpointError, match="a policy has one sparsity"):
        sparsify(None, checkpoint(smooth()).policy, sparsity=0.4)
    assert len(LAYERS) == len(checkpoint(smooth()).with_sparsity(0.3).policy.layers)


def test_thresholds_for_each_head_save_more_than_one_for_all_at_the_same_error() -> None:
    own = replace(dial(curves()), rule="topk", orders=("raster",))
    assert own.per_head_gain(own.policy(budget=0.2)) is None
    shared = replace(own, sharing="sparse_layers", dense_last=0.1)
    gain = Dial.from_bytes(shared.to_bytes()).per_head_gain(shared.policy(budget=0.2))
    assert gain is not None and gain.per_head_sparsity > gain.sparsity + 0.05
    assert gain.seconds is None
    timed = replace(shared, step=StepSeconds(rest=1.0, dense=0.5, overhead=0.0, pairs=0.5, order=0.0, num_layers=2))
    gain = timed.per_head_gain(timed.policy(budget=0.2))
    assert gain.per_head_seconds < gain.seconds
