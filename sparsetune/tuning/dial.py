"""The dial of a checkpoint: policies for other sparsities and budgets, from the calibration that travels with it."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds, Rule
from sparsetune.bench.step_time import StepSeconds
from sparsetune.errors import CheckpointError
from sparsetune.tuning.calibration.curves import Arrangement, Array, Curves
from sparsetune.tuning.calibration.sensitivity import Sensitivity
from sparsetune.tuning.events import PerHeadGain
from sparsetune.tuning.search.allocation import (
    KernelCost,
    Sharing,
    allocate,
    predict,
    predict_seconds,
    predicted_sparsity,
)
from sparsetune.tuning.search.candidates import CandidateTable

_VERSION = 1
_LOWEST_ERROR, _HIGHEST_ERROR = 1e-5, 10.0  # relative errors beyond these aren't told apart
_DB_PER_DECADE = 20.0  # of PSNR, if the video's squared error is proportional to attention's


@dataclass(frozen=True)
class Prediction:
    """What the calibration predicts of a policy that wasn't rendered.

    Args:
        sparsity: of a whole generation, in [0, 1].
        psnr: in dB, the mean over the tune prompts; None where no trial was comparable.
        psnr_error: standard deviation of the trials' PSNR from their prediction, in dB; None below four trials.
        seconds: of the denoising, on the GPU tuned with; None where sparsity saves none.
    """

    sparsity: float
    psnr: float | None
    psnr_error: float | None
    seconds: float | None

    def __str__(self) -> str:
        parts = [f"sparsity {self.sparsity:.3f}"]
        if self.psnr is not None:
            error = "" if self.psnr_error is None else f" ± {self.psnr_error:.1f}"
            parts.append(f"psnr {self.psnr:.1f}{error} dB")
        if self.seconds is not None:
            parts.append(f"{self.seconds:.3g} s of denoising")
        return ", ".join(parts)


@dataclass(frozen=True)
class Dial:
    """A calibration with what is needed to allocate a budget as the checkpoint's own policy did.

    Args:
        curves: of every head. Its largest errors are not kept: they equal its root mean squares.
        sensitivity: of the parts of the generation and the groups of layers.
        measured: predicted error and mean PSNR in dB of each complete trial without a cache.
        step: what a denoising step costs on the GPU tuned with; None where sparsity saves no seconds.
        orders, keep_text, rule, dense_fraction, steepness, weights, dense_last, sharing: see `allocate`.
    """

    curves: Curves
    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    measured: tuple[tuple[float, float], ...] = ()
    step: StepSeconds | None = None
    orders: tuple[str, ...] = ("raster",)
    keep_text: bool = True
    rule: Rule = "cdf"
    dense_fraction: float = 0.0
    steepness: float = 0.5
    weights: tuple[float, ...] = (1.0,)
    dense_last: float = 0.0
    sharing: Sharing = "none"

    def policy(self, *, budget: float = math.inf, sparsity: float = 1.0) -> Policy:
        """Return the policy that saves most within an error budget and a limit of the sparsity in [0, 1]."""
        return allocate(
            self._candidates,
            budget,
            sparsity=sparsity,
            orders=self.orders,
            keep_text=self.keep_text,
            rule=self.rule,
            dense_fraction=self.dense_fraction,
            steepness=self.steepness,
            weights=self.weights,
            kernel=KernelCost.of(self.step),
            dense_last=self.dense_last,
            sharing=self.sharing,
        )

    def per_head_gain(self, policy: Policy) -> PerHeadGain | None:
        """Compare a policy of one threshold with thresholds for each head; None for another or an uncalibrated one."""
        error = None if self.sharing == "none" else predict(self._candidates, policy)
        if error is None:
            return None
        shared, own = self.predict(policy), self.predict(replace(self, sharing="none").policy(budget=error))
        return PerHeadGain(shared.sparsity, own.sparsity, shared.seconds, own.seconds)

    def predict(self, policy: Policy) -> Prediction:
        by_step = predicted_sparsity(self._candidates, policy)
        sparsity = 0.0
        if by_step is not None:
            heads = [num_heads for _, num_heads in self.curves.layers]
            sparsity = float(np.average(np.mean(by_step, axis=0), weights=heads))
        psnr, deviation = self._psnr(predict(self._candidates, policy))
        seconds = None if self.step is None else predict_seconds(self._candidates, policy, self.step)
        return Prediction(sparsity, psnr, deviation, seconds)

    def _psnr(self, error: float | None) -> tuple[float | None, float | None]:
        """Read a line of PSNR over the logarithm of the error, through the trials, at an error."""
        known = [(math.log10(each), psnr) for each, psnr in self.measured if each > 0]
        if not error or not known:
            return None, None
        errors, psnr = np.array(known).T
        slope = -_DB_PER_DECADE
        if len(set(errors)) > 3 and (fitted := float(np.polyfit(errors, psnr, 1)[0])) < 0:
            slope = fitted
        rest = psnr - slope * errors
        deviation = float(rest.std(ddof=2)) if len(known) > 3 else None
        return float(slope * math.log10(error) + rest.mean()), deviation

    @cached_property
    def _candidates(self) -> CandidateTable:
        return CandidateTable(self.curves, self.sensitivity)

    def to_bytes(self) -> bytes:
        """Compress to .npz: errors and sparsities with 8 bits, errors on a logarithmic scale (steps of 5.6%)."""
        curves = self.curves
        about = {name: value for name, value in vars(self).items() if name not in ("curves", "sensitivity", "step")}
        about.pop("_candidates", None)
        about |= {
            "version": _VERSION,
            "sensitivity": asdict(self.sensitivity),
            "step": None if self.step is None else asdict(self.step),
            "layers": curves.layers,
            "arrangements": [list(arrangement) for arrangement in curves.arrangements],
            "steps": curves.steps,
            "num_steps": curves.num_steps,
            "points": [asdict(point) for point in curves.points],
            "num_inputs": curves.num_inputs,
            "select_partial": curves.select_partial,
        }
        file = io.BytesIO()
        np.savez_compressed(
            file,
            about=np.array(json.dumps(about)),
            error=_encoded(curves.error_rms),
            sparsity=np.rint(np.nan_to_num(curves.sparsity) * 255).astype(np.uint8),
            size=np.nan_to_num(curves.size),
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Dial":
        """Read what `to_bytes` returned; raises CheckpointError where it is something else."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                if about.pop("version") != _VERSION:
                    raise ValueError("another version's")
                arrays = file["error"], file["sparsity"], file["size"]
            return cls._decoded(about, *arrays)
        except Exception as error:  # numpy, zipfile, json and our own types raise many kinds
            raise CheckpointError(
                f"cannot read the checkpoint's calibration: {error}; tune again, or remove the file dial.npz"
            ) from error

    @classmethod
    def _decoded(
        cls, about: dict[str, Any], error: npt.NDArray[np.uint8], sparsity: npt.NDArray[np.uint8], size: Array
    ) -> "Dial":
        layers = tuple((name, heads) for name, heads in about.pop("layers"))
        exists = np.arange(error.shape[3]) < np.array([heads for _, heads in layers])[:, None, None]
        errors = np.where(exists[..., None], _decode(error), np.nan).astype(np.float32)
        curves = Curves(
            layers=layers,
            arrangements=tuple(Arrangement(*each) for each in about.pop("arrangements")),
            steps=tuple(about.pop("steps")),
            num_steps=about.pop("num_steps"),
            points=tuple(HeadThresholds(**point) for point in about.pop("points")),
            error=errors,
            error_rms=errors,
            sparsity=np.where(exists[..., None], sparsity / 255, np.nan).astype(np.float32),
            size=np.where(exists, size, np.nan).astype(np.float32),
            num_inputs=about.pop("num_inputs"),
            select_partial=about.pop("select_partial"),
        )
        sensitivity, step = about.pop("sensitivity"), about.pop("step")
        rest: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in about.items()
        }
        rest["measured"] = tuple((error, psnr) for error, psnr in rest["measured"])
        return cls(
            curves,
            Sensitivity(tuple(sensitivity["phases"]), tuple(sensitivity["groups"])),
            step=None if step is None else StepSeconds(**step),
            **rest,
        )


