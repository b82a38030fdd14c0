"""One trial: a policy rendered on the tune prompts and judged against dense video."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from sparsetune.attention.policy import Policy
from sparsetune.attention.sparsify import SparseHandle
from sparsetune.errors import GenerationError
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.events import Side
from sparsetune.evaluation.pair import PromptResult, evaluate_prompt
from sparsetune.metrics import Gate
from sparsetune.models.generation import Renderer
from sparsetune.models.prompts import AnyPrompt
from sparsetune.tuning.bench import Bench
from sparsetune.tuning.events import (
    Parameter,
    TrialPrompt,
    TrialResult,
    TrialStarted,
    TrialState,
    TrialStep,
    TuningListener,
    tell,
)

METRICS = ("frame_cosine", "frame_l1", "psnr", "frame_diff", "psnr_frame_min")
"""What a trial measures on each prompt."""

GiveUp = Callable[[Sequence[PromptResult]], str | None]
"""Says why a trial isn't worth further prompts, or None where it is."""


class TimeIsUp(Exception):
    """The search's time ended in the middle of its work."""


@dataclass
class TrialRunner:
    """Renders and judges trials, one after the other, on one pipeline.

    Args:
        renderer: of the pipeline.
        handle: installed on it; its policy is set for each trial.
        prompts: tune prompts.
        seed: of every rendering.
        cache: the dense baselines.
        gate: constraints of the search.
        listeners: told what happens.
        predict: says what error calibration expects of a policy, None where it can't tell.
        deadline: `time.perf_counter()` after which no further prompt begins; None is never.
        results: the trials of this run, by number.
    """

    renderer: Renderer
    handle: SparseHandle
    prompts: tuple[AnyPrompt, ...]
    seed: int
    cache: BaselineCache
    gate: Gate
    listeners: Sequence[TuningListener] = ()
    predict: Callable[[Policy], float | None] = lambda _: None
    deadline: float | None = None
    results: dict[int, TrialResult] = field(default_factory=dict)

    @classmethod
    def of(cls, bench: Bench, handle: SparseHandle, predict: Callable[[Policy], float | None]) -> Self:
        """Run the trials of a search on its tune prompts."""
        return cls(
            renderer=bench.renderer,
            handle=handle,
            prompts=bench.prompts,
            seed=bench.config.tune.seed,
            cache=bench.cache,
            gate=bench.search_gate,
            listeners=bench.listeners,
            predict=predict,
        )

    def run(
        self, number: int, params: Mapping[str, Parameter], policy: Policy, give_up: GiveUp = lambda _: None
    ) -> TrialResult:
        """Render the tune prompts under a policy and judge them.

        Args:
            number: the trial's number.
            params: what led to the policy.
            policy: what to run.
            give_up: asked after each prompt with the results so far; a reason ends the trial as pruned.

        Raises:
            TimeIsUp: the deadline passed before all prompts were rendered.
        """
        started = time.perf_counter()
        tell(self.listeners, lambda listener: listener.on_trial_start(TrialStarted(number, params, policy)))
        self.handle.policy = policy
        results: list[PromptResult] = []
        state: TrialState = "complete"
        reason: str | None = None
        try:
            for index in range(len(self.prompts)):
                if self.deadline is not None and time.perf_counter() > self.deadline:
                    raise TimeIsUp
                results.append(self._judge(number, index))
                reason = give_up(results)
                if reason is not None:
                    state = "pruned"
                    break
        except GenerationError as error:
            state, reason = "failed", str(error)
        outcome = self._outcome(number, params, policy, results, state, reason, time.perf_counter() - started)
        self.results[number] = outcome
        return outcome

    def _judge(self, number: int, index: int) -> PromptResult:
        total = len(self.prompts)

        def watch(side: Side, step: int, num_steps: int, cached: bool) -> None:
            if side == "sparse":
                event = TrialStep(number, index, total, step, num_steps)
                tell(self.listeners, lambda listener: listener.on_step(event))

        result = evaluate_prompt(self.renderer, self.handle, self.prompts[index], self.seed, self.cache, METRICS, watch)
        if result.error is not None:
            raise GenerationError(result.error)
        tell(self.listeners, lambda listener: listener.on_prompt(TrialPrompt(number, index, total, result)))
        return result

    def _outcome(
        self,
        number: int,
        params: Mapping[str, Parameter],
        policy: Policy,
        results: Sequence[PromptResult],
        state: TrialState,
        reason: str | None,
        seconds: float,
    ) -> TrialResult:
        measured = bool(results)
        missing = shortfalls(results, self.gate) if measured else {}
        return TrialResult(
            number=number,
            params=dict(params),
            state=state,
            reason=reason,
            policy=policy,
            prompts=tuple(results),
            sparsity=mean_sparsity(results) if measured else None,
            psnr=mean(results, "psnr") if measured else None,
            psnr_worst=min(result.metrics["psnr"] for result in results) if measured else None,
            frame_cosine=mean(results, "frame_cosine") if measured else None,
            feasible=state == "complete" and all(shortfall <= 0 for shortfall in missing.values()),
            seconds=seconds,
            shortfalls=missing,
            seconds_sparse=sum(result.seconds_sparse or 0.0 for result in results) / len(results) if measured else None,
            predicted_error=self.predict(policy),
        )


def shortfalls(results: Sequence[PromptResult], gate: Gate) -> dict[str, float]:
    """Say by how much results miss each bound of the gate; at most 0 where a bound is met.

    Strict bounds (`above`) become ≤ constraints: a metric exactly at its bound is taken as met.
    """
    if not results:
        return {"psnr": math.inf, "frame_cosine": math.inf}
    missing = {
        "psnr": gate.min_psnr - mean(results, "psnr"),
        "frame_cosine": gate.min_frame_cosine - mean(results, "frame_cosine"),
    }
    if gate.min_psnr_worst is not None:
        missing["psnr_worst"] = gate.min_psnr_worst - min(result.metrics["psnr"] for result in results)
    if gate.min_psnr_frame is not None:
        missing["psnr_frame"] = gate.min_psnr_frame - min(result.metrics["psnr_frame_min"] for result in results)
    return missing


def mean(results: Sequence[PromptResult], metric: str) -> float:
    """Average a metric over prompts."""
    return sum(result.metrics[metric] for result in results) / len(results)


def mean_sparsity(results: Sequence[PromptResult]) -> float:
    """Average the sparsity over prompts."""
    return sum(result.sparsity or 0.0 for result in results) / len(results)
