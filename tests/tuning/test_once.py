"""Which process of a study saves and judges the winner in a folder."""

from pathlib import Path

import pytest

from sparsetune.checkpoint import Checkpoint, Manifest, save_checkpoint
from sparsetune.tuning.winner import CHECKPOINT, EVALUATION, WinnersFolder
from tests.tracking.recorded import policy_of


def judge(folder: Path, study: str, trial: int) -> None:
    """Leave what judging leaves."""
    settings = {"study_name": study, "trial": trial}
    save_checkpoint(Checkpoint(policy_of(0.9), Manifest(tuner="optuna", tuner_settings=settings)), folder / CHECKPOINT)
    (folder / EVALUATION).mkdir(exist_ok=True)
    result = folder / EVALUATION / "result.json"
    result.unlink(missing_ok=True)
    result.write_text("{}")


def test_while_one_judges_others_do_not(tmp_path: Path) -> None:
    one, other = WinnersFolder(tmp_path), WinnersFolder(tmp_path)
    with one.take("study", 3) as ours, other.take("study", 3) as theirs:
        assert ours and not theirs


def test_one_that_comes_when_the_winner_was_judged_since_it_began_does_not_judge_again(tmp_path: Path) -> None:
    one, other = WinnersFolder(tmp_path), WinnersFolder(tmp_path)
    with one.take("study", 3) as ours:
        assert ours
        judge(tmp_path, "study", 3)
    with other.take("study", 3) as ours:
        assert not ours


@pytest.mark.parametrize(("study", "trial"), [("study", 4), ("another study", 3)])
def test_another_winner_is_judged(tmp_path: Path, study: str, trial: int) -> None:
    folder = WinnersFolder(tmp_path)
    judge(tmp_path, "study", 3)
    with folder.take(study, trial) as ours:
        assert ours


def test_a_command_that_is_given_again_judges_again(tmp_path: Path) -> None:
    judge(tmp_path, "study", 3)
    with WinnersFolder(tmp_path).take("study", 3) as ours:
        assert ours


def test_one_that_died_while_it_judged_leaves_that_to_the_next(tmp_path: Path) -> None:
    folder = WinnersFolder(tmp_path)
    judge(tmp_path, "study", 3)
    for path in (tmp_path / EVALUATION).iterdir():  # the result is what is written last
        path.unlink()
    with folder.take("study", 3) as ours:
        assert ours
