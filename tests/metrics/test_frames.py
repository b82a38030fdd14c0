import re
import tracemalloc

import numpy as np
import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio
from torchmetrics.functional.image import peak_signal_noise_ratio as torch_psnr

from sparsetune import ffmpeg
from sparsetune.errors import MetricError
from sparsetune.metrics import (
    frame_cosine,
    frame_diff,
    frame_l1,
    psnr,
    psnr_frame_mean,
    psnr_frame_min,
    psnr_per_frame,
)

METRICS = [frame_cosine, frame_l1, psnr, frame_diff, psnr_frame_mean, psnr_frame_min]


def plain(dense, sparse):
    """Literal implementation of the definitions, in float64."""
    d, s = dense / 255.0, sparse / 255.0
    return {
        "frame_cosine": (d * s).sum() / np.sqrt((d * d).sum() * (s * s).sum()),
        "frame_l1": np.abs(s - d).mean(),
        "psnr": 10 * np.log10(1 / ((s - d) ** 2).mean()),
        "frame_diff": np.abs(np.diff(s, axis=0) - np.diff(d, axis=0)).mean(),
    }


@pytest.mark.parametrize("shape", [(5, 37, 53), (2, 1, 1), (3, 200, 301), (2, 7, 9)])
def test_base_metrics_equal_their_definitions(noise, shape):
    dense, sparse = noise(*shape)
    expected = plain(dense, sparse)
    for metric in (frame_cosine, frame_l1, psnr, frame_diff):
        assert metric(dense, sparse) == pytest.approx(expected[metric.__name__], rel=1e-12)


def test_base_metrics_equal_their_definitions_on_decoded_video(decoded):
    expected = plain(*decoded)
    for metric in (frame_cosine, frame_l1, psnr, frame_diff):
        assert metric(*decoded) == pytest.approx(expected[metric.__name__], rel=1e-12)


def test_psnr_agrees_with_scikit_image_and_torchmetrics(decoded):
    dense, sparse = decoded
    assert psnr(dense, sparse) == pytest.approx(peak_signal_noise_ratio(dense, sparse, data_range=255), abs=1e-9)
    tensors = [torch.tensor(frames / 255.0) for frames in decoded]
    assert psnr(dense, sparse) == pytest.approx(torch_psnr(*tensors, data_range=1.0).item(), abs=1e-5)


def test_psnr_agrees_with_ffmpegs_filter(decoded):
    dense, sparse = decoded
    height, width = dense.shape[1:3]
    graph = (
        f"[0:v]split[a][b];[a]crop={width}:{height}:0:0,format=gbrp[dense];"
        f"[b]crop={width}:{height}:0:{height},format=gbrp[sparse];[sparse][dense]psnr"
    )
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{2 * height} -r 8 -i pipe:0".split()
    done = ffmpeg.run(
        ffmpeg.executable(),
        [*source, "-filter_complex", graph, "-f", "null", "-"],
        feed=[np.concatenate((dense, sparse), axis=1).tobytes()],
    )
    found = re.search(r"average:([\d.]+) min:([\d.]+)", done.log)
    assert psnr(dense, sparse) == pytest.approx(float(found[1]), abs=1e-4)
    assert psnr_frame_min(dense, sparse) == pytest.approx(float(found[2]), abs=1e-4)


def test_psnr_per_frame_agrees_with_scikit_image(decoded):
    dense, sparse = decoded
    expected = [peak_signal_noise_ratio(d, s, data_range=255) for d, s in zip(dense, sparse, strict=True)]
    assert psnr_per_frame(dense, sparse) == pytest.approx(expected, abs=1e-9)
    assert psnr_frame_mean(dense, sparse) == pytest.approx(np.mean(expected), abs=1e-9)
    assert psnr_frame_min(dense, sparse) == pytest.approx(min(expected), abs=1e-9)


def test_identical_videos(noise):
    dense, _ = noise(4, 31, 17)
    assert frame_cosine(dense, dense.copy()) == 1.0
    assert frame_l1(dense, dense.copy()) == 0.0
    assert psnr(dense, dense.copy()) == 100.0
    assert frame_diff(dense, dense.copy()) == 0.0
    assert psnr_per_frame(dense, dense.copy()) == (100.0,) * 4


def test_black_against_white():
    black, white = np.zeros((3, 8, 9, 3), np.uint8), np.full((3, 8, 9, 3), 255, np.uint8)
    assert frame_l1(black, white) == frame_l1(white, black) == 1.0
    assert psnr(black, white) == psnr(white, black) == 0.0
    assert frame_diff(black, white) == 0.0


def test_cosine_of_black_videos_is_defined():
    black, white = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 255, np.uint8)
    assert frame_cosine(black, black.copy()) == 1.0
    assert frame_cosine(black, white) == frame_cosine(white, black) == 0.0


def test_uint8_does_not_wrap_around(noise):
    dense, sparse = noise(4, 64, 64)
    assert psnr(dense, sparse) == pytest.approx(7.75, abs=0.1)  # wrapped differences would give 27.9 dB
    dark, bright = np.full((1, 2, 2, 3), 1, np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert frame_l1(dark, bright) == frame_l1(bright, dark) == 254 / 255


def test_frame_diff_covers_its_whole_range():
    flicker = np.zeros((4, 3, 3, 3), np.uint8)
    flicker[::2] = 255
    assert frame_diff(flicker, 255 - flicker) == 2.0


def test_frame_diff_of_a_single_frame_is_zero(noise):
    assert frame_diff(*noise(1, 8, 8)) == 0.0


def test_an_identical_frame_is_left_out_of_the_frame_mean(noise):
    dense, sparse = noise(2, 8, 8)
    sparse[0] = dense[0]
    second = peak_signal_noise_ratio(dense[1], sparse[1], data_range=255)
    assert psnr_frame_mean(dense, sparse) == pytest.approx(second)
    assert psnr_frame_mean(dense, dense) == 100.0
    assert psnr(dense, sparse) == pytest.approx(second + 10 * np.log10(2))


def test_views_that_are_not_contiguous_count_like_copies(noise):
    dense, sparse = (frames[:, ::2, ::-1] for frames in noise(3, 40, 30))
    for metric in METRICS:
        assert metric(dense, sparse) == metric(dense.copy(), sparse.copy())


def test_sums_of_the_brightest_slabs_do_not_overflow():
    white = np.full((1, 300, 300, 3), 255, np.uint8)
    assert frame_cosine(white, white.copy()) == 1.0
    assert psnr(white, np.zeros_like(white)) == 0.0


def test_extra_memory_is_a_few_frames(noise):
    dense, sparse = noise(24, 120, 160)
    tracemalloc.start()
    for metric in METRICS:
        metric(dense, sparse)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * dense[0].nbytes


@pytest.mark.parametrize("metric", [*METRICS, psnr_per_frame])
def test_shapes_that_differ_are_refused_with_both_named(noise, metric):
    dense, sparse = noise(3, 8, 8)
    with pytest.raises(MetricError, match=r"same shape, got \(3, 8, 8, 3\) and \(2, 8, 8, 3\)"):
        metric(dense, sparse[:2])


def test_mean_squared_error_matches_what_psnr_implies(decoded):
    dense, sparse = decoded
    error = np.mean([mean_squared_error(d, s) for d, s in zip(dense, sparse, strict=True)])
    assert psnr(dense, sparse) == pytest.approx(10 * np.log10(255**2 / error), abs=1e-9)
