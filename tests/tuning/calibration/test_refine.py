"""Refined thresholds of several prompts: merged in any order, saved to a file, put into the starting policy."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.errors import TuningError
from sparsetune.tuning.calibration.refine import RefinedThresholds

LAYERS = (("blocks.0.attn", 2), ("blocks.1.attn", 3))
START = Policy(
    (
        LayerThresholds("blocks.0.attn", (HeadThresholds(-1.0, 0.9), HeadThresholds(0.3, 0.9)), "tiles"),
        LayerThresholds("blocks.1.attn", (HeadThresholds(0.3, 0.99),) * 3, "raster"),
    ),
    keep_text=True,
    select_partial=True,
)


def limits(seed: int) -> RefinedThresholds:
    generator = np.random.default_rng(seed)
    none = RefinedThresholds.zeros(LAYERS)
    cut, pvthreshd = (none.mask_threshold + generator.random((2, 3), np.float32) * scale for scale in (1, 50))
    return RefinedThresholds(LAYERS, cut.astype(np.float32), pvthreshd.astype(np.float32), 1)


def same(one: RefinedThresholds, other: RefinedThresholds) -> bool:
    names = ("mask_threshold", "pvthreshd")
    return (one.layers, one.num_inputs) == (other.layers, other.num_inputs) and all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True) for name in names
    )


def test_merged_in_any_order_they_are_the_same_and_hold_on_all() -> None:
    parts = [limits(seed) for seed in range(3)]
    whole = parts[0].merged(parts[1]).merged(parts[2])
    for first, second, third in itertools.permutations(parts):
        assert same(first.merged(second).merged(third), whole)
        assert same(first.merged(second.merged(third)), whole)
    for part in parts:
        there = ~np.isnan(whole.mask_threshold)
        assert (whole.mask_threshold >= part.mask_threshold)[there].all()
        assert (whole.pvthreshd >= part.pvthreshd)[there].all()
    assert whole.num_inputs == 3


def test_thresholds_of_other_layers_are_refused() -> None:
    with pytest.raises(TuningError, match="cannot merge thresholds of different layers"):
        limits(0).merged(RefinedThresholds.zeros((("blocks.0.attn", 2),)))


def test_a_policy_has_them_in_place_of_its_own() -> None:
    found = limits(0)
    policy = found.policy(START)
    assert (policy.orders, policy.keep_text, policy.select_partial) == (("tiles", "raster"), True, True)
    for index, layer in enumerate(policy.layers):
        for place, head in enumerate(layer.heads):
            assert head.simthreshd1 == START.layers[index].heads[place].simthreshd1
            assert np.float32(head.cdfthreshd) == found.mask_threshold[index, place]
            assert np.float32(head.pvthreshd) == found.pvthreshd[index, place]
            assert head.is_sparse


def test_a_head_that_no_cut_keeps_within_the_bound_on_one_input_is_dense() -> None:
    one, other = limits(0), limits(1)
    # No point is within the bound; nothing is skipped.
    other.mask_threshold[0, 1], one.mask_threshold[1, 2] = np.inf, 1.0
    policy = one.merged(other).policy(START)
    sparse = [[head.is_sparse for head in layer.heads] for layer in policy.layers]
    assert sparse == [[True, False], [True, True, False]]


def test_they_are_what_they_were_after_a_file(tmp_path: Path) -> None:
    found = limits(0)
    found.mask_threshold[0, 0] = np.inf
    found.save(tmp_path / "limits.npz")
    assert same(RefinedThresholds.load(tmp_path / "limits.npz"), found)


@pytest.mark.parametrize("damage", ["empty", "half", "shape", "other"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "limits.npz"
    limits(0).save(path)
    if damage == "shape":
        RefinedThresholds(LAYERS, np.zeros((1, 3), np.float32), np.zeros((1, 3), np.float32), 1).save(path)
    elif damage == "other":
        np.savez(path, cut=np.zeros(3))
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-100])
    with pytest.raises(TuningError, match=r"cannot read the thresholds .*limits\.npz .*; remove it to search"):
        RefinedThresholds.load(path)
