import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sparsetune.errors import MetricError, VideoError
from sparsetune.evaluation.videos import compare_videos
from sparsetune.metrics import Gate, compute, metric, paired_difference, summarize
from sparsetune.video import read_video, write_video

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
        (lambda frames: frames, 16, r"same frame rate, got 8 fps in .*a.mp4 and 16 fps in .*other.mp4"),
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
    with pytest.raises(VideoError, match="no videos or images in"):
        compare_videos(tmp_path, tmp_path, names=NAMES, gate=Gate())


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
