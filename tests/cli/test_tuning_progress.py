import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console
from rich.live_render import LiveRender
from rich.segment import Segment

from sparsetune.cli.console import Log
from sparsetune.cli.progress import SteadyConsole, TimeLeft
from sparsetune.cli.tables import outcome_text
from sparsetune.cli.tune import outcome_dict, tuning_text
from sparsetune.cli.tuning_progress import TuningProgress
from sparsetune.evaluation.events import PromptDone, PromptStarted
from sparsetune.executor import Phase, StepDone
from sparsetune.tuning.events import StudyState, TrialResult, TuningResult, Validation
from tests.cli.events import FakeClock, evaluation, judged, prompt, start, step, study
from tests.cli.events import result as trial
from tests.cli.screen import PseudoTerminal


def outcome(*trials: TrialResult, best: TrialResult | None) -> TuningResult:
    return TuningResult(
        study_name="demo-1", trials=trials, best=best, closest=None if best else trials[0],
        checkpoint_path=Path("out/checkpoint") if best else None, evaluation=None,
        calibration_path=Path("out/calibration.npz"), seconds=130.0,
    )  # fmt: skip


def watch(log: Log, console: Console | None = None) -> TuningProgress:
    """Two concurrent trials, one of them pruned; then the evaluation of the winner."""
    time = FakeClock()
    display = TuningProgress(log, console or Console(file=io.StringIO()), time)
    display.on_study_start(study(n_trials=3, num_done=1))
    display.on_step(StepDone("calibration", "dense", 10, 10, 0, 1))
    display.on_step(StepDone("sensitivity", "sparse", 10, 10, 0, 1))
    for number in (1, 2):
        display.on_trial_start(start(number, f"gpu-{number}:cuda:0"))
    for at in range(1, 11):
        time.now += 1.0
        for number in (1, 2):
            display.on_step(step(number, 0, at))
    display.on_prompt(prompt(2, 0, 30.0))
    display.on_trial(trial(2, 0.4, 30.0, "pruned", "psnr too low", num_prompts=1))
    time.now += 10.0
    display.on_prompt(prompt(1, 1, 36.0))
    display.on_trial(trial(1, 0.3, 36.0))
    display.on_winner(trial(1, 0.3, 36.0), Path("out/checkpoint"))
    (listener,) = display.evaluation_listeners()
    listener.on_start(evaluation(prompts=1))
    listener.on_prompt_start(PromptStarted(0, 1, "a red circle", 1))
    listener.on_step(StepDone("evaluation", "sparse", 1, 10, 0, 4))
    listener.on_prompt(PromptDone(0, 1, judged()))
    return display


def test_plain_lines_tell_trial_best_sparsity_psnr_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    display = watch(Log())
    display.on_study_end(outcome(trial(1, 0.3, 36.0), best=trial(1, 0.3, 36.0)))
    best = "best: trial 1, sparsity 0.300, psnr 36.00 dB (worst 35.00)"
    assert capsys.readouterr().err.splitlines() == [
        "study demo-1: 3 trials, 1 of them done earlier, on 2 prompts",
        "calibrating on the tune prompts",
        "measuring how sensitive each part of the generation is",
        "running trials on the tune prompts",
        "trial 2 (1:05): pruned: psnr too low; 0:03 of trials left",
        f"trial 1 (1:05): sparsity 0.300, psnr 36.00 dB (worst 35.00), meets the gate; {best}",
        "winner: trial 1, sparsity 0.300, psnr 36.00 dB (worst 35.00)",
        "evaluating SpargeAttn's default thresholds, then the winner, on the eval prompts",
        "prompt 1/1: a red circle",
        "  psnr 38.00 dB, frame_cosine 0.990000, sparsity 0.250, dense cached, sparse 3.0 s",
    ]


