"""Calibration: error and sparsity of attention calls under thresholds, measured in dense renderings."""
