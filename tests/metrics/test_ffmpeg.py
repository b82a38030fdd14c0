import json
import re
import stat

import numpy as np
import pytest

from sparsetune import ffmpeg
from sparsetune.errors import MetricError
from sparsetune.metrics import MetricUnavailable, vmaf, xpsnr

YUV = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+full_chroma_inp,format=yuv444p"


@pytest.fixture(scope="module")
def lossless(decoded, tmp_path_factory):
    """The decoded pair as two lossless files, for runs of ffmpeg with two ordinary inputs."""
    folder = tmp_path_factory.mktemp("lossless")
    height, width = decoded[0].shape[1:3]
    for name, frames in zip(("dense", "sparse"), decoded, strict=True):
        source = f"-y -f rawvideo -pix_fmt rgb24 -s {width}x{height} -r 24 -i pipe:0 -c:v ffv1 -pix_fmt bgr0".split()
        done = ffmpeg.run(ffmpeg.executable(), [*source, f"{folder}/{name}.mkv"], feed=[frames.tobytes()])
        assert done.status == 0, done.log
    return folder


def compared(folder, graph):
    inputs = ["-i", "dense.mkv", "-i", "sparse.mkv"]
    graph = f"[0:v]{YUV}[d];[1:v]{YUV}[s];[s][d]{graph}"
    return ffmpeg.run(ffmpeg.executable(), [*inputs, "-filter_complex", graph, "-f", "null", "-"], folder=folder).log


def test_vmaf_agrees_with_ffmpeg_on_two_lossless_files(decoded, lossless):
    compared(lossless, "libvmaf=log_fmt=json:log_path=log.json")
    expected = json.loads((lossless / "log.json").read_text())["pooled_metrics"]["vmaf"]["mean"]
    assert vmaf(*decoded) == pytest.approx(expected, abs=1e-4)


def test_xpsnr_agrees_with_ffmpeg_on_two_lossless_files(decoded, lossless):
    expected = re.search(r"XPSNR +y: ([\d.]+)", compared(lossless, "xpsnr"))[1]
    assert xpsnr(*decoded) == pytest.approx(float(expected), abs=1e-3)


def test_worse_videos_score_lower(panning, decoded):
    fine, coarse = decoded
    assert vmaf(panning, panning) > vmaf(panning, fine) > vmaf(panning, coarse) + 10
    assert xpsnr(panning, panning) > xpsnr(panning, fine) > xpsnr(panning, coarse) + 5


def test_identical_videos(panning):
    assert vmaf(panning, panning.copy()) > 95
    assert xpsnr(panning, panning.copy()) == 100.0


def test_black_against_white():
    black, white = np.zeros((2, 64, 64, 3), np.uint8), np.full((2, 64, 64, 3), 255, np.uint8)
    assert vmaf(black, white) > 90  # VMAF compares detail, and neither has any; see its docstring
    assert xpsnr(black, white) < 10


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 75, 101), (2, 33, 32)])
def test_one_frame_and_odd_sizes(noise, shape):
    dense, sparse = noise(*shape)
    assert 0 <= vmaf(dense, sparse) <= 100
    assert 0 < xpsnr(dense, sparse) < 30


def test_the_dense_video_is_the_reference(decoded):
    assert vmaf(*decoded) != vmaf(*decoded[::-1])


def test_vmaf_refuses_frames_on_which_libvmaf_crashes(noise):
    with pytest.raises(MetricUnavailable, match="vmaf needs frames of at least 32x32 pixels, got 16x40"):
        vmaf(*noise(2, 16, 40))


def test_shapes_that_differ_are_refused(noise):
    dense, sparse = noise(2, 40, 40)
    for metric in (vmaf, xpsnr):
        with pytest.raises(MetricError, match="must have the same shape"):
            metric(dense, sparse[:1])


def fake_ffmpeg(folder, script):
    path = folder / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_build_without_libvmaf_is_said(noise, monkeypatch, tmp_path):
    listing = 'echo " TS psnr VV->V PSNR"; echo " T. xpsnr VV->V XPSNR"'
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", fake_ffmpeg(tmp_path, listing))
    with pytest.raises(MetricUnavailable, match=r"ffmpeg was built without the filter libvmaf"):
        vmaf(*noise(1, 40, 40))


def test_a_missing_ffmpeg_is_said(noise, monkeypatch):
    monkeypatch.setattr(ffmpeg, "executable", lambda: None)
    with pytest.raises(MetricUnavailable, match="libvmaf needs ffmpeg; pip install imageio-ffmpeg"):
        vmaf(*noise(1, 40, 40))


def test_a_chosen_ffmpeg_that_does_not_exist_is_said(noise, monkeypatch, tmp_path):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
    with pytest.raises(MetricUnavailable, match="libvmaf needs ffmpeg; pip install imageio-ffmpeg"):
        vmaf(*noise(1, 40, 40))


def test_an_ffmpeg_that_dies_early_is_an_error_and_no_hang(noise, monkeypatch, tmp_path):
    script = 'case "$*" in *-filters*) echo " .. libvmaf VV->V x";; *) echo "[error] no such model" >&2; exit 3;; esac'
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", fake_ffmpeg(tmp_path, script))
    with pytest.raises(MetricError, match=r"ffmpeg's libvmaf failed on 40 frames.*: no such model"):
        vmaf(*noise(40, 100, 100))
