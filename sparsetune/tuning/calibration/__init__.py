"""Calibration: what thresholds do to attention calls, measured in dense renderings."""
