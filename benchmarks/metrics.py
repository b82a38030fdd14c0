"""Time of the metrics on one pair of videos, compared with torchmetrics, scikit-image and plain float64 numpy.

    python benchmarks/metrics.py

All figures are from one run on one machine; only the ratios apply to other machines. Each is the best of several
rounds. Peers that take many seconds run on the first few frames only, and their time, which is linear in the number of
frames, is scaled to all; the table marks them.
"""

import argparse
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional import image as torch_image
from torchmetrics.functional import mean_absolute_error

from sparsetune import metrics
from sparsetune.video import write_video

BASE = metrics.BASE_METRICS
SUITE = (*BASE, "psnr_frame_mean", "psnr_frame_min", "ssim", "ms_ssim")
LUMA = """
import sys
from sparsetune.decoding import open_video
from sparsetune.metrics.ffmpeg import compute_on_files
dense, sparse = map(open_video, sys.argv[1:])
compute_on_files(dense, sparse, ("vmaf", "xpsnr"), 1 << 30)
"""
MEMORY_BOUND_MB = 400
RATIO_BOUND = 5.0


@dataclass(frozen=True)
class Row:
    """One table row: seconds of both implementations for all frames, and the peer's frames if it ran on fewer."""

    what: str
    ours_s: float
    peer: str
    peer_s: float
    peer_frames: int | None = None

    def markdown(self) -> str:
        note = f" (on {self.peer_frames} frames, scaled)" if self.peer_frames else ""
        figures = "|" if math.isnan(self.peer_s) else f"{self.peer_s:.2f} | {self.peer_s / self.ours_s:.1f}x"
        return f"| {self.what} | {self.ours_s:.2f} | {self.peer}{note} | {figures} |"


