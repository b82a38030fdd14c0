"""The Optuna study over rendered video."""
