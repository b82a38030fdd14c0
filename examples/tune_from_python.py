"""Tune the demo model from Python, with a listener of one's own.

    python examples/tune_from_python.py

All settings of `sparsetune tune` are keywords. Listeners receive the events of a search; the progress shown and the
runs in MLflow come from two of them. This is a short search with a stricter gate than the packaged one: three trials,
evaluated on two prompts.
"""

from sparsetune import tune
from sparsetune.tuning import TrialResult, TuningListener


class Printer(TuningListener):
    """Prints each finished trial."""

    def on_trial(self, result: TrialResult) -> None:
        """Print sparsity, PSNR and whether the gate is met."""
        if result.state == "complete":
            verdict = "meets the gate" if result.feasible else "misses the gate"
            print(f"trial {result.number}: sparsity {result.sparsity:.3f}, {result.psnr:.1f} dB, {verdict}")
        else:
            print(f"trial {result.number}: {result.state}, {result.reason}")


def main() -> None:
    """Run the search and print its result."""
    result = tune(
        "demo", n_trials=3, eval__num_prompts=2, min_psnr=38.0, output_dir="results/demo-from-python",
        listeners=[Printer()], progress=False,
    )  # fmt: skip
    print(result)
    if result.best is None:
        print("no trial meets the gate; allow more trials or lower the gate")


if __name__ == "__main__":
    main()
