import io
import json
from pathlib import Path

import click
import pytest
from rich.console import Console

from sparsetune.cli.log import JsonLog, Log, TextLog
from sparsetune.cli.terminal import SteadyConsole
from sparsetune.cli.tuning_display import TuningDisplay, outcome_text
from sparsetune.cli.tuning_text import outcome_dict, tuning_text
from sparsetune.evaluation.events import PromptDone, PromptStarted
from sparsetune.executor import StepDone
from sparsetune.tuning.events import TrialResult, TuningResult
from tests.cli.live.events import FakeClock, evaluation, judged, prompt, start, step, study
from tests.cli.live.events import result as trial
from tests.cli.live.screen import PseudoTerminal


def outcome(*trials: TrialResult, best: TrialResult | None) -> TuningResult:
    return TuningResult(
        study_name="demo-1", trials=trials, best=best, closest=None if best else trials[0],
        checkpoint_path=Path("out/checkpoint") if best else None, evaluation=None,
        calibration_path=Path("out/calibration.npz"), seconds=130.0,
    )  # fmt: skip


def watch(log: Log, console: Console | None = None) -> TuningDisplay:
    """Two trials at once, of which one is given up; then the winner is judged."""
    time = FakeClock()
    display = TuningDisplay(log, console or Console(file=io.StringIO()), time)
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
    display = watch(TextLog())
    display.on_study_end(outcome(trial(1, 0.3, 36.0), best=trial(1, 0.3, 36.0)))
    best = "best: trial 1, sparsity 0.300, psnr 36.00 dB (worst 35.00)"
    assert capsys.readouterr().err.splitlines() == [
        "study demo-1: 3 trials, 1 of them done earlier, on 2 prompts",
        "calibrating on the tune prompts",
        "probing which parts of the generation bear sparsity",
        "trying policies on the tune prompts",
        "trial 2 (1:05): given up: psnr too low; 0:03 of trials left",
        f"trial 1 (1:05): sparsity 0.300, psnr 36.00 dB (worst 35.00), meets the gate; {best}",
        "winner: trial 1, sparsity 0.300, psnr 36.00 dB (worst 35.00)",
        "judging SpargeAttn's default thresholds, then the winner, on the eval prompts",
        "prompt 1/1: a red circle",
        "  frame_cosine 0.990000, psnr 38.00 dB, sparsity 0.250, dense cached, sparse 3.0 s",
    ]


def test_json_has_every_event_of_a_search() -> None:
    stream = io.StringIO()
    display = watch(JsonLog(stream=stream))
    display.on_study_end(outcome(trial(1, 0.3, 36.0), best=trial(1, 0.3, 36.0)))
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    phases = [one["phase"] for one in said if one["event"] == "phase"]
    assert phases == ["calibrate", "probe", "trials", "judge"]
    started = [(one["trial"], one["worker"]) for one in said if one["event"] == "trial_start"]
    assert started == [(1, "gpu-1:cuda:0"), (2, "gpu-2:cuda:0")]
    pruned, complete = (one for one in said if one["event"] == "trial_end")
    assert (pruned["trial"], pruned["state"], pruned["best_trial"]) == (2, "pruned", None)
    assert (complete["trial"], complete["feasible"], complete["best_trial"], complete["psnr"]) == (1, True, 1, 36.0)
    assert {"study_start", "trial_prompt", "progress", "winner", "evaluation_start"} < {one["event"] for one in said}
    assert (said[-1]["event"], said[-1]["best_trial"], said[-1]["interrupted"]) == ("study_end", 1, False)


def test_a_terminal_keeps_the_view_of_a_search_that_failed_and_no_other() -> None:
    terminal = PseudoTerminal()
    console = SteadyConsole(file=terminal.stream, width=80, height=24, _environ={"TERM": "xterm"})
    display = watch(TextLog(), console)
    display.on_study_end(outcome(trial(1, 0.3, 36.0), best=trial(1, 0.3, 36.0)))
    assert terminal.read().text == []
    display = watch(TextLog(), console)
    display.on_failure(KeyboardInterrupt())
    display.close()
    lines = terminal.read().text
    terminal.close()
    assert lines[0] == "tune demo  demo-1  0:20"
    assert "best    trial 1  sparsity 0.300, psnr 36.00 dB (worst 35.00)" in lines


def test_failed_trial_says_why() -> None:
    assert outcome_text(trial(0, 0.1, 30.0, "failed", "frames are black")) == "failed: frames are black"


def test_outcome_marks_the_winner_and_names_its_checkpoint() -> None:
    winner = trial(1, 0.3, 36.0)
    text = click.unstyle(tuning_text(outcome(trial(0, 0.1, 34.0), winner, best=winner)))
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


def test_refining_is_a_phase_of_calibrate(capsys: pytest.CaptureFixture[str]) -> None:
    display = TuningDisplay(TextLog(), Console(file=io.StringIO()), FakeClock())
    display.on_study_start(study(n_trials=1, tuner="calibrate"))
    display.on_step(StepDone("calibration", "dense", 10, 10, 0, 1))
    display.on_step(StepDone("refinement", "dense", 1, 10, 0, 1))
    assert capsys.readouterr().err.splitlines()[1:] == [
        "calibrating on the tune prompts",
        "searching every head's thresholds on the tune prompts",
    ]
