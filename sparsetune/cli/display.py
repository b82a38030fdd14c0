"""Listeners that show an evaluation's progress and its metrics as they come."""

from sparsetune.cli.progress import ProgressBar
from sparsetune.cli.tables import metric_text
from sparsetune.evaluation.events import (
    EvaluationEnded,
    EvaluationListener,
    EvaluationStarted,
    PromptDone,
    PromptStarted,
    StepDone,
)
from sparsetune.evaluation.pair import PromptResult

_LINE = 110

SIDES = {"dense": "dense", "sparse": "sparse", "dense_again": "dense again", "kernel": "kernel at sparsity 0"}


class EvaluationDisplay(EvaluationListener):
    """Shows prompts and steps with the time left, and a line for each prompt that is done."""

    def __init__(self, bar: ProgressBar | None = None) -> None:
        self._bar = bar or ProgressBar()
        self._where = ""

    def on_start(self, event: EvaluationStarted) -> None:
        """Begin the bar: its steps are the denoising steps of all renderings."""
        total = len(event.prompts) * len(event.renderings) * event.num_steps
        self._bar.start(f"prompt 1/{len(event.prompts)}", total)

    def on_prompt_start(self, event: PromptStarted) -> None:
        """Name the prompt."""
        self._where = f"prompt {event.index + 1}/{event.num_prompts}"
        left = self._bar.time_left
        self._bar.line(f"{self._where}: {event.prompt}" + (f" ({left} left)" if left else ""))
        self._bar.advance(0, self._where)

    def on_step(self, event: StepDone) -> None:
        """Count a step; a cached video takes its steps out."""
        if event.cached:
            self._bar.skip(event.num_steps)
        else:
            self._bar.advance(1, f"{self._where}, {SIDES[event.side]}, step {event.step}/{event.num_steps}")

    def on_prompt(self, event: PromptDone) -> None:
        """Print the prompt's metrics, or why it has none."""
        for line in prompt_lines(event.result):
            self._bar.line(f"  {line}")

    def on_end(self, event: EvaluationEnded) -> None:
        """End the bar."""
        self._bar.stop()

    def on_failure(self, error: BaseException) -> None:
        """End the bar."""
        self._bar.stop()


def prompt_lines(result: PromptResult) -> list[str]:
    """Sum up a prompt: its metrics, sparsity and seconds, or its error; lines of some hundred characters."""
    if result.error is not None:
        return [f"failed: {result.error}"]
    parts = [metric_text(name, value) for name, value in result.metrics.items()]
    if result.sparsity is not None:
        parts.append(f"sparsity {result.sparsity:.3f}")
    if result.seconds_dense is not None and result.seconds_sparse is not None:
        dense = "cached" if result.dense_cached else f"{result.seconds_dense:.1f} s"
        parts.append(f"dense {dense}, sparse {result.seconds_sparse:.1f} s")
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) > _LINE:
            lines[-1] += ","
            lines.append(part)
        else:
            lines[-1] += f", {part}"
    return lines
