"""The step caches of a search: parameters of a trial, and the settings that are tried first."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import optuna

from sparsetune.attention.step_cache import WITH_MAX_SKIPS, CacheKind, StepCache
from sparsetune.tuning.events import Parameter

NO_CACHE = "none"

FIRST = (0.0, 0.4, 0.1)
"""Lowest, highest and step of the fraction of steps at the start that aren't skipped."""

LAST = (0.0, 0.2, 0.1)
"""The same at the end."""

MAX_SKIPS = 10

_THRESHOLDS: Mapping[CacheKind, tuple[float, float]] = {
    "first_block": (0.03, 0.8), "mag": (0.02, 0.6), "sea": (0.05, 2.0),
}  # fmt: skip
"""Ranges; logarithmic scale."""

LADDERS: Mapping[CacheKind, tuple[tuple[float | None, int | None], ...]] = {
    "taylorseer": ((None, 1), (None, 2), (None, 3), (None, 5), (None, 8)),
    "mag": ((0.06, 1), (0.12, 2), (0.2, 3), (0.3, 4), (0.5, 5)),
    "first_block": ((0.08, None), (0.15, None), (0.25, None), (0.4, None), (0.6, None)),
    "sea": ((0.1, 1), (0.2, 2), (0.35, 3), (0.6, 4), (1.0, 6)),
}
"""Threshold and max_skips from gentle to aggressive."""


@dataclass(frozen=True)
class CacheSpace:
    """The kinds that are searched, and the ratios of MagCache."""

    kinds: tuple[CacheKind, ...]
    num_steps: int
    ratios: tuple[tuple[float, ...], ...] = ()

    def suggest(self, trial: optuna.Trial, optional: bool) -> dict[str, Parameter]:
        """Have the sampler choose a cache's parameters; `optional` where trials may have none."""
        choices = ((NO_CACHE,) if optional else ()) + self.kinds
        kind = choices[0] if len(choices) == 1 else trial.suggest_categorical("cache", choices)
        params: dict[str, Parameter] = {"cache": kind}
        if kind in _THRESHOLDS:
            name = f"{kind}_threshold"
            params[name] = trial.suggest_float(name, *_THRESHOLDS[kind], log=True)  # type: ignore[index]
        if kind in WITH_MAX_SKIPS:
            name = f"{kind}_skips"
            params[name] = trial.suggest_int(name, 1, MAX_SKIPS)
        if kind != NO_CACHE:
            for name, (low, high, step) in (("cache_first", FIRST), ("cache_last", LAST)):
                params[name] = trial.suggest_float(name, low, high, step=step)
        return params

    def cache(self, params: Mapping[str, Parameter]) -> StepCache | None:
        kind = str(params.get("cache", NO_CACHE))
        if kind == NO_CACHE:
            return None
        threshold, skips = params.get(f"{kind}_threshold"), params.get(f"{kind}_skips")
        return StepCache(
            kind,  # type: ignore[arg-type]
            None if threshold is None else float(threshold),
            None if skips is None else int(skips),
            first=round(float(params["cache_first"]), 9),
            last=round(float(params["cache_last"]), 9),
            ratios=self.ratios if kind == "mag" else (),
        )

    def rung(self, kind: CacheKind, index: int) -> dict[str, Parameter]:
        """Return the parameters of a kind's rung, 0 being the gentlest."""
        threshold, skips = LADDERS[kind][index]
        params: dict[str, Parameter] = {"cache": kind, "cache_first": self._first, "cache_last": 0.0}
        params |= {} if threshold is None else {f"{kind}_threshold": threshold}
        return params | ({} if skips is None else {f"{kind}_skips": skips})

    def next_rung(self, known: Iterable[tuple[CacheKind, int, bool]]) -> tuple[CacheKind, int] | None:
        """Return the kind and rung to try next, None where each kind's most aggressive one that passes is known.

        `known` has kind, rung, and whether it met the gate. Each ladder is bisected from its middle, the more
        aggressive of two rungs first; the kinds take turns, so that few trials suffice to compare them.
        """
        tried = list(known)
        for kind in sorted(self.kinds, key=lambda kind: sum(of == kind for of, _, _ in tried)):
            passed = [rung for of, rung, met in tried if of == kind and met]
            failed = [rung for of, rung, met in tried if of == kind and not met]
            low, high = max(passed, default=-1), min(failed, default=len(LADDERS[kind]))
            if high - low > 1:
                return kind, (low + high + 1) // 2
        return None

    @property
    def _first(self) -> float:
        """Early steps decide the layout; with few of them a larger part has to be computed."""
        return 0.3 if self.num_steps <= 12 else 0.2 if self.num_steps <= 30 else 0.1


def has_slack(excess_db: Sequence[float], costs: Sequence[float], wanted_db: float) -> int | None:
    """Return the index of the cheapest of those that exceed the gate by at least `wanted_db`, else of the cheapest.

    None where there is none.
    """
    order = sorted(range(len(costs)), key=lambda index: costs[index])
    return next((index for index in order if excess_db[index] >= wanted_db), order[0] if order else None)