def make_pair(frames: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return moving gradients, and the same with noise; built frame by frame to keep peak memory low."""
    generator = np.random.default_rng(0)
    dense, sparse = (np.empty((frames, height, width, 3), np.uint8) for _ in range(2))
    y, x = np.mgrid[0:height, 0:width]
    for t in range(frames):
        waves = [np.sin(x / 31 + t / 5), np.cos(y / 23 - t / 7), np.sin((x + y) / 41)]
        dense[t] = 127 + 100 * np.stack(waves, axis=-1)
        sparse[t] = (dense[t] + generator.normal(0, 6, dense[t].shape)).clip(0, 255)
    return dense, sparse


def best_times(rounds: int, work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the best seconds of each function over several rounds; each round runs all, so they see the same load."""
    times = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            times[name] = min(times[name], time.perf_counter() - start)
    return times


def plain_numpy(dense: np.ndarray, sparse: np.ndarray) -> tuple[float, ...]:
    """Compute the four base metrics from their definitions, with one conversion to float64."""
    d, s = dense.astype(np.float64) / 255, sparse.astype(np.float64) / 255
    return (
        (d * s).sum() / np.sqrt((d * d).sum() * (s * s).sum()),
        10 * np.log10(1 / ((s - d) ** 2).mean()),
        np.abs(s - d).mean(),
        np.abs(np.diff(s, axis=0) - np.diff(d, axis=0)).mean(),
    )


def scikit_ssim(dense: np.ndarray, sparse: np.ndarray) -> float:
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(dense, sparse, strict=True)
    return np.mean([structural_similarity(d, s, channel_axis=-1, data_range=255, **options) for d, s in pairs])


def scikit_psnr_per_frame(dense: np.ndarray, sparse: np.ndarray) -> list[float]:
    return [peak_signal_noise_ratio(d, s, data_range=255) for d, s in zip(dense, sparse, strict=True)]


def to_torch(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def torch_base(dense: np.ndarray, sparse: np.ndarray) -> None:
    """Compute cosine, PSNR and L1 with torch and torchmetrics in float32; torchmetrics has no frame_diff."""
    d, s = to_torch(dense), to_torch(sparse)
    torch.nn.functional.cosine_similarity(d.flatten(), s.flatten(), dim=0)
    torch_image.peak_signal_noise_ratio(s, d, data_range=1.0)
    mean_absolute_error(s.flatten(), d.flatten())


def by_frame(metric: Callable[..., object]) -> Callable[[np.ndarray, np.ndarray], None]:
    """Apply a torchmetrics function frame by frame (a whole video at once needs many GB)."""

    def run(dense: np.ndarray, sparse: np.ndarray) -> None:
        for d, s in zip(dense, sparse, strict=True):
            metric(to_torch(s[None]), to_torch(d[None]), data_range=1.0)

    return run


def peak_mb() -> float:
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kibibytes * 1024 / 1e6


def extra_memory(dense: np.ndarray, sparse: np.ndarray, names: tuple[str, ...]) -> float:
    """Return by how many MB the process's peak memory rose; a call below an earlier peak shows 0."""
    before = peak_mb()
    metrics.compute(dense, sparse, names)
    return peak_mb() - before


def traced(work: Callable[[], object]) -> float:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def measure(dense: np.ndarray, sparse: np.ndarray, few: int, rounds: int) -> list[Row]:
    scale = len(dense) / few
    first = dense[:few], sparse[:few]
    suites = {"base": BASE, "three": BASE[:3], "frames": ("psnr_frame_mean",), "ssim": ("ssim",),
              "ms_ssim": ("ms_ssim",), "suite": SUITE, "vmaf": ("vmaf",)}  # fmt: skip
    ours = {name: partial(metrics.compute, dense, sparse, names) for name, names in suites.items()}
    multi = torch_image.multiscale_structural_similarity_index_measure
    seconds = best_times(
        rounds,
        {
            **ours,
            "numpy": partial(plain_numpy, dense, sparse),
            "torch three": partial(torch_base, dense, sparse),
            "scikit psnr": partial(scikit_psnr_per_frame, dense, sparse),
            "scikit ssim": partial(scikit_ssim, *first),
            "torch ssim": partial(by_frame(torch_image.structural_similarity_index_measure), *first),
            "torch ms_ssim": partial(by_frame(multi), *first),
        },
    )
    for name in ("scikit ssim", "torch ssim", "torch ms_ssim"):
        seconds[name] *= scale
    best_ssim = min(seconds["scikit ssim"], seconds["torch ssim"])
    peers = seconds["numpy"] + seconds["scikit psnr"] + best_ssim + seconds["torch ms_ssim"]
    return [
        Row("four base metrics", seconds["base"], "numpy, float64", seconds["numpy"]),
        Row("cosine, psnr, l1", seconds["three"], "torchmetrics, float32", seconds["torch three"]),
        Row("psnr per frame", seconds["frames"], "scikit-image", seconds["scikit psnr"]),
        Row("ssim", seconds["ssim"], "scikit-image", seconds["scikit ssim"], few),
        Row("ssim", seconds["ssim"], "torchmetrics", seconds["torch ssim"], few),
        Row("ms_ssim", seconds["ms_ssim"], "torchmetrics", seconds["torch ms_ssim"], few),
        Row("all of these", seconds["suite"], "the best peer for each", peers, few),
        Row("vmaf", seconds["vmaf"], "none: it is ffmpeg's", float("nan")),
    ]


def file_seconds(dense: np.ndarray, sparse: np.ndarray) -> dict[str, float]:
    """Return the CPU seconds, over all processes, of comparing two mp4 files, and of parts of it."""

    def cpu(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/dense.mp4", f"{folder}/sparse.mp4"]
        for path, frames in zip(paths, (dense, sparse), strict=True):
            write_video(path, frames, 8)
        command = ("-m", "sparsetune", "metrics", *paths)
        read = "import sys; from sparsetune.decoding import read_video; [read_video(path) for path in sys.argv[1:]]"
        return {
            "`sparsetune metrics`, default metrics": cpu(*command),
            "`sparsetune metrics --metrics psnr`": cpu(*command, "--metrics", "psnr"),
            "`sparsetune metrics --help`": cpu("-m", "sparsetune", "metrics", "--help"),
            "decoding both files": cpu("-c", read, *paths),
            "vmaf and xpsnr of both files": cpu("-c", LUMA, *paths),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=49, help="frames of the videos (default: 49)")
    parser.add_argument("--height", type=int, default=480, help="in pixels (default: 480)")
    parser.add_argument("--width", type=int, default=720, help="in pixels (default: 720)")
    parser.add_argument("--peer-frames", type=int, default=3, help="frames on which slow peers run (default: 3)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds; each figure is the best of them (default: 4)")
    options = parser.parse_args()
    dense, sparse = make_pair(options.frames, options.height, options.width)
    metrics.compute(dense[:1], sparse[:1], SUITE)  # exclude imports and first calls from the measurement

    suites = {"four base metrics": BASE, "all of these": SUITE}
    memory = {what: extra_memory(dense, sparse, names) for what, names in suites.items()}
    plain_mb = traced(lambda: plain_numpy(dense, sparse))
    few = min(options.peer_frames, options.frames)
    rows = measure(dense, sparse, few, options.rounds)

    versions = f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
    shape = f"{options.frames} x {options.height} x {options.width}"
    print(f"{shape} RGB uint8, {torch.get_num_threads()} threads, {versions}")
    print()
    print("| metrics | sparsetune, s | peer | peer, s | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        print(row.markdown())
    print()
    print("| extra memory at peak | MB |")
    print("| --- | --- |")
    for what, megabytes in memory.items():
        print(f"| {what} | {megabytes:.0f} |")
    print(f"| numpy, float64 | {plain_mb:.0f} |")
    print()
    print("| two mp4 files | CPU, s |")
    print("| --- | --- |")
    for what, used in file_seconds(dense, sparse).items():
        print(f"| {what} | {used:.1f} |")
    met = rows[0].peer_s >= RATIO_BOUND * rows[0].ours_s and memory["all of these"] < MEMORY_BOUND_MB
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
