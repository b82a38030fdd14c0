"""The search space: what a trial's parameters are, and the policy that they mean."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import optuna

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import phase
from sparsetune.attention.thresholds import SPARGE_DEFAULTS, HeadThresholds, LayerThresholds, Rule
from sparsetune.config.models import Granularity, Space
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.calibration.sensitivity import Sensitivity
from sparsetune.tuning.events import Parameter
from sparsetune.tuning.search.allocation import CandidateTable, allocate, predict

BUDGETS = (0.002, 0.4)
"""Range of the error budget, the root mean square of relative L1 errors weighted by what they do to the video; searched
on a logarithmic scale."""

REACH = (0.97, 1.15)
"""Range of the sparsity that a trial goes for, relative to the best that met the gate when it was asked for. Anything
far from that would teach nothing: sparsity is known before a rendering, what its video looks like isn't."""

REACHES = (1.05, 1.1, 1.15)
"""Reaches to try first, with all else as measured: which videos hold just beyond the gate is a matter of chance."""

WEIGHTS = (0.5, 2.0)
"""Range of the factor on a group's measured sensitivity, searched on a logarithmic scale."""

STEEPNESSES = (0.2, 0.8, 0.05)
"""Lowest, highest and step of how far sensitive steps are spared, see `Sensitivity.drop_scale`."""

STEEPNESS = 0.6
"""The steepness that the search begins with."""

DENSE_FRACTIONS = (0.0, 0.4, 0.1)
"""Lowest, highest and step of the fraction of denoising steps that run dense."""

PV = (50.0, 5.0)
"""`pvthreshd` off, and a value that skips P·V where it hardly weighs."""

STARTS = (0.01, 0.02, 0.04)
"""Budgets of the calibrated policies to start from."""

NUM_GROUPS = 3
"""Groups of consecutive layers at granularity `group`: early, middle and late layers bear sparsity differently."""

BEST = "best"
"""The token order that takes, for each head, the one with the most sparsity at the price."""

THRESHOLDS, CALIBRATED, DEFAULT = "thresholds", "calibrated", "default"
"""Where a trial's thresholds come from: the curves, or, in the first trial, SpargeAttn's defaults. The sampler doesn't
choose it; it is enqueued with the trial as a user attribute."""

AIM = "aim"
"""Sparsity that a trial's reach is relative to; a user attribute of the trial, and among its parameters."""


@dataclass(frozen=True)
class Start:
    """A trial to try first: its parameters, and where its thresholds come from."""

    params: dict[str, Parameter]
    thresholds: str = CALIBRATED


