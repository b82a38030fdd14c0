import dataclasses

import pytest

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.evaluation.conditions import policy_digest

POLICY = Policy.uniform([("transformer.a", 2)], HeadThresholds(simthreshd1=0.5, cdfthreshd=0.9))


@pytest.mark.parametrize(
    "other",
    [
        Policy.uniform([("transformer.b", 2)], HeadThresholds(simthreshd1=0.5, cdfthreshd=0.9)),
        Policy.uniform([("transformer.a", 3)], HeadThresholds(simthreshd1=0.5, cdfthreshd=0.9)),
        Policy.uniform([("transformer.a", 2)], HeadThresholds(simthreshd1=0.5, cdfthreshd=0.91)),
        dataclasses.replace(POLICY, keep_text=True),
        dataclasses.replace(POLICY, order="tiles"),
        dataclasses.replace(POLICY, schedule=DenseSchedule(0.5)),
    ],
)
def test_every_part_of_a_policy_counts(other: Policy) -> None:
    assert policy_digest(other) != policy_digest(POLICY)
    assert policy_digest(dataclasses.replace(POLICY)) == policy_digest(POLICY)


def test_field_that_a_later_version_adds_leaves_the_digest_as_it_was() -> None:
    @dataclasses.dataclass(frozen=True)
    class Later(Policy):
        added: bool = False

    layers = POLICY.layers
    assert policy_digest(Later(layers)) == policy_digest(POLICY)
    assert policy_digest(Later(layers, added=True)) != policy_digest(POLICY)
