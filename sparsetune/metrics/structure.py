"""SSIM and MS-SSIM of two videos.

Definition: Wang et al. 2004, an 11 × 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, population (not sample)
covariances, only windows that lie wholly inside the frame; on each RGB channel by itself, data_range 1 (the full range
of uint8); averaged over channels and windows of a frame, then over frames. scikit-image's `structural_similarity(
gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1)` computes the same.

Computed from the sum p and the difference m of the two frames (both linear, so their windows' means mu and variances v
give those of the frames): luminance is (mu_p² - mu_m² + 2·C1) / (mu_p² + mu_m² + 2·C1), contrast and structure
(v_p - v_m + 2·C2) / (v_p + v_m + 2·C2). Filters run in float32 with p centred at 0, which keeps the error against
float64 below 1e-5 and makes identical frames exactly 1; sums are taken in float64.
"""

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparsetune.metrics.registry import Frames, check_min_side, checked, metric

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 11  # side of the Gaussian window in pixels: smaller frames have no SSIM
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of the scales, finest first, fitted to viewers
MS_SSIM_MIN_SIDE = WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1)  # 176: the coarsest scale must still hold one window

_SIGMA = 1.5
_CENTRE = 255.0  # of the sum: variances don't change when values are shifted, but cancel far less in float32
_C1 = 2 * (0.01 * 255) ** 2
_C2 = 2 * (0.03 * 255) ** 2
_BAND = 64  # rows of windows at a time: what a band needs then stays near the processor's caches
_GROUP = 5  # frames at a time: 15 channels fill a vector register of 16 floats


@checked
@metric(
    range=(-1.0, 1.0),
    higher_is_better=True,
    source="Wang et al. 2004, doi:10.1109/TIP.2003.819861",
)
def ssim(dense: Frames, sparse: Frames) -> float:
    """SSIM, 11×11 Gaussian window of sigma 1.5, per RGB channel; mean over channels, windows and frames.

    Identical videos are exactly 1. MetricUnavailable: a side is under 11 pixels, so no window fits.
    """
    check_min_side("ssim", dense, WINDOW)
    values = [value for p, m in _groups(dense, sparse) for value in _similarity(p, m)[0]]
    return math.fsum(values) / len(values)


@checked
@metric(
    range=(0.0, 1.0),
    higher_is_better=True,
    source="Wang et al. 2003, doi:10.1109/ACSSC.2003.1292216",
)
def ms_ssim(dense: Frames, sparse: Frames) -> float:
    """MS-SSIM over five scales of SSIM's window; per frame from channel means, then the mean over frames.

    Per frame: the contrast-structure term of the four finer scales and the whole SSIM of the coarsest one, each
    averaged over channels and windows, to the power of its weight, multiplied. Scales are 2 × 2 means without an odd
    last row or column. A negative term counts as 0, as with torchmetrics' `normalize="relu"`; the paper doesn't say.
    MetricUnavailable: a side is under 176 pixels, so the coarsest scale holds no window.
    """
    check_min_side("ms_ssim", dense, MS_SSIM_MIN_SIDE)
    values = [value for p, m in _groups(dense, sparse) for value in _multi_scale(p, m)]
    return math.fsum(values) / len(values)


def _multi_scale(total: "Tensor", difference: "Tensor") -> list[float]:
    products = [1.0] * (total.shape[-1] // 3)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        whole, contrast = _similarity(total, difference)
        coarsest = scale == len(MS_SSIM_WEIGHTS) - 1
        terms = whole if coarsest else contrast
        products = [product * max(0.0, term) ** weight for product, term in zip(products, terms, strict=True)]
        if not coarsest:
            total, difference = _halve(total), _halve(difference)
    return products


def _similarity(total: "Tensor", difference: "Tensor") -> tuple[list[float], list[float]]:
    """Each frame's mean SSIM and mean contrast-structure term, from `_groups`' sums and differences."""
    import torch

    rows, columns, channels = total.shape[0] - WINDOW + 1, total.shape[1] - WINDOW + 1, total.shape[2]
    sums = torch.zeros(2, channels, dtype=torch.float64)
    for start in range(0, rows, _BAND):
        band = slice(start, min(start + _BAND, rows) + WINDOW - 1)
        sums += _similarity_sums(total[band], difference[band])
    whole, contrast = (sums.view(2, -1, 3).mean(dim=-1) / (rows * columns)).tolist()
    return whole, contrast


def _similarity_sums(total: "Tensor", difference: "Tensor") -> "Tensor":
    """Sums over all windows of both terms, (2, channels) float64."""
    import torch

    mean_p, mean_m, squares_p, squares_m = _blur(torch.stack((total, difference, total.square(), difference.square())))
    variance_p, power_m = squares_p.sub_(mean_p.square()), mean_m.square_()
    variance_m = squares_m.sub_(power_m)
    contrast = (variance_p - variance_m).add_(_C2).div_(variance_p.add_(variance_m).add_(_C2))
    power_p = mean_p.add_(_CENTRE).square_()
    luminance = (power_p - power_m).add_(_C1).div_(power_p.add_(power_m).add_(_C1))
    return torch.stack((luminance.mul_(contrast), contrast)).sum(dim=(1, 2), dtype=torch.float64)


def _blur(planes: "Tensor") -> "Tensor":
    """Filter (maps, height, width, channels) with the window where it fits: (maps, height - 10, width - 10, channels).

    The layout takes torch to a depthwise kernel for channels-last tensors, many times faster than plane by plane.
    """
    from torch.nn.functional import conv2d

    count = planes.shape[-1]
    window = _window().to(planes.dtype)
    rows = window.view(1, 1, 1, -1).repeat(count, 1, 1, 1)
    columns = window.view(1, 1, -1, 1).repeat(count, 1, 1, 1)
    blurred = conv2d(conv2d(planes.permute(0, 3, 1, 2), rows, groups=count), columns, groups=count)
    return blurred.permute(0, 2, 3, 1)


@functools.cache
def _window() -> "Tensor":
    import torch

    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    return window / window.sum()


def _halve(frames: "Tensor") -> "Tensor":
    from torch.nn.functional import avg_pool2d

    return avg_pool2d(frames[None].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)[0].contiguous()


def _groups(dense: Frames, sparse: Frames) -> Iterator[tuple["Tensor", "Tensor"]]:
    """Some frames at a time: dense + sparse centred at 0, and dense - sparse.

    Both (height, width, channels) float32, the channels being the group's frames, each red, green, blue.
    """
    import numpy as np
    import torch

    with torch.inference_mode():
        for start in range(0, len(dense), _GROUP):
            # Interleaved while the values are still bytes, so that all that follows runs on contiguous floats.
            groups = (frames[start : start + _GROUP].transpose(1, 2, 0, 3) for frames in (dense, sparse))
            d, s = (np.ascontiguousarray(group).reshape(*group.shape[:2], -1) for group in groups)
            total = np.add(d, s, dtype=np.float32)
            total -= np.float32(_CENTRE)
            yield torch.from_numpy(total), torch.from_numpy(np.subtract(d, s, dtype=np.float32))
