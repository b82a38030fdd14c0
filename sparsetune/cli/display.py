"""Listeners that show how an evaluation goes on."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console, RenderableType

from sparsetune.cli.clock import clock as clock_text
from sparsetune.cli.live.evaluation import EvaluationState
from sparsetune.cli.live.evaluation_view import evaluation_rows
from sparsetune.cli.live.memory import read_memory
from sparsetune.cli.live.outlet import Clock, Outlet
from sparsetune.cli.live.phase import Phase
from sparsetune.cli.live.time_left import TimeLeft, evaluation_time_left
from sparsetune.cli.log import Log
from sparsetune.cli.tables import metric_text
from sparsetune.evaluation.events import (
    EvaluationEnded,
    EvaluationListener,
    EvaluationStarted,
    PromptDone,
    PromptStarted,
)
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.executor import Incident, StepDone


class EvaluationFollower(EvaluationListener):
    """Keeps the state of an evaluation and says what happens.

    Args:
        outlet: where it is shown.
    """

    def __init__(self, outlet: Outlet) -> None:
        self.outlet = outlet
        self.state: EvaluationState | None = None

    def on_start(self, event: EvaluationStarted) -> None:
        """Begin the state."""
        state = self.begun(event)
        self.keep(state)
        self.outlet.say(
            "evaluation_start",
            f"judging {state.num_prompts} prompts",
            policy=state.policy,
            num_prompts=state.num_prompts,
            num_steps=state.num_steps,
        )

    def on_prompt_start(self, event: PromptStarted) -> None:
        """Name the prompt."""
        self._went_on(lambda state: state.prompt_started(event))
        left = self.left(self.outlet.clock()).total
        self.outlet.say(
            "prompt_start",
            f"prompt {event.index + 1}/{event.num_prompts}: {event.prompt}"
            + (f" ({clock_text(left)} left)" if left else ""),
            prompt_index=event.index,
            num_prompts=event.num_prompts,
            prompt=event.prompt,
        )

    def on_step(self, event: StepDone) -> None:
        """Count a step."""
        self._went_on(lambda state: state.stepped(event))
        self.outlet.pulse(self.phase, self.left)

    def on_incident(self, incident: Incident) -> None:
        """Say what happened to a worker."""
        self.outlet.say("incident", incident.text, change=incident.change, worker=incident.worker)

    def on_prompt(self, event: PromptDone) -> None:
        """Say the prompt's metrics, or why it has none."""
        self._went_on(lambda state: state.prompt_done(event))
        result = event.result
        self.outlet.say(
            "prompt_end",
            f"  {prompt_text(result)}",
            prompt_index=event.index,
            num_prompts=event.num_prompts,
            prompt=result.prompt,
            error=result.error,
            metrics=dict(result.metrics),
            sparsity=result.sparsity,
            seconds_dense=result.seconds_dense,
            seconds_sparse=result.seconds_sparse,
            dense_cached=result.dense_cached,
        )

    def on_end(self, event: EvaluationEnded) -> None:
        """Say what it came to."""
        result = event.result
        self.outlet.say(
            "evaluation_end",
            f"judged: {result.verdict}",
            policy="tuned" if result.config.use_tuned else "default",
            score=result.overall_score,
            verdict=result.verdict,
            gate_passed=result.gate.passed,
            sparsity=result.sparsity.overall,
        )

    def begun(self, event: EvaluationStarted) -> EvaluationState:
        """Give the state that an evaluation begins with."""
        return EvaluationState.begun(event, self.outlet.clock())

    def keep(self, state: EvaluationState) -> None:
        """Keep the next state."""
        self.state = state

    @property
    def phase(self) -> Phase | None:
        """The work in hand."""
        return None if self.state is None else self.state.phase

    def left(self, now: float) -> TimeLeft:
        """Estimate what is left."""
        return TimeLeft() if self.state is None else evaluation_time_left(self.state, now)

    def _went_on(self, change: Callable[[EvaluationState], EvaluationState]) -> None:
        if self.state is not None:
            self.keep(change(self.state))


class EvaluationDisplay(EvaluationFollower):
    """Shows an evaluation: prompts and steps with the time left, the figures so far.

    Args:
        log: of the command.
        title: what is evaluated.
        console: of stderr; None makes one.
        clock: gives seconds.
    """

    def __init__(self, log: Log, title: str = "eval", console: Console | None = None, clock: Clock = time.monotonic):
        super().__init__(Outlet(log, self._draw, console, clock))
        self._title = title

    def on_start(self, event: EvaluationStarted) -> None:
        """Begin to show it."""
        super().on_start(event)
        self.outlet.start()

    def on_end(self, event: EvaluationEnded) -> None:
        """End the view: the result follows."""
        self.outlet.stop()
        super().on_end(event)

    def on_failure(self, error: BaseException) -> None:
        """End the view, and leave what it showed last: no result tells it."""
        self.outlet.stop(keep=True)

    def close(self) -> None:
        """End the view, however the command ended."""
        self.outlet.stop()

    def _draw(self, width: int, height: int) -> Sequence[RenderableType]:
        if self.state is None:
            return ()
        return evaluation_rows(self.state, self._title, self.outlet.clock(), read_memory(), width, height)


def prompt_text(result: PromptResult) -> str:
    """Sum up a prompt in a line: its metrics, sparsity and seconds, or its error."""
    if result.error is not None:
        return f"failed: {result.error}"
    parts = [metric_text(name, value) for name, value in result.metrics.items()]
    if result.sparsity is not None:
        parts.append(f"sparsity {result.sparsity:.3f}")
    if result.seconds_dense is not None and result.seconds_sparse is not None:
        dense = "cached" if result.dense_cached else f"{result.seconds_dense:.1f} s"
        parts.append(f"dense {dense}, sparse {result.seconds_sparse:.1f} s")
    return ", ".join(parts)
