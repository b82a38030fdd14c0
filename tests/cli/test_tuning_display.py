import io
from pathlib import Path

from rich.console import Console

from sparsetune.attention.policy import Policy
from sparsetune.cli.progress import ProgressBar
from sparsetune.cli.tuning_display import TuningDisplay, outcome_text
from sparsetune.cli.tuning_text import outcome_dict, tuning_text
from sparsetune.tuning.events import (
    CalibrationStep,
    StudyStarted,
    TrialResult,
    TrialStarted,
    TrialState,
    TrialStep,
    TuningResult,
)

POLICY = Policy.uniform([("transformer.blocks.0.attn1", 2)])


def trial(
    number: int, sparsity: float, psnr: float, state: TrialState = "complete", reason: str | None = None
) -> TrialResult:
    return TrialResult(
        number=number, params={"l1_all": 0.125, "order": "raster"}, state=state, reason=reason, policy=POLICY,
        prompts=(), sparsity=sparsity, psnr=psnr, psnr_worst=psnr - 1, frame_cosine=0.99,
        feasible=state == "complete" and psnr > 35, seconds=65.0,
    )  # fmt: skip


def outcome(*trials: TrialResult, best: TrialResult | None) -> TuningResult:
    return TuningResult(
        study_name="demo-1", trials=trials, best=best, closest=None if best else trials[0],
        checkpoint_path=Path("out/checkpoint") if best else None, evaluation=None,
        calibration_path=Path("out/calibration.npz"), seconds=130.0,
    )  # fmt: skip


def watch(console: Console) -> str:
    display = TuningDisplay(ProgressBar(console))
    display.on_study_start(StudyStarted("demo-1", "sqlite:///x.db", {}, 3, 1, ("a", "b"), 2, Path("out")))
    display.on_calibration_step(CalibrationStep(0, 1, 1, 1))
    for result in (trial(1, 0.3, 36.0), trial(2, 0.4, 30.0, "pruned", "psnr too low")):
        display.on_trial_start(TrialStarted(result.number, result.params, result.policy))
        for step in (1, 2):
            display.on_step(TrialStep(result.number, 0, 2, step, 2))
        display.on_trial(result)
    display.on_winner(trial(1, 0.3, 36.0), Path("out/checkpoint"))
    display.on_study_end(outcome(trial(1, 0.3, 36.0), best=trial(1, 0.3, 36.0)))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_plain_lines_tell_trial_best_sparsity_psnr_and_time_left() -> None:
    lines = watch(Console(file=io.StringIO(), force_terminal=False)).splitlines()
    best = "best: trial 2, sparsity 0.300, psnr 36.00 dB (worst 35.00)"
    assert lines == [
        "study demo-1: 3 trials, 1 of them done earlier, on 2 prompts",
        "calibrating on tune prompt 1/1",
        f"trial 2/3 (1:05): sparsity 0.300, psnr 36.00 dB (worst 35.00), meets the gate; {best}; 0:00 left",
        f"trial 3/3 (1:05): given up: psnr too low; {best}",
        "winner: trial 2, sparsity 0.300, psnr 36.00 dB (worst 35.00)",
        "judging SpargeAttn's default thresholds, then the winner, on the eval prompts",
    ]


def test_terminal_gets_a_bar() -> None:
    text = watch(Console(file=io.StringIO(), force_terminal=True, width=120))
    assert "calibrating, prompt 1/1" in text
    assert "trial 3/3, prompt 1/2" in text


def test_failed_trial_says_why() -> None:
    assert outcome_text(trial(0, 0.1, 30.0, "failed", "frames are black")) == "failed: frames are black"


def test_outcome_marks_the_winner_and_names_its_checkpoint() -> None:
    winner = trial(1, 0.3, 36.0)
    text = tuning_text(outcome(trial(0, 0.1, 34.0), winner, best=winner))
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "complete", "0.100", "34.00", "33.00", "0.9900", "missed", "1:05"] in rows
    assert ["2", "*", "complete", "0.300", "36.00", "35.00", "0.9900", "met", "1:05"] in rows
    assert "(l1_all 0.125, order raster)" in text
    assert "checkpoint: out/checkpoint" in text


def test_outcome_without_a_winner_says_so() -> None:
    result = outcome(trial(0, 0.1, 34.0), best=None)
    assert "no trial meets the gate" in tuning_text(result)
    value = outcome_dict(result)
    assert (value["best_trial"], value["closest_trial"], value["checkpoint_path"]) == (None, 0, None)
    assert value["trials"][0]["params"] == {"l1_all": 0.125, "order": "raster"}