def test_json_has_every_event_of_a_search() -> None:
    stream = io.StringIO()
    display = watch(Log("json", stream=stream))
    display.on_study_end(outcome(trial(1, 0.3, 36.0), best=trial(1, 0.3, 36.0)))
    events_logged = [json.loads(line) for line in stream.getvalue().splitlines()]
    phases = [one["phase"] for one in events_logged if one["event"] == "phase"]
    assert phases == ["calibration", "sensitivity", "trials", "evaluation"]
    started = [(one["trial"], one["worker"]) for one in events_logged if one["event"] == "trial_start"]
    assert started == [(1, "gpu-1:cuda:0"), (2, "gpu-2:cuda:0")]
    pruned, complete = (one for one in events_logged if one["event"] == "trial_end")
    assert (pruned["trial"], pruned["state"], pruned["best_trial"]) == (2, "pruned", None)
    assert (complete["trial"], complete["feasible"], complete["best_trial"], complete["psnr"]) == (1, True, 1, 36.0)
    assert {"study_start", "trial_prompt", "progress", "winner", "evaluation_start"} < {
        one["event"] for one in events_logged
    }
    assert (events_logged[-1]["event"], events_logged[-1]["best_trial"], events_logged[-1]["interrupted"]) == (
        "study_end",
        1,
        False,
    )


def test_a_terminal_keeps_the_view_of_a_search_that_failed_and_no_other() -> None:
    terminal = PseudoTerminal()
    console = SteadyConsole(file=terminal.stream, width=80, height=24, _environ={"TERM": "xterm"})
    display = watch(Log(), console)
    display.on_study_end(outcome(trial(1, 0.3, 36.0), best=trial(1, 0.3, 36.0)))
    assert terminal.read().text == []
    display = watch(Log(), console)
    display.on_failure(KeyboardInterrupt())
    display.display.close()
    lines = terminal.read().text
    terminal.close()
    assert lines[0] == "tune demo  demo-1  0:20"
    assert "best        trial 1  sparsity 0.300, psnr 36.00 dB (worst 35.00)" in lines


def test_failed_trial_says_why() -> None:
    assert outcome_text(trial(0, 0.1, 30.0, "failed", "frames are black")) == "failed: frames are black"


def test_outcome_marks_the_winner_and_names_its_checkpoint() -> None:
    winner = trial(1, 0.3, 36.0)
    text = click.unstyle(tuning_text(outcome(trial(0, 0.1, 34.0), winner, best=winner), verbose=True))
    rows = [line.split() for line in text.splitlines()]
    assert ["0", "complete", "0.100", "34.00", "33.00", "0.9900", "missed", "1:05"] in rows
    assert ["1", "*", "complete", "0.300", "36.00", "35.00", "0.9900", "met", "1:05"] in rows
    assert "(l1_all 0.125, order raster)" in text
    assert "checkpoint: out/checkpoint" in text


def test_outcome_without_a_winner_says_so() -> None:
    result = outcome(trial(0, 0.1, 34.0), best=None)
    assert "no trial meets the gate" in tuning_text(result)
    value = outcome_dict(result)
    assert (value["best_trial"], value["closest_trial"], value["checkpoint_path"]) == (None, 0, None)
    assert value["trials"][0]["params"] == {"l1_all": 0.125, "order": "raster"}


def test_refinement_is_a_phase_of_calibrate(capsys: pytest.CaptureFixture[str]) -> None:
    display = TuningProgress(Log(), Console(file=io.StringIO()), FakeClock())
    display.on_study_start(study(n_trials=1, tuner="calibrate"))
    display.on_step(StepDone("calibration", "dense", 10, 10, 0, 1))
    display.on_step(StepDone("refinement", "dense", 1, 10, 0, 1))
    assert capsys.readouterr().err.splitlines()[1:] == [
        "calibrating on the tune prompts",
        "searching every head's thresholds on the tune prompts",
    ]


def test_waiting_names_what_another_process_does(capsys: pytest.CaptureFixture[str]) -> None:
    TuningProgress(Log(), Console(file=io.StringIO()), FakeClock()).on_wait("3 trials")
    assert capsys.readouterr().err == "waiting for another process: 3 trials\n"


