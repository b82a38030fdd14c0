import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from sparsetune.errors import MetricError
from sparsetune.metrics import MetricUnavailable, ms_ssim, ssim


def by_scikit_image(dense, sparse):
    return np.mean(
        [
            structural_similarity(
                d, s, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=255
            )
            for d, s in zip(dense, sparse, strict=True)
        ]
    )


def channels_first(frames):
    return torch.tensor(frames / 255.0, dtype=torch.float32).permute(0, 3, 1, 2)


def test_ssim_agrees_with_scikit_image_on_decoded_video(decoded):
    assert ssim(*decoded) == pytest.approx(by_scikit_image(*decoded), abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 11, 11), (2, 33, 47), (1, 12, 91)])
def test_ssim_agrees_with_scikit_image_on_noise_and_odd_sizes(noise, shape):
    dense, sparse = noise(*shape)
    assert ssim(dense, sparse) == pytest.approx(by_scikit_image(dense, sparse), abs=1e-5)


def test_ssim_agrees_with_torchmetrics(decoded):
    # Its mean takes in windows over a mirrored border; those within the frame are cut out of its map here.
    pair = [frames[:1] for frames in decoded]
    _, maps = structural_similarity_index_measure(*map(channels_first, pair), data_range=1.0, return_full_image=True)
    assert ssim(*pair) == pytest.approx(maps[..., 5:-5, 5:-5].mean().item(), abs=1e-5)


def test_ssim_is_exact_enough_in_flat_bright_regions():
    # Variance as a difference of large means is where float32 goes wrong first.
    generator = np.random.default_rng(0)
    dense = np.full((1, 64, 64, 3), 250, np.uint8) + generator.integers(0, 2, (1, 64, 64, 3), dtype=np.uint8)
    sparse = np.full((1, 64, 64, 3), 250, np.uint8) + generator.integers(0, 2, (1, 64, 64, 3), dtype=np.uint8)
    assert ssim(dense, sparse) == pytest.approx(by_scikit_image(dense, sparse), abs=1e-5)


def test_ms_ssim_agrees_with_torchmetrics(decoded):
    # It mirrors the border at the coarsest scale, where that is most of the frame: close, but not the same.
    pair = [frames[:1] for frames in decoded]
    expected = multiscale_structural_similarity_index_measure(*map(channels_first, pair), data_range=1.0)
    assert ms_ssim(*pair) == pytest.approx(expected.item(), abs=1e-3)


def multi_scale_by_scikit_image(dense, sparse):
    """One frame's MS-SSIM; a huge K1 makes SSIM's luminance term 1, which leaves contrast and structure."""
    d, s = dense.astype(float), sparse.astype(float)
    product = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        product *= (
            structural_similarity(
                d,
                s,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                channel_axis=-1,
                data_range=255,
                K1=0.01 if scale == 4 else 1e6,
            )
            ** weight
        )
        height, width = (side // 2 * 2 for side in d.shape[:2])
        d, s = (image[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3)) for image in (d, s))
    return product


def test_ms_ssim_agrees_with_scikit_image_scale_by_scale(decoded):
    expected = np.mean([multi_scale_by_scikit_image(d, s) for d, s in zip(*decoded, strict=True)])
    assert ms_ssim(*decoded) == pytest.approx(expected, abs=1e-5)


def test_ms_ssim_agrees_with_scikit_image_on_odd_sizes(noise):
    dense, other = noise(1, 181, 195)
    sparse = ((3 * dense.astype(int) + other) // 4).astype(np.uint8)
    assert ms_ssim(dense, sparse) == pytest.approx(multi_scale_by_scikit_image(dense[0], sparse[0]), abs=1e-5)


def test_identical_videos_are_exactly_one(panning):
    assert ssim(panning, panning.copy()) == 1.0
    assert ms_ssim(panning, panning.copy()) == 1.0


def test_black_against_white_is_near_zero():
    black, white = np.zeros((1, 180, 180, 3), np.uint8), np.full((1, 180, 180, 3), 255, np.uint8)
    assert ssim(black, white) == pytest.approx(by_scikit_image(black, white), abs=1e-6)
    assert ssim(black, white) == pytest.approx(0.0, abs=1e-3)


def test_an_inverted_video_counts_as_zero_at_every_scale(panning):
    assert ssim(panning, 255 - panning) < 0
    assert ms_ssim(panning, 255 - panning) == 0.0


def test_frames_without_room_for_a_window_are_unavailable(noise):
    with pytest.raises(MetricUnavailable, match=r"ssim needs frames of at least 11x11 pixels, got 10x40"):
        ssim(*noise(1, 10, 40))
    with pytest.raises(MetricUnavailable, match=r"ms_ssim needs frames of at least 176x176 pixels, got 175x"):
        ms_ssim(*noise(1, 175, 300))


def test_the_smallest_size_that_is_promised_works(noise):
    assert 0 <= ms_ssim(*noise(1, 176, 176)) <= 1


def test_shapes_that_differ_are_refused(noise):
    dense, sparse = noise(2, 20, 20)
    for metric in (ssim, ms_ssim):
        with pytest.raises(MetricError, match="must have the same shape"):
            metric(dense, sparse[:1])
