"""How long work in progress will still take, estimated from what was measured of it, and from nothing else."""

from dataclasses import dataclass

from sparsetune.cli.live.evaluation import EvaluationState
from sparsetune.cli.live.phase import Phase
from sparsetune.cli.live.search import JUDGE, TRIALS, SearchState

_JUDGED_RENDERINGS = 3
"""Of each eval prompt: dense, under the default thresholds, under the winner."""


@dataclass(frozen=True)
class TimeLeft:
    """An estimate.

    Args:
        phase: seconds for the phase in hand; None before anything of it was done.
        total: seconds for all that is left; None while a phase to come was never measured.
        basis: what it rests on, in words; empty where there is no estimate.
        at_most: whether less is likely, since trials that are given up early weren't measured yet.
    """

    phase: float | None = None
    total: float | None = None
    basis: str = ""
    at_most: bool = False


def evaluation_time_left(state: EvaluationState, now: float) -> TimeLeft:
    """Estimate an evaluation's end: its steps that are left at the mean time of those that were done."""
    left = state.phase.seconds_left(now)
    return TimeLeft(left, left, pace_text(state.phase, now, "step"))


def search_time_left(state: SearchState, now: float) -> TimeLeft:
    """Estimate a search's end.

    The phase in hand goes on at its own mean pace: seconds a step, or a trial, workers at once and trials that were
    given up early being in that mean. Phases to come are counted in renderings, at the mean time of those measured in
    trials or probes; renderings of a calibration, or to refine it, are measured while they run, so they foretell
    nothing. `max_minutes` ends a search at the latest.
    """
    phase = state.phase
    if phase is None:
        return TimeLeft()
    left = phase.seconds_left(now)
    if phase.name == JUDGE or left is None:
        return TimeLeft(left, left, pace_text(phase, now, "step"))
    rendering = rendering_seconds(state, now)
    until = None if state.deadline is None else max(0.0, state.deadline - now)
    searching, at_most = left, False
    if phase.name == TRIALS:
        basis = pace_text(phase, now, "trial") if state.ended else "the pace of the first trial"
    else:
        basis = pace_text(phase, now, "step")
        if rendering is not None:
            searching += (state.study.n_trials - state.study.num_done) * len(state.study.prompts) * rendering
            at_most = True
    if until is not None and until < searching:
        left, searching, basis, at_most = min(left, until), until, "--max-minutes ends the search", False
    if rendering is None:
        return TimeLeft(left, None, basis)
    judging = state.study.num_eval_prompts * _JUDGED_RENDERINGS * rendering
    return TimeLeft(left, searching + judging, basis, at_most)


def rendering_seconds(state: SearchState, now: float) -> float | None:
    """Mean seconds of one rendering: of the trials that ended, else of those in hand, else of the probes."""
    ended = [trial for trial in state.ended if trial.prompts]
    if ended:
        return sum(trial.seconds for trial in ended) / sum(len(trial.prompts) for trial in ended)
    running = [trial for trial in state.running.values() if trial.fraction]
    if running:
        renderings = sum(trial.fraction * trial.num_prompts for trial in running)
        return sum(now - trial.started for trial in running) / renderings
    probe = next((phase for phase in state.phases if phase.name == "probe"), None)
    pace = None if probe is None else probe.pace(now)
    return None if pace is None else pace * state.study.num_steps


def pace_text(phase: Phase, now: float, unit: str) -> str:
    """Say a phase's pace and over how many units it was measured; empty before any was done."""
    pace, worked = phase.pace(now), phase.done - phase.kept
    if pace is None:
        return ""
    number = f"{worked:.0f}" if float(worked).is_integer() else f"{worked:.1f}"
    return f"{pace:.3g} s a {unit} over {number} {unit}{'' if worked == 1 else 's'}"