class Search:
    """A tuning with a clock that the test advances, and its rendered view."""

    def __init__(self, width: int = 80, height: int = 24, encoding: str = "utf-8", **options: Any) -> None:
        self.clock, self.file = FakeClock(), io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        self.start = self.clock.now
        self.console = Console(file=self.file, width=width, height=height, force_terminal=True, color_system=None)
        self.listener = TuningProgress(Log(quiet=True), self.console, self.clock)
        self.listener.on_study_start(study(**options))

    def at(self, seconds: float) -> TuningProgress:
        self.clock.now = self.start + seconds
        return self.listener

    def trial(self, number: int, begin: float, end: float, **figures: Any) -> None:
        self.at(begin).on_trial_start(start(number))
        self.at(end).on_trial(trial(number, **figures))

    @property
    def phases(self) -> dict[str, str]:
        return {
            name: "ended" if task.stop_time is not None else "running" if task.started else "none"
            for name, task in self.listener.display.phases.items()
        }

    @property
    def left(self) -> TimeLeft:
        return self.listener.time_left()

    def view(self) -> list[str]:
        with self.console.capture() as capture:
            self.console.print(self.listener.display)
        return [line.rstrip() for line in capture.get().splitlines()]


def counted(phase: Phase, at: int, index: int = 0, num: int = 4) -> StepDone:
    return StepDone(phase, "sparse", at, 10, index, num)


def test_phases_follow_one_another_as_their_events_come() -> None:
    search = Search()
    search.at(1.0).on_step(counted("calibration", 1, num=2))
    assert search.phases == {"calibration": "running", "sensitivity": "none", "trials": "none", "evaluation": "none"}
    search.at(20.0).on_step(counted("calibration", 10, 1, 2))
    search.at(23.0).on_step(counted("sensitivity", 1))
    assert search.phases == {"calibration": "ended", "sensitivity": "running", "trials": "none", "evaluation": "none"}
    assert search.listener.display.phases["calibration"].elapsed == 20.0
    assert search.listener.display.phases["sensitivity"].start_time == search.start + 20.0
    search.at(50.0).on_trial_start(start(0))
    assert search.phases["sensitivity"] == "ended" and search.phases["trials"] == "running"
    search.at(60.0).on_winner(trial(0), Path("out"))
    assert search.phases["trials"] == "ended" and search.phases["evaluation"] == "running"


def test_a_timed_step_belongs_to_no_phase_that_is_shown() -> None:
    search = Search()
    search.at(30.0).on_step(StepDone("preparation", "dense", 5, 5))
    search.at(31.0).on_step(counted("calibration", 1, num=2))
    assert list(search.phases) == ["calibration", "sensitivity", "trials", "evaluation"]
    assert search.listener.display.phases["calibration"].start_time == search.start + 30.0


def test_phases_that_an_earlier_run_has_measured_never_begin() -> None:
    search = Search(num_done=3)
    search.at(1.0).on_trial_start(start(3))
    assert search.phases == {"calibration": "none", "sensitivity": "none", "trials": "running", "evaluation": "none"}
    assert "reused      calibration, sensitivity" in search.view()


def test_every_tuner_has_phases_of_its_own() -> None:
    search = Search(tuner="calibrate")
    assert list(search.phases) == ["calibration", "refinement", "trials", "evaluation"]
    search.at(1.0).on_step(counted("calibration", 10, 1, 2))
    search.at(5.0).on_step(counted("refinement", 1, 1, 2))
    refinement = search.listener.display.phases["refinement"]
    assert search.phases["refinement"] == "running"
    assert (refinement.completed, refinement.fields["reused"], refinement.total) == (11.0, 10.0, 20.0)
    assert refinement.start_time == search.start + 1.0
    search = Search(tuner="builtin")
    search.at(1.0).on_step(counted("calibration", 5, 0, 1))
    assert search.phases == {"calibration": "running", "trials": "none", "evaluation": "none"}


def test_trials_at_once_are_kept_apart_by_number() -> None:
    search = Search()
    search.at(0.0).on_trial_start(start(0, "a:cuda:0"))
    search.at(1.0).on_trial_start(start(1, "b:cuda:1"))
    search.at(2.0).on_step(step(1, 0, 4))
    search.at(3.0).on_step(step(0, 1, 5))
    search.at(4.0).on_prompt(prompt(1, 0, 37.5))
    rows = [line for line in search.view() if line.startswith("trial ")]
    assert rows[0].startswith("trial 0 ") and rows[0].endswith("prompt 2/2  step 5/10  a:cuda:0")
    assert "75%" in rows[0]
    assert rows[1].startswith("trial 1 ") and "prompt 2/2  step 0/10  b:cuda:1" in rows[1]
    assert "psnr 37.5 dB" in " ".join(" ".join(search.view()).split())
    assert search.listener.display.phases["trials"].completed == 0.75 + 0.5
    search.at(5.0).on_trial(trial(1))
    assert list(search.listener.running) == [0]
    assert search.listener.display.phases["trials"].completed == 1.75


