"""How an evaluation in progress is drawn."""

from rich.console import RenderableType
from rich.text import Text

from sparsetune.cli.clock import clock
from sparsetune.cli.live.evaluation import SIDES, EvaluationState
from sparsetune.cli.live.memory import Memory
from sparsetune.cli.live.parts import (
    NARROW,
    BarLine,
    Labelled,
    figures,
    left_text,
    line,
    listed,
    memory_rows,
    percent,
)
from sparsetune.cli.live.time_left import evaluation_time_left
from sparsetune.evaluation.events import PromptDone

JUDGED = {"tuned": "the tuned checkpoint", "default": "SpargeAttn's default thresholds"}
_LAST = 5
_FIXED_LINES = 8
"""Lines besides those of judged prompts: head, bar, prompt, rendering, mean, left, memory, the cursor's."""


def evaluation_rows(
    state: EvaluationState, title: str, now: float, memory: Memory, width: int, height: int
) -> list[RenderableType]:
    """Draw an evaluation of its own.

    Args:
        state: of it.
        title: what is evaluated.
        now: seconds of the state's clock.
        memory: what is held.
        width: columns there are.
        height: lines there are.
    """
    head = line((title, "bold"), f"  {JUDGED[state.policy]}  ", (clock(state.phase.seconds(now)), "dim"))
    left = Labelled("left", line(left_text(evaluation_time_left(state, now))))
    return [head, *judging(state, width, min(_LAST, height - _FIXED_LINES)), left, *memory_rows(memory)]


def judging(state: EvaluationState, width: int, num_last: int) -> list[RenderableType]:
    """Draw the prompt in hand, the mean so far and the prompts judged last."""
    rows: list[RenderableType] = [Labelled("done", _done(state, width))]
    if state.prompt is not None:
        text = " ".join(state.prompt.prompt.split())
        rows.append(Labelled("prompt", line(f"{state.prompt.index + 1}/{state.num_prompts}  {text}")))
        rows.append(Labelled("now", _now(state, width)))
    worst = state.worst
    if worst is not None:
        mean = figures(state.sparsity, state.mean("psnr"), worst.result.metrics.get("psnr"))
        rows.append(Labelled("so far", line((mean, "bold"), f", the worst is prompt {worst.index + 1}")))
    last = state.judged[-num_last:][::-1] if num_last > 0 else ()
    return [*rows, *listed("last", [_judged(one) for one in last])]


def _done(state: EvaluationState, width: int) -> RenderableType:
    fraction = state.phase.fraction
    text = f"{percent(fraction)}, {len(state.judged)} of {state.num_prompts} prompts"
    return line(text) if width < NARROW else BarLine(fraction, min(40, width - 40), Text(), line(text))


def _now(state: EvaluationState, width: int) -> RenderableType:
    if state.side is None:
        return line("measuring" if state.judged or state.phase.done else "starting")
    text = f"{SIDES[state.side]}, step {state.step}/{state.num_steps}"
    if width < NARROW:
        return line(text)
    return BarLine(state.step / state.num_steps, min(40, width - 40), Text(), line(text))


def _judged(one: PromptDone) -> RenderableType:
    result = one.result
    if result.error is not None:
        return line(f"prompt {one.index + 1}  ", ("failed", "red"), f": {result.error}")
    cosine = result.metrics.get("frame_cosine")
    more = "" if cosine is None else f", frame_cosine {cosine:.4f}"
    took = "" if result.seconds_sparse is None else f", {result.seconds_sparse:.1f} s"
    return line(f"prompt {one.index + 1}  {figures(result.sparsity, result.metrics.get('psnr'), None)}{more}{took}")
