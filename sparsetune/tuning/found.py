"""What a tuner found, before it is judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsetune.tuning.events import Insight, TrialResult, TuningResult
from sparsetune.tuning.goal import closest


@dataclass(frozen=True)
class Found:
    """The outcome of a tuner.

    Args:
        study_name: its study's name.
        trials: all trials, in order.
        best: the winner; None where there is none.
        calibration_path: the calibrated curves; None where nothing was calibrated.
        interrupted: whether Ctrl-C ended it before its time.
        insight: what the trials say of the search.
        num_elsewhere: trials that other processes still run.
    """

    study_name: str
    trials: Sequence[TrialResult]
    best: TrialResult | None
    calibration_path: Path | None = None
    interrupted: bool = False
    insight: Insight | None = None
    num_elsewhere: int = 0

    def result(self, seconds: float) -> TuningResult:
        """Give the result without what judging adds."""
        return TuningResult(
            study_name=self.study_name,
            trials=tuple(self.trials),
            best=self.best,
            closest=None if self.best else closest(self.trials),
            checkpoint_path=None,
            evaluation=None,
            calibration_path=self.calibration_path,
            seconds=seconds,
            interrupted=self.interrupted,
            insight=self.insight,
        )
