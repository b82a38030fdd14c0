"""Listener that shows the progress of an evaluation."""

from collections.abc import Iterable, Sequence

from rich.text import Text

from sparsetune.cli.progress import ProgressDisplay, Rows, latest_rows
from sparsetune.cli.tables import clock_text, figures_text, prompt_text
from sparsetune.evaluation import events
from sparsetune.executor import Incident, Side, StepDone

PHASE = "evaluation"
POLICIES = {"tuned": "the tuned checkpoint", "default": "SpargeAttn's default thresholds"}
SIDES = {
    "dense": "dense",
    "sparse": "sparse",
    "dense_again": "dense again",
    "kernel": "kernel at sparsity 0",
    "yardstick": "yardstick",
}


class EvaluationState:
    """State of a running evaluation; steps of sides that are expected in the cache are not counted."""

    def __init__(self, event: events.EvaluationStarted, cached: Sequence[Side] = ()) -> None:
        self.policy = "tuned" if event.config.get("use_tuned") else "default"
        self.num_prompts, self.num_steps, self.cached = len(event.prompts), event.num_steps, cached
        num_sides = sum(side not in cached for side in event.renderings)
        self.total, self.done = float(self.num_prompts * num_sides * self.num_steps), 0.0  # denoising steps
        self.prompt: events.PromptStarted | None = None
        self.rendering: StepDone | None = None  # None between renderings
        self.results: list[events.PromptDone] = []

    def on_step(self, event: StepDone) -> None:
        """Count a step; a rendering that unexpectedly is cached, or isn't, changes the total."""
        if event.cached:
            self.total -= 0 if event.side in self.cached else self.num_steps
            self.rendering = None
            return
        if event.step == 1:  # a yardstick may have another number of steps
            self.total += event.num_steps - (0 if event.side in self.cached else self.num_steps)
        self.done += 1
        self.rendering = event

    def on_prompt(self, event: events.PromptDone) -> None:
        """Keep a result; steps that a failed prompt didn't run count as done."""
        self.results.append(event)
        self.rendering = None
        if event.result.error is not None:
            self.done = max(self.done, self.total / self.num_prompts * len(self.results))

    def mean(self, metric: str) -> float | None:
        return _mean(one.result.metrics.get(metric) for one in self.results)

    @property
    def sparsity(self) -> float | None:
        return _mean(one.result.sparsity for one in self.results)

    @property
    def worst(self) -> events.PromptDone | None:
        measured = [one for one in self.results if one.result.error is None]
        return min(measured, key=lambda one: one.result.metrics.get("psnr", 0.0), default=None)

    def rows(self) -> Rows:
        rows: Rows = [("policy", POLICIES[self.policy])]
        if self.prompt is not None:
            text, step = " ".join(self.prompt.prompt.split()), self.rendering
            rendering = f"{SIDES[step.side]}, step {step.step}/{step.num_steps}" if step else "measuring"
            rows += [("prompt", f"{self.prompt.index + 1}/{self.num_prompts}  {text}"), ("rendering", rendering)]
        worst = self.worst
        if worst is not None:
            figures = figures_text(self.sparsity, self.mean("psnr"), worst.result.metrics.get("psnr"))
            rows.append(("mean", f"{figures}, the worst is prompt {worst.index + 1}"))
        return rows + latest_rows(self.results, _result_row)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _result_row(event: events.PromptDone) -> Text:
    result = event.result
    if result.error is not None:
        return Text.assemble(f"prompt {event.index + 1}  ", ("failed", "red"), f": {result.error}")
    cosine = result.metrics.get("frame_cosine")
    text = figures_text(result.sparsity, result.metrics.get("psnr"))
    text += "" if cosine is None else f", frame_cosine {cosine:.4f}"
    text += "" if result.seconds_sparse is None else f", {result.seconds_sparse:.1f} s"
    return Text(f"prompt {event.index + 1}  {text}")


class EvaluationProgress(events.EvaluationListener):
    """Shows consecutive evaluations as one phase; those after the first expect its dense videos in the cache."""

    def __init__(self, display: ProgressDisplay, num_evaluations: int = 1) -> None:
        self.display, self.num_evaluations = display, num_evaluations
        self.evaluations: list[EvaluationState] = []
        if num_evaluations == 1:
            display.add_phases({PHASE: ""})
            display.details = self.rows

    def on_start(self, event: events.EvaluationStarted) -> None:
        state = EvaluationState(event, ("dense",) if self.evaluations else ())
        self.evaluations.append(state)
        self.display.start_phase(PHASE, self.total)
        self._update()
        self.display.log_event("evaluation_start", f"evaluating {state.num_prompts} prompts", state)
        self.display.start()

    def on_prompt_start(self, event: events.PromptStarted) -> None:
        self.current.prompt, self.current.rendering = event, None
        left = self.display.time_left().total
        message = f"prompt {event.index + 1}/{event.num_prompts}: {event.prompt}"
        message += f" ({clock_text(left)} left)" if left else ""
        self.display.log_event("prompt_start", message, event)

    def on_step(self, event: StepDone) -> None:
        self.current.on_step(event)
        self._update()

    def on_incident(self, incident: Incident) -> None:
        self.display.log_event("incident", incident.text, incident)

    def on_prompt(self, event: events.PromptDone) -> None:
        self.current.on_prompt(event)
        self._update()
        numbers = {"prompt_index": event.index, "num_prompts": event.num_prompts}
        self.display.log_event(
            "prompt_end", f"  {prompt_text(event.result, self.display.event_log.verbose)}", event.result, **numbers
        )

    def on_end(self, event: events.EvaluationEnded) -> None:
        if len(self.evaluations) == self.num_evaluations:
            self.display.close()
        result = event.result
        self.display.log_event(
            "evaluation_end",
            f"evaluated: {result.verdict}",
            result,
            policy="tuned" if result.config.use_tuned else "default",
            score=result.overall_score,
            gate_passed=result.gate.passed,
            sparsity=result.sparsity.overall,
        )

    def on_failure(self, error: BaseException) -> None:
        """Leave the display on the screen, since no result follows."""
        self.display.close(keep=True)

    @property
    def current(self) -> EvaluationState:
        return self.evaluations[-1]

    @property
    def total(self) -> float:
        later = self.num_evaluations - len(self.evaluations)  # expected to render each prompt once
        return sum(one.total for one in self.evaluations) + later * self.current.num_prompts * self.current.num_steps

    def rows(self) -> Rows:
        return self.current.rows() if self.evaluations else []

    def _update(self) -> None:
        done = sum(one.done for one in self.evaluations)
        detail = f"{len(self.current.results)} of {self.current.num_prompts} prompts"
        self.display.on_progress(PHASE, done, self.total, detail)
