"""Sensitivities fitted to errors computed from known ones."""

import numpy as np
import pytest

from sparsetune.tuning.calibration.sensitivity import NUM_PHASES, REFERENCE, Sensitivity, fit, head_shares, probes
from tests.tuning.tables import POINTS, smooth


def test_known_sensitivities_are_found_again() -> None:
    table = smooth()
    phases, groups = np.geomspace(0.1, 10.0, NUM_PHASES), np.array([0.5, 2.0])
    error = table.error[0, 0, 0, 0, POINTS.index(REFERENCE)]
    power = 1e-4 * error**2 * (head_shares(table)[:, 0] ** 2).sum(-1)  # (layers,)
    psnr = {f"phase/{index}": [-10 * np.log10(phases[index] * (groups * power).sum())] for index in range(NUM_PHASES)}
    psnr |= {f"layers/{index}": [-10 * np.log10(groups[index] * power[index] * phases.sum())] for index in range(2)}
    found = fit(table, psnr, "raster", True)
    np.testing.assert_allclose(found.phases, phases / np.exp(np.log(phases).mean()), rtol=1e-6)
    np.testing.assert_allclose(found.groups, groups, rtol=1e-6)


def test_each_probe_is_sparse_in_one_part_alone() -> None:
    listed = probes(smooth(), "tiles", True, 2)
    assert list(listed) == [f"phase/{i}" for i in range(10)] + ["layers/0", "layers/1"]
    policies = list(listed.values())
    for index, policy in enumerate(policies[:10]):
        dense = [policy.schedule.is_dense(step, 10) for step in range(10)]
        assert dense == [step != index for step in range(10)]
        assert all(layer.is_sparse for layer in policy.layers)
    assert [[layer.is_sparse for layer in policy.layers] for policy in policies[10:]] == [
        [True, False], [False, True]
    ]  # fmt: skip


def test_one_group_of_layers_is_not_probed_and_few_steps_are_phases_each() -> None:
    from dataclasses import replace

    short = replace(smooth(), num_steps=4)
    assert list(probes(short, "raster", True, 1)) == [f"phase/{index}" for index in range(4)]


def test_the_root_spares_what_is_sensitive() -> None:
    sensitivity = Sensitivity(phases=(4.0, 0.25))
    assert sensitivity.drop_scale(0.5) == pytest.approx((0.5, 2.0))
    assert sensitivity.drop_scale(0.0) == (1.0, 1.0)
    assert Sensitivity(phases=(1e9, 1e-9)).drop_scale(0.5) == (1 / 16, 16.0)
    np.testing.assert_allclose(Sensitivity(groups=(4.0, 0.25)).of_layers(4), [2.0, 2.0, 0.5, 0.5])
