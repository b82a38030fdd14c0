from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsetune import ffmpeg
from sparsetune.decoding import read_video
from sparsetune.errors import SparsetuneError, VideoError
from sparsetune.video import save_png, side_by_side, write_video


@pytest.fixture
def frames():
    """Six smooth frames of 48 x 64 with moving colour gradients, which H.264 encodes almost without loss."""
    y, x, t = np.meshgrid(np.arange(48), np.arange(64), np.arange(6), indexing="ij")
    waves = [127 + 120 * np.sin(x / 9 + t / 3), 127 + 120 * np.cos(y / 11 - t / 4), 127 + 100 * np.sin((x + y) / 17)]
    return np.stack(waves, axis=-1).transpose(2, 0, 1, 3).astype(np.uint8)


def log_of(path):
    return ffmpeg.run(ffmpeg.executable(), ["-i", str(path), "-f", "null", "-"]).log


def test_a_written_video_reads_back(frames, tmp_path):
    write_video(tmp_path / "a.mp4", frames, 8)
    video = read_video(tmp_path / "a.mp4")
    assert video.fps == 8.0 and video.frames.shape == frames.shape and video.frames.dtype == np.uint8
    error = video.frames.astype(int) - frames
    assert np.abs(error).mean() < 3
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 1  # no shift in colour: the same matrix both ways


def test_a_path_may_be_a_text(frames, tmp_path):
    write_video(str(tmp_path / "a.mp4"), frames, 8)
    assert read_video(str(tmp_path / "a.mp4")).frames.shape == frames.shape


def test_the_file_plays_everywhere(frames, tmp_path):
    write_video(tmp_path / "a.mp4", frames, 8)
    log = log_of(tmp_path / "a.mp4")
    assert "h264" in log and "yuv420p(tv, bt709" in log and "64x48" in log
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # faststart: the index is at the front


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (47, 63), (1, 1)])
def test_odd_sizes_come_back_as_they_were(frames, tmp_path, height, width):
    write_video(tmp_path / "odd.mp4", frames[:, :height, :width], 8)
    video = read_video(tmp_path / "odd.mp4")
    assert video.frames.shape == (6, height, width, 3)
    assert np.abs(video.frames.astype(int) - frames[:, :height, :width]).mean() < 4


def test_odd_sizes_are_padded_by_one_line_for_other_players(frames, tmp_path):
    write_video(tmp_path / "odd.mp4", frames[:, :47, :63], 8)
    log = log_of(tmp_path / "odd.mp4")
    assert "64x48" in log and "sparsetune-size=63x47" in log


@pytest.mark.parametrize("fps", [8, 23.976, 30000 / 1001, 0.5, 60])
def test_frame_rates_are_kept(frames, tmp_path, fps):
    write_video(tmp_path / "a.mp4", frames, fps)
    assert read_video(tmp_path / "a.mp4").fps == pytest.approx(fps, rel=1e-4)


def test_a_single_frame_is_a_video(frames, tmp_path):
    write_video(tmp_path / "a.mp4", frames[:1], 8)
    assert len(read_video(tmp_path / "a.mp4").frames) == 1


def test_frames_of_a_variable_rate_are_neither_doubled_nor_dropped(frames, tmp_path):
    write_video(tmp_path / "a.mp4", frames, 8)
    arguments = ["-i", "a.mp4", "-vf", "setpts=N*N/8/TB", "-fps_mode", "vfr", "-c:v", "libx264", "b.mp4"]
    assert ffmpeg.run(ffmpeg.executable(), arguments, folder=tmp_path).status == 0
    assert len(read_video(tmp_path / "b.mp4").frames) == 6