def test_a_trial_that_another_worker_takes_over_begins_anew() -> None:
    search = Search()
    search.at(0.0).on_trial_start(start(0, "a"))
    search.at(1.0).on_step(step(0, 1, 5))
    search.at(2.0).on_trial_start(start(0, "b"))
    (again,) = search.listener.running.values()
    assert (again.fields["worker"], again.completed) == ("b", 0.0)
    assert len([line for line in search.view() if line.startswith("trial ")]) == 1


def test_events_of_trials_that_are_not_running_change_nothing() -> None:
    search = Search()
    search.listener.on_step(step(7, 0, 1))
    search.listener.on_prompt(prompt(7, 0, 40.0))
    assert search.listener.running == {} and search.phases["trials"] == "none"


def test_the_best_is_what_the_search_would_choose() -> None:
    search = Search()
    for outcome in (trial(0, 0.2, 40.0), trial(1, 0.3, 36.0), trial(2, 0.5, 30.0), trial(3, None, None, "failed")):
        search.listener.on_trial_start(start(outcome.number))
        search.listener.on_trial(outcome)
    assert search.listener.best is not None and search.listener.best.number == 1


def test_a_winner_of_an_earlier_run_is_the_best() -> None:
    search = Search(num_done=12)
    search.listener.on_winner(trial(4, 0.4, 37.0), Path("out"))
    assert search.listener.best is not None and search.listener.best.number == 4


def test_the_best_of_earlier_runs_is_shown_on_resume(capsys: pytest.CaptureFixture[str]) -> None:
    class Earlier(StudyState):
        def earlier(self) -> tuple[TrialResult, ...]:
            return (trial(0, 0.2, 40.0), trial(3, 0.35, 37.0))

    display = TuningProgress(Log(), Console(file=io.StringIO()), FakeClock())
    display.on_study_start(replace(study(n_trials=6, num_done=2), study=Earlier()))
    assert capsys.readouterr().err == (
        "study demo-1: 6 trials, 2 of them done earlier, on 2 prompts; "
        "best so far: trial 3, sparsity 0.350, psnr 37.00 dB (worst 36.00)\n"
    )
    display.on_trial_start(start(4))
    display.on_trial(trial(4, 0.3, 36.0))
    assert display.best is not None and display.best.number == 3
    assert "3 trials are saved; now evaluating the best, trial 3, about " in display.answer()
    display.on_winner(trial(3, 0.35, 37.0), Path("out"))
    assert "saved, and the winner's checkpoint" in display.answer()


def test_ctrl_c_before_any_trial_says_what_is_kept() -> None:
    display = TuningProgress(Log(), Console(file=io.StringIO()), FakeClock())
    assert "nothing was rendered yet" in display.answer()
    display.on_study_start(study())
    assert display.answer() == "stopping, which takes some seconds; prompts that are calibrated are saved"


def test_the_second_evaluation_is_expected_to_render_no_dense_video() -> None:
    search = Search()
    search.listener.on_winner(trial(0), Path("out"))
    (listener,) = search.listener.evaluation_listeners()
    phase = search.listener.display.phases["evaluation"]
    listener.on_start(evaluation(use_tuned=False))
    assert phase.total == 4 * 2 * 10 + 4 * 10
    listener.on_step(StepDone("evaluation", "dense", 10, 10, 0, 4, cached=True))
    assert phase.total == 110
    listener.on_start(evaluation())
    assert phase.total == 70 + 40


def test_a_calibration_foretells_itself_alone() -> None:
    search = Search()
    search.at(10.0).on_step(counted("calibration", 5, num=2))
    assert search.left.phase == pytest.approx(10.0 / 1 * 15)  # the first event seen was for the fifth step
    assert search.left.total is None


