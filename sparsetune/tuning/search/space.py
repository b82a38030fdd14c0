"""The search space: a trial's parameters, and how they become a policy."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import optuna

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import phase
from sparsetune.attention.thresholds import SPARGE_DEFAULTS, HeadThresholds, LayerThresholds, Rule
from sparsetune.bench.step_time import StepSeconds
from sparsetune.config.models import Granularity, Space
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.calibration.sensitivity import Sensitivity
from sparsetune.tuning.events import Parameter, Prediction
from sparsetune.tuning.search.allocation import KernelCost, Sharing, allocate, predict, predict_seconds
from sparsetune.tuning.search.caches import NO_CACHE, CacheSpace
from sparsetune.tuning.search.candidates import CandidateTable

BUDGETS = (0.002, 0.4)
"""Range of the error budget, the root mean square of relative L1 errors weighted by sensitivity; logarithmic scale."""

TARGET_RANGE = (0.97, 1.15)
"""Range of parameter `reach`, a trial's target sparsity relative to the best feasible one so far. Sparsity is known
before rendering, so only targets near the gate teach anything."""

FIRST_TARGETS = (1.05, 1.1, 1.15)
"""Values of `reach` to try first: whether a video just beyond the gate still passes is a matter of chance."""

WEIGHTS = (0.5, 2.0)
"""Range of the factor on a group's measured sensitivity; logarithmic scale."""

STEEPNESSES = (0.2, 0.8, 0.05)
"""Lowest, highest and step of `Sensitivity.drop_scale`'s steepness."""

DENSE_LAST = (0.0, 0.2, 0.1)
"""The same of the last steps, where one threshold holds for all heads."""

SHARING: Mapping[str, Sharing] = {"served": "sparse_layers", "uniform": "all_layers"}
"""What a granularity's heads share; nothing with any other."""

STEEPNESS = 0.6
"""Initial steepness."""

DENSE_FRACTIONS = (0.0, 0.4, 0.1)
"""Lowest, highest and step of the fraction of denoising steps that run dense."""

PVTHRESHDS = (50.0, 5.0)
"""`pvthreshd` off, and a value that skips P·V where it hardly matters."""

INITIAL_BUDGETS = (0.02, 0.01, 0.04)
"""In the order of trials; the others are for workers that are idle until the first one's outcome is known."""

NUM_GROUPS = 3
"""Groups of consecutive layers at granularity `group`: early, middle and late layers tolerate sparsity differently."""

BEST = "best"
"""Token order `best`: of each head's orders the one with the best trade-off of sparsity and error."""

THRESHOLDS, CALIBRATED, DEFAULT, DENSE = "thresholds", "calibrated", "default", "dense"
"""Source of a trial's thresholds: calibrated curves or, in one of the first trials, SpargeAttn's defaults; `dense` has
none, only a cache. Not sampled, but a user attribute that the trial is enqueued with."""

REFERENCE = "aim"
"""User attribute and parameter: the sparsity that `reach` is relative to."""


@dataclass(frozen=True)
class Start:
    """A trial to enqueue."""

    params: dict[str, Parameter]
    thresholds: str = CALIBRATED


