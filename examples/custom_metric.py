"""A custom metric, which appears in every table, result and run.

    python examples/custom_metric.py

registers it and evaluates with it from Python. On the command line, pass the same file as a metric module:

    sparsetune eval --use-tuned --metric-module examples/custom_metric.py
"""

import numpy as np

from sparsetune import metrics


@metrics.metric(higher_is_better=False, unit="levels", range=(0.0, 255.0))
def flicker(dense: metrics.Frames, sparse: metrics.Frames) -> float:
    """Mean change in brightness between consecutive frames, in excess of the dense video's."""
    brightness = np.stack([dense, sparse]).mean(axis=(2, 3, 4))
    of_dense, of_sparse = np.abs(np.diff(brightness, axis=1)).mean(axis=1)
    return float(max(of_sparse - of_dense, 0.0))


def main() -> None:
    """Evaluate the tuned checkpoint of the demo model."""
    from sparsetune import evaluate

    result = evaluate(
        "demo", "results/demo/checkpoint", output_dir="results/demo/custom-metric",
        num_prompts=2, metrics=("psnr", "ssim"), save_videos=False,
    )  # fmt: skip
    for name in ("flicker", "psnr"):
        statistics = result.statistics[name]
        print(f"{name}: {statistics.mean:.3f} {statistics.unit} (worst {worst(name, statistics):.3f})")


def worst(name: str, statistics: metrics.Summary) -> float:
    """Return the value of the worst prompt."""
    return statistics.min if metrics.get(name).higher_is_better else statistics.max


if __name__ == "__main__":
    main()
