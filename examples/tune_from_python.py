"""A search from Python, watched by a listener of your own.

    python examples/tune_from_python.py

Everything that `sparsetune tune` can be told is a setting of `resolve`; what happens is told to listeners, of which
MLflow's recording is one. It is a short search for a stricter gate than the packaged one: three trials, two prompts to
judge by.
"""

from pathlib import Path

from sparsetune import resolve, tune
from sparsetune.tracking import TrackingListener
from sparsetune.tuning import TrialResult, TuningListener


class Printer(TuningListener):
    """Prints each trial as it ends."""

    def on_trial(self, result: TrialResult) -> None:
        """Say how sparse it was, how near the dense videos, and whether it would pass."""
        if result.state == "complete":
            verdict = "meets the gate" if result.feasible else "misses the gate"
            print(f"trial {result.number + 1}: sparsity {result.sparsity:.3f}, {result.psnr:.1f} dB, {verdict}")
        else:
            print(f"trial {result.number + 1}: {result.state}, {result.reason}")


def main() -> None:
    """Search, and say what came of it."""
    config = resolve("demo", flags={"tune.n_trials": 3, "eval.num_prompts": 2, "gate.min_psnr": 38.0})
    folder = Path("results/demo-from-python")
    result = tune(config, output_dir=folder, listeners=[Printer(), TrackingListener(config)])
    if result.best is None or result.evaluation is None:
        print("no trial meets the gate: allow more of them, or a lower gate")
        return
    judged = result.evaluation
    print(f"on other prompts: sparsity {judged.sparsity.overall:.3f}, psnr {judged.statistics['psnr'].mean:.1f} dB")
    print(f"checkpoint: {result.checkpoint_path}")


if __name__ == "__main__":
    main()
