"""Which process of a study saves and evaluates the winner."""

from pathlib import Path

import pytest

from sparsetune.checkpoint import Checkpoint, Manifest, save_checkpoint
from sparsetune.tuning.tune import WinnerLock
from tests.tracking.recorded import policy_of


def judge(folder: Path, study: str, trial: int) -> None:
    """Write the files of an evaluation."""
    settings = {"study_name": study, "trial": trial}
    save_checkpoint(
        Checkpoint(policy_of(0.9), Manifest(tuner="optuna", tuner_settings=settings)), folder / "checkpoint"
    )
    (folder / "evaluation").mkdir(exist_ok=True)
    result = folder / "evaluation" / "result.json"
    result.unlink(missing_ok=True)
    result.write_text("{}")


def test_while_one_judges_others_do_not(tmp_path: Path) -> None:
    one, other = WinnerLock(tmp_path), WinnerLock(tmp_path)
    with one.acquire("study", 3) as ours, other.acquire("study", 3) as theirs:
        assert ours and not theirs


def test_one_that_comes_when_the_winner_was_judged_since_it_began_does_not_judge_again(tmp_path: Path) -> None:
    one, other = WinnerLock(tmp_path), WinnerLock(tmp_path)
    with one.acquire("study", 3) as ours:
        assert ours
        judge(tmp_path, "study", 3)
    with other.acquire("study", 3) as ours:
        assert not ours


@pytest.mark.parametrize(("study", "trial"), [("study", 4), ("another study", 3)])
def test_another_winner_is_judged(tmp_path: Path, study: str, trial: int) -> None:
    folder = WinnerLock(tmp_path)
    judge(tmp_path, "study", 3)
    with folder.acquire(study, trial) as ours:
        assert ours


def test_a_command_that_is_given_again_judges_again(tmp_path: Path) -> None:
    judge(tmp_path, "study", 3)
    with WinnerLock(tmp_path).acquire("study", 3) as ours:
        assert ours


def test_one_that_died_while_it_judged_leaves_that_to_the_next(tmp_path: Path) -> None:
    folder = WinnerLock(tmp_path)
    judge(tmp_path, "study", 3)
    for path in (tmp_path / "evaluation").iterdir():  # the result is written last
        path.unlink()
    with folder.acquire("study", 3) as ours:
        assert ours
