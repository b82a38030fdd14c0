"""Sensitivity of the video to attention errors, by part of the generation and by group of layers.

Steps and layers differ in sensitivity by orders of magnitude, and layer-level error doesn't predict it: an error in the
second step moves the layout of the video, one in the middle of the generation is corrected by later steps. So it is
measured on rendered video: with only one part of the generation sparse, then with only one group of layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule, phase
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.tuning.calibration.bounded_policy import DENSE
from sparsetune.tuning.calibration.curves import Curves

NUM_PHASES = 10
"""Number of equal parts of the generation; at most one a step."""

REFERENCE = HeadThresholds(simthreshd1=-1.0, cdfthreshd=1.0 - 2.0**-4)
"""Thresholds of the probed part; a point of the calibrated grid."""

_ROUNDS = 20
_LEAST_ERROR = 1e-9
_MAX_SCALE = 16.0


@dataclass(frozen=True)
class Sensitivity:
    """Squared error of the video per squared relative error of attention; geometric means are 1."""

    phases: tuple[float, ...] = (1.0,)  # for equal parts of the generation
    groups: tuple[float, ...] = (1.0,)  # for equal groups of consecutive layers

    def drop_scale(self, steepness: float) -> tuple[float, ...]:
        """Factors on what each part of the generation drops: the less sensitive, the more; all 1 if steepness is 0.

        If errors grow with what is dropped, and sparsity with its logarithm, the square root (steepness 0.5) has the
        highest sparsity for a given error of the video.
        """
        return tuple(float(np.clip(value**-steepness, 1 / _MAX_SCALE, _MAX_SCALE)) for value in self.phases)

    def schedule(self, dense_fraction: float, steepness: float) -> DenseSchedule:
        return DenseSchedule(dense_fraction, self.drop_scale(steepness) if steepness else ())

    def of_layers(self, num_layers: int) -> npt.NDArray[np.float64]:
        """Square roots of the groups' values, which are estimated from few renderings, and whose layers differ."""
        return np.array([self.groups[phase(index, num_layers, len(self.groups))] ** 0.5 for index in range(num_layers)])


def count_phases(num_steps: int) -> int:
    return min(NUM_PHASES, num_steps)


def probes(curves: Curves, order: str, keep_text: bool, num_groups: int) -> dict[str, Policy]:
    """Policies to render, with a single part of the generation (`phase/I`) or group of layers (`layers/I`) sparse."""

    def policy(schedule: DenseSchedule, sparse: Sequence[bool]) -> Policy:
        layers = tuple(
            LayerThresholds.uniform(name, heads, REFERENCE if on else DENSE["cdf"])
            for (name, heads), on in zip(curves.layers, sparse, strict=True)
        )
        return Policy(layers, schedule, order, keep_text, curves.select_partial)

    num_layers, num_phases = len(curves.layers), count_phases(curves.num_steps)
    found = {}
    for index in range(num_phases):
        only = tuple(float(index == other) for other in range(num_phases))
        found[f"phase/{index}"] = policy(DenseSchedule(0.0, only), [True] * num_layers)
    for group in range(num_groups if num_groups > 1 else 0):
        inside = [phase(index, num_layers, num_groups) == group for index in range(num_layers)]
        found[f"layers/{group}"] = policy(DenseSchedule(), inside)
    return found


def fit(curves: Curves, psnr: Mapping[str, Sequence[float]], order: str, keep_text: bool) -> Sensitivity:
    """Fit the videos' errors by a sensitivity of each phase times one of each group of layers.

    Squared errors of independent causes add up, so a probe's is Σ s_phase · s_layer · e², e the calibrated error
    relative to the layer's output. The two factors are fitted alternately. `psnr` has those of each probe's videos in
    dB, by its name; their squared errors are averaged geometrically. `order` and `keep_text` are the probes'.
    """
    mse = {name: max(_LEAST_ERROR, 10 ** (-float(np.mean(values)) / 10)) for name, values in psnr.items()}
    num_groups = max(1, sum(name.startswith("layers/") for name in mse))
    num_phases = len(mse) - (num_groups if num_groups > 1 else 0)
    power = np.zeros((num_groups, num_phases))
    for index, of_layer in enumerate(_error_power(curves, order, keep_text, num_phases)):
        power[phase(index, len(curves.layers), num_groups)] += of_layer
    by_phase = np.array([mse[f"phase/{index}"] for index in range(num_phases)])
    phases, groups = np.ones(num_phases), np.ones(num_groups)
    for _ in range(_ROUNDS):
        phases = by_phase / (groups @ power)
        if num_groups > 1:
            groups = np.array([mse[f"layers/{group}"] for group in range(num_groups)]) / (power @ phases)
            groups /= np.exp(np.log(groups).mean())
    phases /= np.exp(np.log(phases).mean())
    return Sensitivity(tuple(phases.tolist()), tuple(groups.tolist()))


def _error_power(curves: Curves, order: str, keep_text: bool, num_phases: int) -> npt.NDArray[np.float64]:
    """Squared relative error of each layer's output in each phase under `REFERENCE`, (layers, phases)."""
    arrangement = curves.arrangement_indices([order], keep_text)[0]
    point = curves.points.index(REFERENCE)
    power: npt.NDArray[np.float64] = np.nansum(
        (head_shares(curves) * curves.error_rms[arrangement, ..., point].astype(np.float64)) ** 2, axis=-1
    )
    steps = np.array(curves.steps)
    of_step = [
        int(np.abs(steps - (index + 0.5) * curves.num_steps / num_phases + 0.5).argmin()) for index in range(num_phases)
    ]
    of_phase: npt.NDArray[np.float64] = np.maximum(power[:, of_step], _LEAST_ERROR)
    return of_phase


def head_shares(curves: Curves) -> npt.NDArray[np.float64]:
    """Each head's share of its layer's output, (layers, steps, heads); 0 for heads that a layer doesn't have."""
    size = np.nan_to_num(curves.size.astype(np.float64))
    shares: npt.NDArray[np.float64] = size / np.maximum(size.sum(axis=-1, keepdims=True), 1e-30)
    return shares
