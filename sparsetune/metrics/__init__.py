"""Video quality metrics of a sparse model's video against the dense one: pure functions over frames.

    from sparsetune import metrics

    values = metrics.compute(dense, sparse, ("psnr", "ssim", "vmaf"))

Importing this imports only numpy; torch and ffmpeg are loaded by the metrics that need them.
"""

from collections.abc import Iterable
from pathlib import Path

from sparsetune.metrics.ffmpeg import vmaf, xpsnr
from sparsetune.metrics.frames import (
    frame_cosine,
    frame_diff,
    frame_l1,
    pooled_psnr,
    psnr,
    psnr_frame_mean,
    psnr_frame_min,
    psnr_per_frame,
)
from sparsetune.metrics.gate import Condition, Gate, GateResult
from sparsetune.metrics.perceptual import lpips, use_weights
from sparsetune.metrics.registry import (
    Frames,
    Measuring,
    Metric,
    MetricUnavailable,
    Pooled,
    check_pair,
    compute,
    compute_available,
    get,
    import_metrics,
    metric,
    names,
    own_names,
    pooled,
)
from sparsetune.metrics.score import Verdict, score, score_prompts, verdict
from sparsetune.metrics.statistics import (
    Inferiority,
    PairedDifference,
    Summary,
    chance_of_none,
    holm,
    inferiority,
    interval_caveat,
    mean_interval,
    needed_pairs,
    paired_difference,
    relative_error,
    summarize,
)
from sparsetune.metrics.structure import ms_ssim, ssim


def load_metrics(modules: Iterable[str] = (), lpips_weights: Path | None = None) -> None:
    """Import modules of custom metrics (see `import_metrics`), and set the file of LPIPS's weights in this process."""
    use_weights(lpips_weights)
    import_metrics(modules)


BASE_METRICS = ("frame_cosine", "psnr", "frame_l1", "frame_diff")
"""Always computed: the score uses the first three, the gate the first two."""

__all__ = [
    "BASE_METRICS",
    "Condition",
    "Frames",
    "Gate",
    "GateResult",
    "Inferiority",
    "Measuring",
    "Metric",
    "MetricUnavailable",
    "PairedDifference",
    "Pooled",
    "Summary",
    "Verdict",
    "chance_of_none",
    "check_pair",
    "compute",
    "compute_available",
    "frame_cosine",
    "frame_diff",
    "frame_l1",
    "get",
    "holm",
    "import_metrics",
    "inferiority",
    "interval_caveat",
    "load_metrics",
    "lpips",
    "mean_interval",
    "metric",
    "ms_ssim",
    "names",
    "needed_pairs",
    "own_names",
    "paired_difference",
    "pooled",
    "pooled_psnr",
    "psnr",
    "psnr_frame_mean",
    "psnr_frame_min",
    "psnr_per_frame",
    "relative_error",
    "score",
    "score_prompts",
    "ssim",
    "summarize",
    "use_weights",
    "verdict",
    "vmaf",
    "xpsnr",
]