@dataclass(frozen=True)
class SearchSpace:
    """What a trial decides.

    Args:
        curves: calibrated curves that budgets are read off.
        sensitivity: what errors do to the video.
        kind: `budget` searches an error budget and how it is shared out, `raw` the thresholds themselves.
        granularity: one choice for all layers, for each of three groups, or for each layer.
        orders: token orders to choose from; must be calibrated ones.
        rules: mask rules to choose from, `cdf` or `topk`; budgets only.
        keep_text: text rules to choose from.
        skip_pv: whether `pvthreshd` is searched: off, or on at a value that hardly shows.
        schedule: whether what the steps drop is searched too; without it all steps drop alike, and none is dense.
    """

    curves: Curves
    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    kind: Space = "budget"
    granularity: Granularity = "group"
    orders: tuple[str, ...] = ("raster",)
    rules: tuple[Rule, ...] = ("cdf",)
    keep_text: tuple[bool, ...] = (True,)
    skip_pv: bool = False
    schedule: bool = True

    def suggest(self, trial: optuna.Trial, aim: float = 0.0) -> dict[str, Parameter]:
        """Ask the sampler for a trial's parameters; what has one choice alone isn't asked for.

        Args:
            trial: one that the sampler fills, or that waited with parameters of its own.
            aim: the best sparsity that met the gate so far; 0 where none did, or where the whole range of budgets is to
                be searched.
        """
        params: dict[str, Parameter] = {}
        if self.kind == "budget":
            if aim and THRESHOLDS not in trial.user_attrs and "l1" not in trial.params:  # as one has that is run again
                trial.set_user_attr(AIM, aim)
            if AIM in trial.user_attrs:
                params |= {"reach": trial.suggest_float("reach", *REACH), AIM: trial.user_attrs[AIM]}
            else:
                params["l1"] = trial.suggest_float("l1", *BUDGETS, log=True)
            for group in self._groups()[1:]:
                params[f"weight_{group}"] = trial.suggest_float(f"weight_{group}", *WEIGHTS, log=True)
        else:
            for group in self._groups():
                params[f"simthreshd1_{group}"] = trial.suggest_float(f"simthreshd1_{group}", -1.0, 1.0)
                params[f"cdfthreshd_{group}"] = trial.suggest_float(f"cdfthreshd_{group}", 0.3, 1.0)
        if self.schedule:
            low, high, step = STEEPNESSES
            params["steepness"] = trial.suggest_float("steepness", low, high, step=step)
            low, high, step = DENSE_FRACTIONS
            params["dense_fraction"] = trial.suggest_float("dense_fraction", low, high, step=step)
        for name, choices in self._choices().items():
            chosen = choices[0] if len(choices) == 1 else trial.suggest_categorical(name, choices)
            params[name] = choices[0] if chosen is None else chosen
        params[THRESHOLDS] = trial.user_attrs.get(THRESHOLDS, CALIBRATED)
        return params

    def warm_start(self) -> list[Start]:
        """List the trials to try first: SpargeAttn's defaults, then calibrated policies at three budgets.

        The default thresholds stand at the lowest budget for the sampler, which their error is nearest to.
        """
        if self.kind == "raw":
            default = self._raw(SPARGE_DEFAULTS.simthreshd1, SPARGE_DEFAULTS.cdfthreshd or 1.0)
            return [Start(default, DEFAULT), Start(self._raw(-1.0, 0.98))]
        return [Start(self.at(BUDGETS[0]).params, DEFAULT), *(self.at(budget) for budget in STARTS)]

    def at(self, budget: float) -> Start:
        """Give the trial with one budget and otherwise what was measured: the first choices, weights of 1."""
        weights: dict[str, Parameter] = {f"weight_{group}": 1.0 for group in self._groups()[1:]}
        return Start({"l1": budget} | weights | self._rest())

    def beyond(self, reach: float) -> Start:
        """Give the trial that goes for `reach` times the best sparsity and otherwise for what `at` does."""
        params = self.at(0.0).params
        del params["l1"]
        return Start(params | {"reach": reach})

    def is_at(self, params: Mapping[str, Parameter]) -> float | None:
        """Give the budget of a trial that is `at` one; None for any other trial."""
        if self.kind == "raw" or params.get(THRESHOLDS) != CALIBRATED or "l1" not in params:
            return None
        budget = float(params["l1"])
        return budget if all(params.get(name) == value for name, value in self.at(budget).params.items()) else None

    def policy(self, params: Mapping[str, Parameter]) -> Policy:
        """Build the policy that a trial's parameters mean."""
        if params.get(THRESHOLDS) == DEFAULT:
            return Policy.uniform(self.curves.layers)
        steepness, dense_fraction = float(params.get("steepness", 0.0)), float(params.get("dense_fraction", 0.0))
        keep_text, order = bool(params["keep_text"]), str(params["order"])
        if self.kind == "raw":
            schedule = self.sensitivity.schedule(dense_fraction, steepness)
            return Policy(self._raw_layers(params), schedule, order, keep_text, self.curves.select_partial)
        policy = allocate(
            self._candidates,
            float(params.get("l1", math.inf)),
            sparsity=float(params["reach"]) * float(params[AIM]) if "reach" in params else 1.0,
            orders=self.orders if order == BEST else (order,),
            keep_text=keep_text,
            rule="topk" if params["rule"] == "topk" else "cdf",
            dense_fraction=dense_fraction,
            steepness=steepness,
            weights=[1.0, *(float(params[f"weight_{group}"]) for group in self._groups()[1:])],
        )
        return with_pv(policy, PV[1]) if params.get("pvthreshd") == PV[1] else policy

    def predict(self, policy: Policy) -> float | None:
        """Give the error that calibration predicts for a policy; None where it can't tell."""
        return predict(self._candidates, policy)

    @functools.cached_property
    def _candidates(self) -> CandidateTable:
        return CandidateTable(self.curves, self.sensitivity)

    def _choices(self) -> dict[str, tuple[Parameter, ...]]:
        several = self.kind == "budget" and len(self.orders) > 1
        choices: dict[str, tuple[Parameter, ...]] = {"order": ((BEST,) if several else ()) + self.orders}
        if self.kind == "budget":
            choices |= {"rule": self.rules, "pvthreshd": PV if self.skip_pv else PV[:1]}
        return choices | {"keep_text": self.keep_text}

    def _rest(self) -> dict[str, Parameter]:
        steps: dict[str, Parameter] = {"steepness": STEEPNESS, "dense_fraction": 0.0} if self.schedule else {}
        return steps | {name: choices[0] for name, choices in self._choices().items()}

    def _raw(self, simthreshd1: float, cdfthreshd: float) -> dict[str, Parameter]:
        params: dict[str, Parameter] = {}
        for group in self._groups():
            params |= {f"simthreshd1_{group}": simthreshd1, f"cdfthreshd_{group}": cdfthreshd}
        return params | self._rest()

    def _raw_layers(self, params: Mapping[str, Parameter]) -> tuple[LayerThresholds, ...]:
        groups, layers = self._groups(), self.curves.layers
        found = []
        for index, (name, num_heads) in enumerate(layers):
            group = groups[phase(index, len(layers), len(groups))]
            head = HeadThresholds(float(params[f"simthreshd1_{group}"]), float(params[f"cdfthreshd_{group}"]))
            found.append(LayerThresholds.uniform(name, num_heads, head))
        return tuple(found)

    def _groups(self) -> list[str]:
        count = num_groups(self.granularity, len(self.curves.layers))
        return ["all"] if count == 1 else [f"{index:02d}" for index in range(count)]


def num_groups(granularity: Granularity, num_layers: int) -> int:
    """Count the groups of layers that a granularity tells apart."""
    return {"global": 1, "group": min(NUM_GROUPS, num_layers), "layer": num_layers}[granularity]


def with_pv(policy: Policy, pvthreshd: float) -> Policy:
    """Give every sparse head of a policy a `pvthreshd`."""
    layers = tuple(
        replace(layer, heads=tuple(replace(head, pvthreshd=pvthreshd) if head.is_sparse else head
                                   for head in layer.heads))
        for layer in policy.layers
    )  # fmt: skip
    return replace(policy, layers=layers)