def test_sensitivity_foretells_trials_and_evaluation_by_its_renderings() -> None:
    search = Search(n_trials=3)
    for at in range(1, 11):
        search.at(float(at)).on_step(counted("sensitivity", at))
    assert search.left.phase == 30.0
    # 3 trials of 2 prompts, and 4 eval prompts in 3 renderings each, at 10 s a rendering
    assert search.left.total == 30.0 + 60.0 + 120.0
    assert search.left.at_most and search.left.basis == "1 s a step over 10 steps"


def test_trials_go_on_at_the_rate_at_which_they_end_workers_at_once_included() -> None:
    search = Search(n_trials=10)
    search.at(0.0).on_trial_start(start(0))
    search.at(0.0).on_trial_start(start(1))
    search.at(20.0).on_trial(trial(0, seconds=20.0))
    search.at(20.0).on_trial(trial(1, seconds=20.0))
    assert search.left.phase == 80.0
    # The evaluation uses one process, so a rendering takes as long as in a trial.
    assert search.left.total == 80.0 + 4 * 3 * 10.0
    assert search.left.basis == "10 s a trial over 2 trials"


def test_the_first_trial_foretells_by_its_own_steps() -> None:
    search = Search(n_trials=2)
    search.at(0.0).on_trial_start(start(0))
    search.at(5.0).on_step(step(0, 0, 5))
    assert (search.left.phase, search.left.total) == (5.0 / 0.25 * 1.75, 35.0 + 4 * 3 * 10.0)


def test_validation_is_a_phase_before_the_evaluation_and_is_foretold() -> None:
    search = Search(n_trials=1, num_validation_prompts=3)
    assert list(search.phases) == ["calibration", "sensitivity", "trials", "validation", "evaluation"]
    search.at(0.0).on_trial_start(start(0))
    search.at(10.0).on_step(step(0, 1, 0))
    assert (search.left.phase, search.left.total) == (10.0, 10.0 + 2 * 3 * 10.0 + 4 * 3 * 10.0)
    search.at(20.0).on_trial(trial(0, seconds=20.0))
    for at in range(1, 11):
        search.at(20.0 + at).on_step(counted("validation", at, num=6))
    assert (search.left.phase, search.left.total) == (50.0, 50.0 + 4 * 3 * 10.0)
    search.at(80.0).on_validation(Validation(0, 3, 35.0, 30.0, False))
    search.at(90.0).on_winner(trial(0), Path("out"))
    assert search.phases["validation"] == "ended" and search.phases["evaluation"] == "running"


def test_plain_lines_tell_how_a_trial_did_on_the_validation_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    listener = TuningProgress(Log())
    listener.on_study_start(study(num_validation_prompts=3))
    listener.on_validation(Validation(4, 3, 35.0, 30.25, False))
    listener.on_validation(Validation(5, 3, None, None, False))
    listener.on_validation(Validation(6, 3, 38.0, 36.0, True))
    assert capsys.readouterr().err.splitlines()[-3:] == [
        "trial 4 misses the gate on the validation prompts: psnr 35.00 dB (worst 30.25)",
        "trial 5 misses the gate on the validation prompts",
        "trial 6 meets the gate on the validation prompts: psnr 38.00 dB (worst 36.00)",
    ]


def test_max_minutes_ends_the_search_but_not_the_evaluation() -> None:
    search = Search(n_trials=100, max_minutes=1.0)
    search.trial(0, 0.0, 20.0, seconds=20.0)
    assert (search.left.phase, search.left.total) == (40.0, 40.0 + 120.0)
    assert search.left.basis == "--max-minutes ends the search"


def test_trials_of_earlier_runs_are_not_waited_for() -> None:
    search = Search(n_trials=10, num_done=8)
    search.trial(8, 0.0, 20.0, seconds=20.0)
    assert search.left.phase == 20.0


def test_before_anything_is_done_nothing_is_foretold() -> None:
    search = Search()
    search.at(9.0)
    assert search.left.phase is None


def searching(running: int = 1, **terminal: Any) -> Search:
    search = Search(num_done=1, **terminal)
    search.at(2.0).on_step(counted("calibration", 1, num=2))
    search.at(22.0).on_step(counted("sensitivity", 1))
    search.at(40.0)
    outcomes = [trial(1, 0.218, 40.85), trial(2, 0.466, 30.47, "pruned", "psnr 30.5 dB after 1 of 2 prompts")]
    for outcome in [*outcomes, trial(3, None, None, "failed", "all frames are black")]:
        search.trial(outcome.number, 40.0, 60.0, **_figures(outcome))
    for number in range(4, 4 + running):
        search.at(60.0).on_trial_start(start(number, f"gpu-{number}:cuda:0" if running > 1 else None))
        search.at(65.0).on_step(step(number, 1, 6))
    if running:
        search.at(65.0).on_prompt(prompt(4, 0, 38.0))
    search.at(70.0)
    return search


