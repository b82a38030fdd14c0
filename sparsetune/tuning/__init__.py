"""Searching for thresholds: calibrated curves, the study over rendered video, and what they tell listeners."""

from sparsetune.tuning.events import TrialResult, TuningListener, TuningResult
from sparsetune.tuning.tune import tune

__all__ = ["TrialResult", "TuningListener", "TuningResult", "tune"]
