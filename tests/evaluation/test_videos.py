import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from sparsetune import decoding, ffmpeg
from sparsetune.decoding import read_video
from sparsetune.errors import MetricError, VideoError
from sparsetune.evaluation.videos import compare_videos
from sparsetune.files import json_text
from sparsetune.metrics import Gate, compute, metric, paired_difference, summarize
from sparsetune.video import write_video

NAMES = ("psnr", "ssim")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Folders `dense` and `sparse` with two videos each; the second pair differs more than the first."""
    folder = tmp_path_factory.mktemp("films")
    generator = np.random.default_rng(0)
    y, x, t = np.meshgrid(np.arange(40), np.arange(56), np.arange(5), indexing="ij")
    base = np.stack([127 + 90 * np.sin(x / 9 + t / 3), 127 + 90 * np.cos(y / 8), 127 + 0 * x], axis=-1)
    base = base.transpose(2, 0, 1, 3)
    for name, strength in (("a.mp4", 2), ("b.mp4", 25)):
        write_video(folder / "dense" / name, base.astype(np.uint8), 8)
        noisy = (base + strength * generator.normal(size=base.shape)).clip(0, 255).astype(np.uint8)
        write_video(folder / "sparse" / name, noisy, 8)
    (folder / "sparse" / "notes.txt").write_text("not a video")
    return folder


def test_two_files_are_compared(films):
    dense, sparse = films / "dense" / "a.mp4", films / "sparse" / "a.mp4"
    result = compare_videos(dense, sparse, names=NAMES, gate=Gate())
    (pair,) = result.pairs
    frames = read_video(dense).frames, read_video(sparse).frames
    assert pair.metrics == compute(*frames, ("frame_cosine", "psnr", "frame_l1", "frame_diff", "ssim"))
    assert (pair.size, pair.fps, pair.num_frames) == ((40, 56), 8.0, 5)
    assert result.statistics["psnr"].mean == pair.metrics["psnr"]


def test_two_folders_are_paired_by_name(films):
    seen = []
    result = compare_videos(
        films / "dense",
        films / "sparse",
        names=NAMES,
        gate=Gate(min_psnr=5.0, min_psnr_worst=60.0),
        on_pair=lambda number, count, pair: seen.append((number, count, pair.name)),
    )
    assert seen == [(1, 2, "a.mp4"), (2, 2, "b.mp4")]
    values = [pair.metrics["psnr"] for pair in result.pairs]
    assert values[0] > values[1] + 5
    assert result.statistics["psnr"] == summarize(values)
    assert not result.gate.passed and "worst prompt's psnr" in result.gate.failures[0]


@pytest.mark.parametrize("name", ["a.png", "a.WEBP", "a.jpg", "a.tif"])
def test_folders_of_images_are_compared(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    for folder, shift in (("dense", 0), ("sparse", 40)):
        (tmp_path / folder).mkdir()
        Image.fromarray(noise // 2 + np.uint8(shift)).save(tmp_path / folder / name)
    result = compare_videos(tmp_path / "dense", tmp_path / "sparse", names=(), gate=Gate())
    assert [(pair.name, pair.num_frames, pair.size) for pair in result.pairs] == [(name, 1, (16, 24))]
    assert result.statistics["frame_l1"].mean == pytest.approx(40 / 255, abs=0.03)


def test_a_users_metric_is_taken(films):
    metric(higher_is_better=False, name="mine")(lambda dense, sparse: 7.0)
    result = compare_videos(films / "dense", films / "sparse", names=NAMES, gate=Gate())
    assert result.statistics["mine"].mean == 7.0


def test_a_file_against_itself_scores_100(films):
    path = films / "dense" / "a.mp4"
    result = compare_videos(path, path, names=NAMES, gate=Gate())
    assert (result.score, result.verdict, result.gate.passed) == (100, "excellent", True)


def test_the_result_is_json_and_says_that_files_are_lossy(films):
    found = compare_videos(films / "dense", films / "sparse", names=("ms_ssim",), gate=Gate()).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["align"] == "strict" and "lossy" in found["note"]
    assert found["statistics"].keys() == {"frame_cosine", "psnr", "frame_l1", "frame_diff"}
    assert "176x176" in found["pairs"][0]["unavailable"]["ms_ssim"]


@pytest.mark.parametrize(
    ("change", "fps", "message"),
    [
        (lambda frames: frames[:, :30], 8, r"same size, got 56x40 pixels in .*a.mp4 and 56x30 pixels in .*other.mp4"),
        (
            lambda frames: frames[:3],
            8,
            r"same number of frames .*, got 5 frames in .*a.mp4 and 3 frames in .*other.mp4",
        ),
    ],
)
def test_videos_that_do_not_match_are_refused_with_both_named(films, tmp_path, change, fps, message):
    dense = films / "dense" / "a.mp4"
    write_video(tmp_path / "other.mp4", change(read_video(dense).frames), fps)
    with pytest.raises(VideoError, match=message):
        compare_videos(dense, tmp_path / "other.mp4", names=NAMES, gate=Gate())


def test_shortest_compares_the_frames_that_both_have_and_says_so(films, tmp_path):
    dense = films / "dense" / "a.mp4"
    write_video(tmp_path / "short.mp4", read_video(dense).frames[:3], 8)
    result = compare_videos(dense, tmp_path / "short.mp4", names=NAMES, gate=Gate(), align="shortest")
    (pair,) = result.pairs
    assert result.to_dict()["align"] == "shortest"
    assert (pair.num_frames, pair.num_frames_dense, pair.num_frames_sparse) == (3, 5, 3)


def test_folders_with_other_names_are_refused(films, tmp_path):
    write_video(tmp_path / "c.mp4", read_video(films / "dense" / "a.mp4").frames, 8)
    with pytest.raises(VideoError, match=r"videos of the same names; .* lacks a.mp4, b.mp4 and .*dense lacks c.mp4"):
        compare_videos(films / "dense", tmp_path, names=NAMES, gate=Gate())


def test_paths_that_cannot_be_compared_are_refused(films, tmp_path):
    with pytest.raises(VideoError, match=r"no video file or folder at .*none"):
        compare_videos(films / "dense", tmp_path / "none", names=NAMES, gate=Gate())
    with pytest.raises(VideoError, match=r"is a folder and .*a.mp4 a file"):
        compare_videos(films / "dense", films / "dense" / "a.mp4", names=NAMES, gate=Gate())
    with pytest.raises(VideoError, match="no videos or pictures in"):
        compare_videos(tmp_path, tmp_path, names=NAMES, gate=Gate())


def encode(source, target, *options):
    done = ffmpeg.run(ffmpeg.executable(), ["-y", "-i", str(source), *options, str(target)])
    assert done.status == 0, done.log


def test_vmaf_and_xpsnr_of_files_are_those_of_ffmpeg_on_them(films, tmp_path):
    dense, sparse = films / "dense" / "b.mp4", films / "sparse" / "b.mp4"
    (pair,) = compare_videos(dense, sparse, names=("vmaf", "xpsnr")).pairs
    graph = "[0:v]split[a][b];[1:v]split[c][d];[a][c]xpsnr,nullsink;[b][d]libvmaf"
    log = ffmpeg.run(
        ffmpeg.executable(), ["-i", str(sparse), "-i", str(dense), "-filter_complex", graph, "-f", "null", "-"]
    ).log
    assert pair.metrics["vmaf"] == pytest.approx(float(re.search(r"VMAF score: (\S+)", log)[1]), abs=1e-5)
    assert pair.metrics["xpsnr"] == float(re.search(r"XPSNR  y: (\S+)", log)[1])
    (short,) = compare_videos(dense, sparse, names=("xpsnr",), align="shortest").pairs
    assert short.metrics["xpsnr"] == pair.metrics["xpsnr"]


def test_vmaf_and_xpsnr_pair_odd_files_of_other_lengths_by_frame(films, tmp_path):
    for side in ("dense", "sparse"):
        write_video(tmp_path / f"{side}.mp4", read_video(films / side / "b.mp4").frames[:, :39, :55], 8)
        for name, count in (("long", 5), ("short", 3)):
            encode(tmp_path / f"{side}.mp4", tmp_path / f"{side}-{name}.mkv", "-c:v", "ffv1", "-frames:v", str(count))
    names = ("vmaf", "xpsnr", "psnr")
    pairs = [
        compare_videos(tmp_path / f"dense-{name}.mkv", tmp_path / "sparse-short.mkv", names=names, align="shortest")
        for name in ("long", "short")
    ]
    (long,), (short,) = (result.pairs for result in pairs)
    assert long.num_frames == 3 and long.size == (39, 55)
    assert long.metrics == short.metrics and long.metrics.keys() >= set(names)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-c", "copy", "-bsf:v", "h264_metadata=matrix_coefficients=2"), "colour matrix (bt709 and unknown)"),
        (("-c", "copy", "-bsf:v", "h264_metadata=video_full_range_flag=1"), "colour range (tv and pc)"),
        (("-vf", "setpts=N/16/TB,fps=16"), "frame rate (8 and 16)"),
        (("-vf", "setpts=N*N/8/TB", "-fps_mode", "vfr"), "variable frame rate (no and yes)"),
        (("-pix_fmt", "yuv420p10le"), "bit depth (8 and 10)"),
        (("-pix_fmt", "yuva444p", "-c:v", "ffv1", "-f", "matroska"), "alpha channel (no and yes)"),
    ],
)
def test_what_differs_besides_pixels_is_said_and_refused_when_strict(films, tmp_path, options, said):
    dense, other = films / "dense" / "a.mp4", tmp_path / "other.mp4"
    encode(dense, other, *options)
    (pair,) = compare_videos(dense, other, names=NAMES).pairs
    assert said in pair.notes[0]
    with pytest.raises(VideoError, match=rf"differ in .*{re.escape(said)}.*; encode both in one way"):
        compare_videos(dense, other, names=NAMES, strict=True)


def test_a_rotation_is_said(films, tmp_path):
    dense, other = films / "dense" / "a.mp4", tmp_path / "other.mp4"
    done = ffmpeg.run(ffmpeg.executable(), ["-display_rotation", "180", "-i", str(dense), "-c", "copy", str(other)])
    assert done.status == 0
    (pair,) = compare_videos(dense, other, names=NAMES).pairs
    assert "rotation (0 and" in pair.notes[0] and pair.metrics["psnr"] < 30


def test_files_that_are_alike_pass_strict_and_the_conversion_is_in_the_json(films):
    found = compare_videos(films / "dense", films / "sparse", names=NAMES, strict=True).to_dict()
    conversion = found["pairs"][0]["conversion"]
    assert conversion["dense"] == conversion["sparse"]
    assert conversion["dense"]["matrix"] == "bt709" and conversion["dense"]["chroma_location"] == "left"
    assert conversion["to"] == "rgb24" and "accurate_rnd" in conversion["flags"] and conversion["ffmpeg"]
    assert found["pairs"][0]["notes"] == [] and found["gate"] is None


def test_a_file_that_meets_itself_is_said(films):
    path = films / "dense" / "a.mp4"
    assert compare_videos(path, path, names=NAMES).pairs[0].notes == ("dense and sparse are the same file",)


def test_deep_pictures_are_compared_without_rounding(tmp_path):
    for name, offset in (("a.png", 0), ("b.png", 1)):
        levels = (np.arange(40 * 30 * 3) * 10 + offset).astype(">u2")
        (tmp_path / "a.ppm").write_bytes(b"P6 30 40 65535\n" + levels.tobytes())
        encode(tmp_path / "a.ppm", tmp_path / name, "-pix_fmt", "rgb48be")
    (pair,) = compare_videos(tmp_path / "a.png", tmp_path / "b.png", names=("ssim", "psnr_frame_min")).pairs
    assert pair.metrics["psnr"] == pytest.approx(20 * math.log10(65535), abs=1e-9)
    assert pair.metrics["frame_l1"] == pytest.approx(1 / 65535) and 0.99 < pair.metrics["ssim"] <= 1.0
    assert pair.conversion["to"] == "rgb48"


def test_alpha_counts(tmp_path):
    clear, opaque = np.full((32, 32, 4), 90, np.uint8), np.full((32, 32, 4), 90, np.uint8)
    opaque[..., 3] = 255
    for name, picture in (("a.png", clear), ("b.png", opaque)):
        Image.fromarray(picture).save(tmp_path / name)
    assert compare_videos(tmp_path / "a.png", tmp_path / "b.png", names=NAMES).pairs[0].metrics["psnr"] < 15
    assert compare_videos(tmp_path / "a.png", tmp_path / "a.png", names=NAMES).pairs[0].metrics["psnr"] == 100


def test_names_that_are_not_unicode_give_valid_json(films, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    path.write_bytes((films / "dense" / "a.mp4").read_bytes())
    (pair,) = compare_videos(path, path, names=NAMES).pairs
    assert pair.name == "caf\\xe9.mp4"
    json_text(asdict(pair)).encode("utf-8")


def test_memory_does_not_grow_with_the_number_of_frames(films, tmp_path, monkeypatch):
    dense = films / "dense" / "a.mp4"
    for name, count in (("short.mkv", 4), ("long.mkv", 200)):
        encode(dense, tmp_path / name, "-vf", f"loop={count}:size=5", "-c:v", "ffv1")
    monkeypatch.setattr(decoding, "_SLAB_BYTES", 40 * 56 * 3 * 4)
    peaks = []
    for name in ("short.mkv", "long.mkv"):
        tracemalloc.start()
        compare_videos(tmp_path / name, tmp_path / name, names=NAMES)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 500_000  # the whole of the longer video is 6.7 MB, a slab 27 kB


def test_an_unknown_metric_fails_before_any_file_is_read(tmp_path):
    with pytest.raises(MetricError, match="unknown metric 'pnsr'; choose from psnr"):
        compare_videos(tmp_path / "none", tmp_path / "none", names=("pnsr",), gate=Gate())


def test_results_of_two_comparisons_can_be_paired(films):
    near = compare_videos(films / "dense", films / "dense", names=NAMES, gate=Gate())
    far = compare_videos(films / "dense", films / "sparse", names=NAMES, gate=Gate())
    columns = [[pair.metrics["psnr"] for pair in result.pairs] for result in (near, far)]
    assert paired_difference(*columns).worse == 2


def test_importing_it_needs_no_model():
    code = (
        "import sys, sparsetune.evaluation.videos; "
        "heavy = {'torch', 'diffusers', 'mlflow', 'sparsetune.models'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