def test_every_truncation_is_refused(frames, tmp_path):
    write_video(tmp_path / "a.mp4", frames, 8)
    data = (tmp_path / "a.mp4").read_bytes()
    cut = tmp_path / "cut.mp4"
    for size in [16, len(data) // 3, len(data) // 2, len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(VideoError, match=rf"cut.mp4 is truncated: it has {size} of at least \d+ bytes") as caught:
            read_video(cut)
        assert "\n" not in str(caught.value)


def test_a_cut_that_leaves_whole_boxes_cannot_be_decoded(frames, tmp_path):
    write_video(tmp_path / "a.mp4", frames, 8)
    data = (tmp_path / "a.mp4").read_bytes()
    cut = tmp_path / "cut.mp4"
    for size in [0, 5, data.index(b"mdat") - 4]:
        cut.write_bytes(data[:size])
        with pytest.raises(
            VideoError, match=r"ffmpeg can't decode .*cut.mp4: (moov atom|.*partial file|.*Invalid data)"
        ) as caught:
            read_video(cut)
        assert "\n" not in str(caught.value)


def test_a_cut_between_two_frames_is_refused(frames, tmp_path):
    write_video(tmp_path / "a.mp4", frames, 8)
    packets = ffmpeg.run(
        ffmpeg.executable(), ["-i", "a.mp4", "-c", "copy", "-f", "framecrc", "-"], folder=tmp_path
    ).output.decode()
    last = int([line for line in packets.splitlines() if not line.startswith("#")][-1].split(",")[4])
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[:-last])
    with pytest.raises(VideoError, match=rf"is truncated: it has {len(data) - last} of at least {len(data)} bytes"):
        read_video(tmp_path / "cut.mp4")


@pytest.mark.parametrize("tail", [bytes(1), bytes(7), bytes(8), b"hello", b"and a text", b"\xff" * 16])
def test_bytes_after_the_last_box_are_ignored(frames, tmp_path, caplog, tail):
    write_video(tmp_path / "a.mp4", frames, 8)
    whole = read_video(tmp_path / "a.mp4").frames
    with (tmp_path / "a.mp4").open("ab") as file:
        file.write(tail)
    assert np.array_equal(read_video(tmp_path / "a.mp4").frames, whole)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.mp4'} has {len(tail)} bytes after its last box, which are ignored"
    ]


def test_a_fragment_cut_in_its_header_is_refused(frames, tmp_path):
    write_video(tmp_path / "a.mp4", frames, 8)
    split = ["-i", "a.mp4", "-c", "copy", "-movflags", "frag_every_frame+empty_moov", "b.mp4"]
    assert ffmpeg.run(ffmpeg.executable(), split, folder=tmp_path).status == 0
    assert len(read_video(tmp_path / "b.mp4").frames) == 6
    data = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: data.rindex(b"moof") + 2])
    with pytest.raises(VideoError, match="is truncated"):
        read_video(tmp_path / "b.mp4")


