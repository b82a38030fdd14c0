"""Compare two folders of videos without a model, with the same metrics as an evaluation.

    python examples/compare_folders.py DENSE SPARSE

Videos with the same name are compared. `sparsetune metrics DENSE SPARSE` prints the same as a table.
"""

import sys
from pathlib import Path

from sparsetune.evaluation.videos import compare_videos
from sparsetune.metrics import Gate

NAMES = ("psnr", "psnr_frame_min", "frame_cosine", "ssim")


def main(dense: Path, sparse: Path) -> int:
    """Print each pair, the worst first, and the verdict; return the exit code, 3 if the gate is not met."""
    comparison = compare_videos(dense, sparse, names=NAMES, gate=Gate(min_psnr=30.0, min_psnr_worst=25.0))
    for pair in sorted(comparison.pairs, key=lambda pair: pair.metrics["psnr"]):
        print(f"{pair.name}: " + ", ".join(f"{name} {pair.metrics[name]:.4g}" for name in NAMES))
    print(f"score {comparison.score}/100, {comparison.verdict}; note: {comparison.note}")
    for failure in comparison.gate.failures:
        print(f"gate not met: {failure}")
    return 0 if comparison.gate.passed else 3


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
