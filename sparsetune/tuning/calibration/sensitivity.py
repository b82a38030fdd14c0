"""How much of an attention error reaches the video, by part of the generation and by layer.

Steps and layers differ in this by orders of magnitude, and no error measured inside a layer tells it: an error in
the second step moves the layout of the video, one in the middle of the generation is mended by the steps after it.
So it is measured on rendered video: one part of the generation at a time is run sparse, then one group of layers.
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
"""Equal parts that the generation is told apart in, or its steps where they are fewer."""

REFERENCE = HeadThresholds(simthreshd1=-1.0, cdfthreshd=1.0 - 2.0**-4)
"""What a part runs with when it alone is sparse; a point of the calibrated grid."""

_ROUNDS = 20
_LEAST_ERROR = 1e-9


@dataclass(frozen=True)
class Probe:
    """One measurement: a policy that is sparse in one part alone, `phase/I` of the generation or `layers/I`."""

    name: str
    policy: Policy


@dataclass(frozen=True)
class Sensitivity:
    """Squared error of the video for each squared relative error of attention; geometric means are 1.

    Args:
        phases: of each of some equal parts of the generation.
        groups: of each of some equal groups of consecutive layers.
    """

    phases: tuple[float, ...] = (1.0,)
    groups: tuple[float, ...] = (1.0,)

    def drop_scale(self, steepness: float, limit: float = 16.0) -> tuple[float, ...]:
        """Factors on what each part of the generation drops: the less sensitive, the more.

        With errors growing as what is dropped, and sparsity as its logarithm, the square root (steepness 0.5) gives
        the most sparsity for a given error of the video.

        Args:
            steepness: exponent; 0 treats all parts alike.
            limit: factors are kept in [1 / limit, limit].
        """
        return tuple(float(np.clip(value**-steepness, 1 / limit, limit)) for value in self.phases)

    def schedule(self, dense_fraction: float, steepness: float) -> DenseSchedule:
        """Give the schedule with these factors; with steepness 0 there are none."""
        return DenseSchedule(dense_fraction, self.drop_scale(steepness) if steepness else ())

    def of_layers(self, num_layers: int) -> npt.NDArray[np.float64]:
        """The sensitivity of each layer, that of its group, drawn halfway to 1 on a logarithmic scale.

        A group's figure rests on few renderings, and its layers differ.
        """
        return np.array([self.groups[phase(index, num_layers, len(self.groups))] ** 0.5 for index in range(num_layers)])


def count_phases(num_steps: int) -> int:
    """Count the parts that a generation is told apart in."""
    return min(NUM_PHASES, num_steps)


def probes(curves: Curves, order: str, keep_text: bool, num_groups: int) -> tuple[Probe, ...]:
    """List the policies to render: each part of the generation sparse alone, then each group of layers.

    Args:
        curves: the calibration, for the layers.
        order: token order to probe in.
        keep_text: text rule to probe with.
        num_groups: groups of layers; a single one isn't probed.
    """

    def policy(schedule: DenseSchedule, sparse: Sequence[bool]) -> Policy:
        layers = tuple(
            LayerThresholds.uniform(name, heads, REFERENCE if on else DENSE["cdf"])
            for (name, heads), on in zip(curves.layers, sparse, strict=True)
        )
        return Policy(layers, schedule, order, keep_text, curves.select_partial)

    num_layers, num_phases = len(curves.layers), count_phases(curves.num_steps)
    found = []
    for index in range(num_phases):
        only = tuple(float(index == place) for place in range(num_phases))
        found.append(Probe(f"phase/{index}", policy(DenseSchedule(0.0, only), [True] * num_layers)))
    for group in range(num_groups if num_groups > 1 else 0):
        inside = [phase(index, num_layers, num_groups) == group for index in range(num_layers)]
        found.append(Probe(f"layers/{group}", policy(DenseSchedule(), inside)))
    return tuple(found)


def fit(curves: Curves, psnr: Mapping[str, Sequence[float]], order: str, keep_text: bool) -> Sensitivity:
    """Explain the videos' errors by a sensitivity of each phase times one of each group of layers.

    Squared errors of independent causes add up, so a probe's is Σ s_phase · s_layer · e², e the calibrated error
    relative to the layer's output. The two factors are fitted in turns.

    Args:
        curves: the calibration.
        psnr: for each probe's name the PSNR of its videos in dB; their squared errors are averaged geometrically.
        order: token order that was probed in.
        keep_text: text rule that was probed with.
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
    place = curves.arrangement_indices([order], keep_text)[0]
    point = curves.points.index(REFERENCE)
    power: npt.NDArray[np.float64] = np.nansum(
        (head_shares(curves) * curves.error_rms[place, ..., point].astype(np.float64)) ** 2, axis=-1
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