def gif(path, frames, delays):
    """Write a GIF with these delays; None leaves out the block that would hold one, as for still images."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=100)
    data, position = bytearray(path.read_bytes()), 0
    for delay in delays:
        position = data.index(b"\x21\xf9\x04", position)
        data[position : position + 8] = b"" if delay is None else data[position : position + 4] + delay + b"\0\0"
        position += 0 if delay is None else 8
    path.write_bytes(data)


def test_a_gif_whose_timestamps_repeat_is_read(frames, tmp_path):
    gif(tmp_path / "a.gif", frames[:5], [None, b"\1\0", b"\12\0", b"\0\0", b"\2\0"])
    assert len(read_video(tmp_path / "a.gif").frames) == 5


def test_a_gif_with_a_damaged_frame_is_refused(frames, tmp_path):
    gif(tmp_path / "a.gif", frames[:5], [b"\12\0"] * 5)
    data = bytearray((tmp_path / "a.gif").read_bytes())
    data[-400:-200] = b"\xff" * 200
    (tmp_path / "a.gif").write_bytes(data)
    with pytest.raises(VideoError, match=r"ffmpeg can't decode .*a.gif: LZW decode failed"):
        read_video(tmp_path / "a.gif")


def test_a_gif_of_which_frames_would_be_missing_is_refused(frames, tmp_path):
    gif(tmp_path / "a.gif", frames[:5], [None] * 5)
    with pytest.raises(VideoError, match=r"ffmpeg decodes 1 of the 5 frames of .*a.gif; convert it"):
        read_video(tmp_path / "a.gif")


def test_damage_in_the_middle_is_refused(frames, tmp_path):
    write_video(tmp_path / "a.mp4", frames, 8)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    start = data.index(b"mdat") + 4
    data[start : start + 200] = bytes(200)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(VideoError, match=r"ffmpeg can't decode .*a.mp4: .+;"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("content", [b"", b"this is text, not a video\n" * 40, bytes(range(256)) * 20])
def test_a_file_that_is_no_video_is_refused(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"ffmpeg can't decode .*a.mp4: .+;") as caught:
        read_video(path)
    assert "\n" not in str(caught.value)


def test_a_path_without_a_file_is_refused(tmp_path):
    with pytest.raises(VideoError, match=r"none.mp4 doesn't exist; use the path"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(VideoError, match="is a folder; use the path"):
        read_video(tmp_path)


def test_a_missing_ffmpeg_is_said(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(ffmpeg, "executable", lambda: None)
    with pytest.raises(VideoError, match="no ffmpeg found"):
        write_video(tmp_path / "a.mp4", frames, 8)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_other(frames, tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, frames, 8)
    before = path.read_bytes()
    monkeypatch.setattr("sparsetune.video._ENCODE", ["-c:v", "no-such-encoder"])
    with pytest.raises(VideoError, match=r"cannot encode .*a.mp4: .*no-such-encoder"):
        write_video(path, frames, 8)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_unwritable_folder_is_said(frames, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SparsetuneError, match="cannot write"):
        write_video(tmp_path / "file" / "a.mp4", frames, 8)


@pytest.mark.parametrize(
    ("change", "fps", "name", "message"),
    [
        (lambda frames: frames / 255.0, 8, "a.mp4", "must be uint8 .* got float64"),
        (lambda frames: frames[:0], 8, "a.mp4", r"at least one frame, got uint8 of shape \(0, 48, 64, 3\)"),
        (lambda frames: frames, 0, "a.mp4", "fps must be above 0 and finite, got 0"),
        (lambda frames: frames, float("nan"), "a.mp4", "fps must be above 0 and finite, got nan"),
        (lambda frames: frames, 8, "a.gif", "must end in .mp4"),
    ],
)
def test_what_cannot_be_written_is_refused(frames, tmp_path, change, fps, name, message):
    with pytest.raises(VideoError, match=message):
        write_video(tmp_path / name, change(frames), fps)


def test_side_by_side_enlarges_small_videos_by_whole_factors(frames):
    sparse = 255 - frames
    laid = side_by_side(frames, sparse)
    assert laid.shape == (6, 24 + 4 * 48, 2 * 4 * 64 + 4, 3)
    assert (laid[:, 24::4, 0:256:4] == frames).all() and (laid[:, 27::4, 3:256:4] == frames).all()
    assert (laid[:, 24::4, 260::4] == sparse).all()


def test_side_by_side_leaves_large_videos_as_they_are():
    wide = np.zeros((1, 20, 300, 3), np.uint8)
    assert side_by_side(wide, wide).shape == (1, 44, 604, 3)


def test_side_by_side_can_show_the_difference_amplified(frames):
    sparse = frames.copy()
    sparse[:, :10] = np.where(frames[:, :10] > 100, frames[:, :10] - 20, frames[:, :10] + 100)
    laid = side_by_side(frames, sparse, difference=True)
    pane = laid[:, 24::4, 2 * 260 :: 4]
    assert set(np.unique(pane[:, :10])) == {80, 255} and not pane[:, 10:].any()


def test_side_by_side_labels_its_panes(frames):
    strips = [
        side_by_side(frames, frames, labels=labels)[0, :24] for labels in (("dense", "sparse"), ("dense", "topk 0.5"))
    ]
    assert (strips[0][:, :256] == strips[1][:, :256]).all() and (strips[0][:, 260:] != strips[1][:, 260:]).any()
    assert strips[0].max() > 200


def test_side_by_side_refuses_videos_that_differ(frames):
    with pytest.raises(VideoError, match=r"got \(6, 48, 64, 3\) \(dense\) and \(5, 48, 64, 3\) \(sparse\)"):
        side_by_side(frames, frames[:5])


def test_a_picture_is_saved_losslessly(frames, tmp_path):
    save_png(tmp_path / "a.png", frames[0])
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image) == frames[0]).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_of_another_form_is_refused(frames, tmp_path):
    with pytest.raises(VideoError, match=r"an image must be uint8 \(height, width, 3\)"):
        save_png(tmp_path / "a.png", frames)
    with pytest.raises(VideoError, match=r"must end in .png"):
        save_png(tmp_path / "a.jpg", frames[0])


def test_a_small_file_that_decodes_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "black.mp4", np.zeros((20, 64, 64, 3), np.uint8), 8)
    monkeypatch.setattr("sparsetune.decoding._MAX_BYTES", 10 * 64 * 64 * 3)
    with pytest.raises(VideoError, match="has frames of 64 x 64 that take over"):
        read_video(tmp_path / "black.mp4")
    monkeypatch.setattr("sparsetune.decoding._MAX_BYTES", 20 * 64 * 64 * 3)
    assert len(read_video(tmp_path / "black.mp4").frames) == 20
