"""Run a search from Python with a custom listener.

    python examples/tune_from_python.py

All options of `sparsetune tune` are settings of `resolve`. Listeners receive the events of a search; MLflow tracking is
one of them. This is a short search with a stricter gate than the packaged one: three trials, evaluated on two prompts.
"""

from pathlib import Path

from sparsetune import resolve, tune
from sparsetune.tracking import TrackingListener
from sparsetune.tuning import TrialResult, TuningListener


class Printer(TuningListener):
    """Prints each finished trial."""

    def on_trial(self, result: TrialResult) -> None:
        """Print sparsity, PSNR and whether the gate is met."""
        if result.state == "complete":
            verdict = "meets the gate" if result.feasible else "misses the gate"
            print(f"trial {result.number + 1}: sparsity {result.sparsity:.3f}, {result.psnr:.1f} dB, {verdict}")
        else:
            print(f"trial {result.number + 1}: {result.state}, {result.reason}")


def main() -> None:
    """Run the search and print its result."""
    config = resolve("demo", flags={"tune.n_trials": 3, "eval.num_prompts": 2, "gate.min_psnr": 38.0})
    folder = Path("results/demo-from-python")
    result = tune(config, output_dir=folder, listeners=[Printer(), TrackingListener(config)])
    if result.best is None or result.evaluation is None:
        print("no trial meets the gate; allow more trials or lower the gate")
        return
    sparsity, psnr = result.evaluation.sparsity.overall, result.evaluation.statistics["psnr"].mean
    print(f"on eval prompts: sparsity {sparsity:.3f}, psnr {psnr:.1f} dB")
    print(f"checkpoint: {result.checkpoint_path}")


if __name__ == "__main__":
    main()