@dataclass(frozen=True)
class SearchSpace:
    """Parameters of a trial, and their choices."""

    curves: Curves | None  # None where only caches are searched
    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    kind: Space = "budget"  # `budget` searches an error budget and its allocation, `raw` the thresholds themselves
    granularity: Granularity = "group"  # of the choices, see `TuneConfig`
    orders: tuple[str, ...] = ("raster",)  # all calibrated
    rules: tuple[Rule, ...] = ("cdf",)  # of budgets only
    keep_text: tuple[bool, ...] = (True,)
    skip_pv: bool = False  # whether `pvthreshd` is searched
    schedule: bool = True  # whether the schedule is searched; without it all steps drop alike, and none is dense
    step: StepSeconds | None = None  # what a step costs on this GPU; None where sparsity saves no seconds
    caches: CacheSpace | None = None
    dense_layers: tuple[tuple[str, int], ...] = ()  # name and number of heads, where there are no curves

    @property
    def layers(self) -> tuple[tuple[str, int], ...]:
        """Name and number of heads of each layer."""
        return self.dense_layers if self.curves is None else self.curves.layers

    def suggest(self, trial: optuna.Trial, reference: float = 0.0) -> dict[str, Parameter]:
        """Have the sampler choose a trial's parameters, but for those with one choice.

        `reference` is the best feasible sparsity so far; 0 searches the whole range of budgets.
        """
        params: dict[str, Parameter] = {}
        source = trial.user_attrs.get(THRESHOLDS, DENSE if self.curves is None else CALIBRATED)
        if self.caches is not None:
            params |= self.caches.suggest(trial, optional=self.curves is not None)
        if source == DENSE:
            return params | {THRESHOLDS: DENSE}
        if params.get("cache", NO_CACHE) != NO_CACHE:
            reference = 0.0  # a cache leaves less of the error to sparsity
        if self.kind == "budget":
            if reference and THRESHOLDS not in trial.user_attrs and "l1" not in trial.params:  # unless it is a retry
                trial.set_user_attr(REFERENCE, reference)
            if REFERENCE in trial.user_attrs:
                params |= {"reach": trial.suggest_float("reach", *TARGET_RANGE), REFERENCE: trial.user_attrs[REFERENCE]}
            else:
                params["l1"] = trial.suggest_float("l1", *BUDGETS, log=True)
            for group in self._groups()[1:]:
                params[f"weight_{group}"] = trial.suggest_float(f"weight_{group}", *WEIGHTS, log=True)
        else:
            for group in self._groups():
                params[f"simthreshd1_{group}"] = trial.suggest_float(f"simthreshd1_{group}", -1.0, 1.0)
                params[f"cdfthreshd_{group}"] = trial.suggest_float(f"cdfthreshd_{group}", 0.3, 1.0)
        for name, (_, (low, high, step)) in self._steps().items():
            params[name] = trial.suggest_float(name, low, high, step=step)
        for name, choices in self._choices().items():
            chosen = choices[0] if len(choices) == 1 else trial.suggest_categorical(name, choices)
            params[name] = choices[0] if chosen is None else chosen
        return params | {THRESHOLDS: source}

    def warm_start(self) -> list[Start]:
        """Return the first trials: calibrated policies at three budgets, and SpargeAttn's defaults.

        One threshold for all heads needs a larger budget to skip anything. The sampler sees the defaults at the lowest
        budget, which is nearest to their error.
        """
        if self.curves is None:
            return []
        if self.kind == "raw":
            default = self._raw(SPARGE_DEFAULTS.simthreshd1, SPARGE_DEFAULTS.cdfthreshd or 1.0)
            return [Start(default, DEFAULT), Start(self._raw(-1.0, 0.98))]
        if self.granularity in SHARING:  # which SpargeAttn's defaults are no choice of
            return [self.with_budget(2 * budget) for budget in INITIAL_BUDGETS]
        return [
            *(self.with_budget(budget) for budget in INITIAL_BUDGETS),
            Start(self.with_budget(BUDGETS[0]).params, DEFAULT),
        ]

    def with_budget(self, budget: float, cache: Mapping[str, Parameter] | None = None) -> Start:
        """Return the trial with one budget for all layers, weights of 1, the first choices and a cache's parameters."""
        weights: dict[str, Parameter] = {f"weight_{group}": 1.0 for group in self._groups()[1:]}
        return Start({"l1": budget} | weights | self._rest() | dict(cache or {}))

    def with_target(self, reach: float) -> Start:
        """Return the trial with a target of `reach` times the best sparsity, otherwise as `with_budget`."""
        params = self.with_budget(0.0).params
        del params["l1"]
        return Start(params | {"reach": reach})

    def budget_of(self, params: Mapping[str, Parameter], cache: Mapping[str, Parameter] | None = None) -> float | None:
        """Return the budget of a trial that is equal to `with_budget` of it and `cache`; None for any other trial."""
        if self.kind == "raw" or params.get(THRESHOLDS) != CALIBRATED or "l1" not in params:
            return None
        budget = float(params["l1"])
        return (
            budget
            if all(params.get(name) == value for name, value in self.with_budget(budget, cache).params.items())
            else None
        )

    def policy(self, params: Mapping[str, Parameter]) -> Policy:
        policy = self._thresholds(params)
        return policy if self.caches is None else replace(policy, cache=self.caches.cache(params))

    def _thresholds(self, params: Mapping[str, Parameter]) -> Policy:
        if params.get(THRESHOLDS) == DEFAULT:
            return Policy.uniform(self.layers)
        if self.curves is None or params.get(THRESHOLDS) == DENSE:
            return Policy.uniform(self.layers, HeadThresholds(-1.0, cdfthreshd=1.0, is_sparse=False))
        steepness, dense_fraction = float(params.get("steepness", 0.0)), float(params.get("dense_fraction", 0.0))
        keep_text, order = bool(params["keep_text"]), str(params["order"])
        if self.kind == "raw":
            schedule = self.sensitivity.schedule(dense_fraction, steepness)
            return Policy(self._raw_layers(params), schedule, order, keep_text, self.curves.select_partial)
        policy = allocate(
            self._candidates,
            float(params.get("l1", math.inf)),
            sparsity=float(params["reach"]) * float(params[REFERENCE]) if "reach" in params else 1.0,
            orders=self.orders if order == BEST else (order,),
            keep_text=keep_text,
            rule="topk" if params["rule"] == "topk" else "cdf",
            dense_fraction=dense_fraction,
            steepness=steepness,
            weights=[1.0, *(float(params[f"weight_{group}"]) for group in self._groups()[1:])],
            kernel=KernelCost.of(self.step),
            dense_last=float(params.get("dense_last", 0.0)),
            sharing=SHARING.get(self.granularity, "none"),
        )
        return with_pv(policy, PVTHRESHDS[1]) if params.get("pvthreshd") == PVTHRESHDS[1] else policy

    def predict(self, policy: Policy) -> Prediction:
        if self.curves is None or policy.is_dense:
            return Prediction()
        # What a cache will skip isn't known before.
        timed = self.step is not None and policy.cache is None
        seconds = predict_seconds(self._candidates, policy, self.step) if timed and self.step is not None else None
        return Prediction(predict(self._candidates, policy), seconds)

    @functools.cached_property
    def _candidates(self) -> CandidateTable:
        assert self.curves is not None
        return CandidateTable(self.curves, self.sensitivity)

    def _choices(self) -> dict[str, tuple[Parameter, ...]]:
        several = self.kind == "budget" and len(self.orders) > 1
        choices: dict[str, tuple[Parameter, ...]] = {"order": ((BEST,) if several else ()) + self.orders}
        if self.kind == "budget":
            choices |= {"rule": self.rules, "pvthreshd": PVTHRESHDS if self.skip_pv else PVTHRESHDS[:1]}
        return choices | {"keep_text": self.keep_text}

    def _steps(self) -> dict[str, tuple[float, tuple[float, float, float]]]:
        """Return the schedule's parameters: first value, and lowest, highest and step."""
        if not self.schedule:
            return {}
        shared = self.granularity in SHARING
        own = {"dense_last": (0.0, DENSE_LAST)} if shared else {"steepness": (STEEPNESS, STEEPNESSES)}
        return own | {"dense_fraction": (0.0, DENSE_FRACTIONS)}

    def _rest(self) -> dict[str, Parameter]:
        steps: dict[str, Parameter] = {name: first for name, (first, _) in self._steps().items()}
        without = {} if self.caches is None else {"cache": NO_CACHE}
        return steps | {name: choices[0] for name, choices in self._choices().items()} | without

    def _raw(self, simthreshd1: float, cdfthreshd: float) -> dict[str, Parameter]:
        params: dict[str, Parameter] = {}
        for group in self._groups():
            params |= {f"simthreshd1_{group}": simthreshd1, f"cdfthreshd_{group}": cdfthreshd}
        return params | self._rest()

    def _raw_layers(self, params: Mapping[str, Parameter]) -> tuple[LayerThresholds, ...]:
        groups, layers = self._groups(), self.layers
        found = []
        for index, (name, num_heads) in enumerate(layers):
            group = groups[phase(index, len(layers), len(groups))]
            head = HeadThresholds(float(params[f"simthreshd1_{group}"]), float(params[f"cdfthreshd_{group}"]))
            found.append(LayerThresholds.uniform(name, num_heads, head))
        return tuple(found)

    def _groups(self) -> list[str]:
        count = num_groups(self.granularity, len(self.layers))
        return ["all"] if count == 1 else [f"{index:02d}" for index in range(count)]


def num_groups(granularity: Granularity, num_layers: int) -> int:
    if granularity in ("group", "served"):
        return min(NUM_GROUPS, num_layers)
    return num_layers if granularity == "layer" else 1


def with_pv(policy: Policy, pvthreshd: float) -> Policy:
    """Set `pvthreshd` of every sparse head."""
    layers = tuple(
        replace(layer, heads=tuple(replace(head, pvthreshd=pvthreshd) if head.is_sparse else head
                                   for head in layer.heads))
        for layer in policy.layers
    )  # fmt: skip
    return replace(policy, layers=layers)