def _encoded(errors: Array) -> npt.NDArray[np.uint8]:
    """Encode errors: 0 is none, 255 infinite, the rest logarithmic."""
    span = math.log(_HIGHEST_ERROR / _LOWEST_ERROR)
    known = np.clip(np.nan_to_num(errors.astype(np.float64)), _LOWEST_ERROR, _HIGHEST_ERROR)
    codes = np.rint(1 + 253 * np.log(known / _LOWEST_ERROR) / span)
    return np.where(np.isposinf(errors), 255, np.where(errors > 0, codes, 0)).astype(np.uint8)


def _decode(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    span = math.log(_HIGHEST_ERROR / _LOWEST_ERROR)
    values = _LOWEST_ERROR * np.exp((codes.astype(np.float64) - 1) / 253 * span)
    found: npt.NDArray[np.float64] = np.where(codes == 255, np.inf, np.where(codes == 0, 0.0, values))
    return found


def dial_of(
    curves: Curves,
    sensitivity: Sensitivity,
    step: StepSeconds | None,
    params: Mapping[str, Any],
    measured: Sequence[tuple[float, float]],
    orders: Sequence[str],
    sharing: Sharing = "none",
) -> Dial:
    """Return the dial of a search's winner, which allocates by the winner's parameters, but without `pvthreshd`."""
    weights = [value for name, value in sorted(params.items()) if name.startswith("weight_")]
    order = params.get("order")
    return Dial(
        curves,
        sensitivity,
        tuple(measured),
        step,
        orders=(str(order),) if order in orders else tuple(orders),
        keep_text=bool(params.get("keep_text", True)),
        rule="topk" if params.get("rule") == "topk" else "cdf",
        dense_fraction=float(params.get("dense_fraction", 0.0)),
        steepness=float(params.get("steepness", 0.0)),
        weights=(1.0, *map(float, weights)),
        dense_last=float(params.get("dense_last", 0.0)),
        sharing=sharing,
    )