def _figures(outcome: TrialResult) -> dict[str, Any]:
    return {"sparsity": outcome.sparsity, "psnr": outcome.psnr, "state": outcome.state, "reason": outcome.reason}


def evaluating(**terminal: Any) -> Search:
    search = searching(0, **terminal)
    search.listener.on_winner(trial(1, 0.218, 40.85), Path("out"))
    (listener,) = search.listener.evaluation_listeners()
    listener.on_start(evaluation(use_tuned=False))
    listener.on_prompt_start(PromptStarted(0, 4, "a red circle", 1))
    search.at(75.0)
    listener.on_prompt(PromptDone(0, 4, judged(37.0)))
    listener.on_prompt_start(PromptStarted(1, 4, "a blue square", 1))
    listener.on_step(StepDone("evaluation", "sparse", 6, 10, 1, 4))
    search.at(80.0)
    return search


def test_a_search_shows_phases_best_trials_time_and_memory() -> None:
    lines = searching().view()
    text = "\n".join(lines)
    assert lines[0] == "tune demo  demo-1  1:10"
    assert [line.split()[0] for line in lines[1:4]] == ["calibration", "sensitivity", "trials"]
    assert "0:00:02" in lines[1] and "0:00:20" in lines[2]
    assert " 32%" in lines[3] and "4 of 12 trials, 1" in lines[3]
    assert "next        evaluation" in lines
    assert "left        1:04 for trials, 7:34 in total (8.57 s a trial over 3.5 trials)" in lines
    assert "memory      process " in text
    assert "best        trial 1  sparsity 0.218, psnr 40.85 dB (worst 39.85)" in lines
    assert "latest      trial 3    1:05  failed  all frames are black" in lines
    assert "            trial 2    1:05  pruned  psnr 30.5 dB after 1 of 2 prompts" in lines
    assert "            trial 1    1:05  met     sparsity 0.218, psnr 40.85 dB (worst 39.85)" in lines
    assert " ".join(text[text.index("trial 4") :].split()).endswith("prompt 2/2 step 0/10 psnr 38.0 dB")


def test_an_evaluation_of_the_winner_shows_whose_videos_they_are_and_the_figures_so_far() -> None:
    lines = evaluating().view()
    assert "policy      SpargeAttn's default thresholds" in lines
    assert "prompt      2/4  a blue square" in lines
    assert "rendering   sparse, step 6/10" in lines
    assert "best        trial 1  sparsity 0.218, psnr 40.85 dB (worst 39.85)" in lines
    assert any(line.startswith("mean        sparsity 0.250, psnr 37.00 dB") for line in lines)


@pytest.mark.parametrize(("width", "height"), [*itertools.product((1, 20, 40, 60, 80, 140), (4, 12, 50))])
def test_every_view_fits_the_terminal(width: int, height: int) -> None:
    terminal = {"width": width, "height": height}
    for search in (Search(**terminal), searching(1, **terminal), searching(9, **terminal), evaluating(**terminal)):
        options = search.console.options
        drawn = LiveRender(search.listener.display.get_renderable(), vertical_overflow="ellipsis")
        lines = search.console.render_lines(drawn, options, pad=False)
        assert 0 < len(lines) <= height
        assert max(Segment.get_line_length(line) for line in lines) <= width


def test_a_narrow_terminal_keeps_time_left_and_best() -> None:
    text = " ".join(" ".join(searching(width=40).view()).split())
    assert "1:04 for trials" in text and "sparsity 0.218, psnr 40.85" in text


def test_a_terminal_without_unicode_gets_plain_bars() -> None:
    search = evaluating(encoding="ascii")
    search.console.print(search.listener.display)
    search.file.flush()
    assert b"----" in search.file.buffer.getvalue()  # type: ignore[attr-defined]
