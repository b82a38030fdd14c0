"""How a search in progress is drawn."""

from rich.console import RenderableType
from rich.text import Text

from sparsetune.cli.clock import clock
from sparsetune.cli.live.evaluation_view import JUDGED, judging
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
from sparsetune.cli.live.phase import Phase
from sparsetune.cli.live.search import JUDGE, TRIALS, Running, SearchState
from sparsetune.cli.live.time_left import search_time_left
from sparsetune.tuning.events import TrialResult

_FIXED_LINES = 8
"""Lines besides those of trials: head, phases, bar, best, how many more are in hand, left, memory, the cursor's."""

_LAST = 5

_LEFT_FOR = {
    "calibrate": "calibrating",
    "refine": "refining",
    "search": "its search",
    "probe": "probing",
    TRIALS: "trials",
}


def search_rows(state: SearchState, now: float, memory: Memory, width: int, height: int) -> list[RenderableType]:
    """Draw a search.

    Args:
        state: of it.
        now: seconds of the state's clock.
        memory: what is held.
        width: columns there are.
        height: lines there are; trials that don't fit are counted instead.
    """
    head = line((f"tune {state.model}", "bold"), f"  {state.study.study_name}  ", (clock(now - state.started), "dim"))
    rows: list[RenderableType] = [head, Labelled("phase", _phases(state, now))]
    room = max(0, height - _FIXED_LINES)
    if state.evaluations:
        evaluation = state.evaluations[-1]
        rows += [Labelled("best", _best(state)), Labelled("judged", line(JUDGED[evaluation.policy]))]
        rows += judging(evaluation, width, min(_LAST, room - 4))
    else:
        rows += _trials(state, now, width, room)
    phase = state.phase
    of_phase = None if phase is None or phase.name == JUDGE else _LEFT_FOR[phase.name]
    return [*rows, Labelled("left", line(left_text(search_time_left(state, now), of_phase))), *memory_rows(memory)]


def _phases(state: SearchState, now: float) -> Text:
    """Name the phases: those that are done with their time, the one in hand, those to come."""
    parts: list[str | tuple[str, str]] = []
    begun = [place for place, phase in enumerate(state.phases) if phase.started is not None]
    for place, phase in enumerate(state.phases):
        if place:
            parts.append(" > ")
        if phase.running:
            parts.append((f"[{phase.name}]", "bold cyan"))
        elif phase.ended is not None:
            parts.append((f"{phase.name} {clock(phase.seconds(now))}", "green"))
        elif begun and place < begun[-1]:
            parts.append((f"{phase.name} kept", "green"))  # an earlier run has left what it would measure
        else:
            parts.append((phase.name, "dim"))
    return line(*parts)


def _trials(state: SearchState, now: float, width: int, room: int) -> list[Labelled]:
    """Draw the phase's bar, the best trial, those in hand, a line each, and those that ended last."""
    rows = [] if state.phase is None else [Labelled("done", _done(state, state.phase, width))]
    if not state.running and not state.ended:
        return rows
    running = list(state.running.values())
    shown = running[: max(1, room - (1 if state.ended else 0))]
    now_rows: list[RenderableType] = [_running(trial, now, width) for trial in shown]
    if len(running) > len(shown):
        now_rows.append(line((f"and {len(running) - len(shown)} more in hand", "dim")))
    last = min(_LAST, room - len(shown))
    ended = state.ended[-last:][::-1] if last > 0 else ()
    return [
        *rows,
        Labelled("best", _best(state)),
        *listed("now", now_rows),
        *listed("last", [_ended(trial) for trial in ended]),
    ]


def _done(state: SearchState, phase: Phase, width: int) -> RenderableType:
    if phase.name == TRIALS:
        text = f"{state.study.num_done + len(state.ended)} of {state.study.n_trials} trials"
        counts = ((state.num_pruned, "given up"), (state.num_failed, "failed"))
        text += "".join(f", {count} {what}" for count, what in counts if count)
    else:
        text = f"step {phase.done:.0f}/{phase.total or 0:.0f}"
    text = f"{percent(phase.fraction)}, {text}"
    return line(text) if width < NARROW else BarLine(phase.fraction, min(40, width - 55), Text(), line(text))


def _best(state: SearchState) -> Text:
    best = state.best
    if best is None:
        of_this_run = " of this run" if state.study.num_done else ""
        return line((f"no trial{of_this_run} meets the gate yet", "yellow"))
    return line((f"trial {best.number}", "bold green"), f"  {figures(best.sparsity, best.psnr, best.psnr_worst)}")


def _running(trial: Running, now: float, width: int) -> RenderableType:
    name = line((f"trial {trial.number:<3}", "bold"), " ")
    prompt = f"prompt {min(trial.index + 1, trial.num_prompts)}/{trial.num_prompts}"
    step = f"step {trial.step:>{len(str(trial.num_steps))}}/{trial.num_steps}"
    psnr = f"psnr {sum(trial.psnrs) / len(trial.psnrs):.1f} dB" if trial.psnrs else ""
    parts = (prompt, step, clock(now - trial.started), trial.worker or "", psnr)
    words = line("  ".join(part for part in parts if part))
    return name + words if width < NARROW else BarLine(trial.fraction, max(8, min(20, width - 65)), name, words)


def _ended(trial: TrialResult) -> Text:
    outcome, style = {
        "complete": ("met", "green") if trial.feasible else ("missed", "yellow"),
        "pruned": ("given up", "dim"),
        "failed": ("failed", "red"),
    }[trial.state]
    says = figures(trial.sparsity, trial.psnr, trial.psnr_worst) if trial.state == "complete" else str(trial.reason)
    return line(f"trial {trial.number:<3} {clock(trial.seconds):>5}  ", (f"{outcome:<8}", style), f"  {says}")
