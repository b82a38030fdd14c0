import pytest

from sparsetune.attention.policy import Policy, check_fits
from sparsetune.errors import CheckpointError


def test_a_policy_fits_the_layers_it_was_made_for_in_any_order() -> None:
    layers = [("a", 2), ("b", 3)]
    check_fits(Policy.uniform(layers), layers[::-1])


def test_every_kind_of_misfit_is_listed() -> None:
    policy = Policy.uniform([("a", 2), ("blocks.1", 3), ("c", 1)])
    expected = r"1 missing: blocks\.11; 2 not in the model: blocks\.1, c; 1 with .*: a \(model 4, policy 2\)"
    with pytest.raises(CheckpointError, match=expected):
        check_fits(policy, [("a", 4), ("blocks.11", 3)])


def test_long_lists_are_cut() -> None:
    with pytest.raises(CheckpointError, match=r"30 missing: layer\.0, layer\.1, layer\.2, layer\.3 and 26 more"):
        check_fits(Policy.uniform([("a", 1)]), [(f"layer.{index}", 1) for index in range(30)])
