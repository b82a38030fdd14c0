import numpy as np
import pytest
from PIL import Image

from sparsetune import ffmpeg
from sparsetune.decoding import Decoder, open_video, over_checkerboard, read_video
from sparsetune.errors import VideoError
from sparsetune.video import write_video


@pytest.fixture(scope="module")
def frames():
    y, x, t = np.meshgrid(np.arange(48), np.arange(64), np.arange(6), indexing="ij")
    waves = [127 + 120 * np.sin(x / 9 + t / 3), 127 + 120 * np.cos(y / 11 - t / 4), 127 + 100 * np.sin((x + y) / 17)]
    return np.stack(waves, axis=-1).transpose(2, 0, 1, 3).astype(np.uint8)


def run(folder, *arguments):
    done = ffmpeg.run(ffmpeg.executable(), ["-y", *arguments], folder=folder)
    assert done.status == 0, done.log


def test_a_written_video_says_all_of_its_colours(frames, tmp_path):
    write_video(tmp_path / "a.mp4", frames, 8)
    file = open_video(tmp_path / "a.mp4")
    assert (file.matrix, file.primaries, file.transfer, file.range) == ("bt709", "bt709", "bt709", "tv")
    assert (file.height, file.width, file.fps, file.pixel_format, file.bit_depth) == (48, 64, 8.0, "yuv420p", 8)
    assert not file.has_alpha and not file.is_padded and file.rotation == 0


def test_a_rotated_video_is_decoded_upright(frames, tmp_path):
    write_video(tmp_path / "a.mp4", frames, 8)
    run(tmp_path, "-display_rotation", "90", "-i", "a.mp4", "-c", "copy", "b.mp4")
    file = open_video(tmp_path / "b.mp4")
    assert (file.height, file.width, abs(file.rotation)) == (64, 48, 90.0)
    upright = np.rot90(read_video(tmp_path / "a.mp4").frames, k=1, axes=(1, 2))
    assert np.abs(np.subtract(read_video(tmp_path / "b.mp4").frames, upright, dtype=np.int16)).mean() < 2


def test_a_rate_that_varies_is_told_from_one_that_its_time_base_rounds(frames, tmp_path):
    write_video(tmp_path / "a.mp4", frames, 24000 / 1001)
    run(tmp_path, "-i", "a.mp4", "-c", "copy", "rounded.mkv")  # a time base of 1 ms
    run(tmp_path, "-i", "a.mp4", "-vf", "setpts=N*N/8/TB", "-fps_mode", "vfr", "varying.mp4")
    for name, varies in (("a.mp4", False), ("rounded.mkv", False), ("varying.mp4", True)):
        with Decoder(open_video(tmp_path / name)) as decoder:
            assert decoder.finish().is_variable == varies
            assert decoder.num_frames == 6


def test_names_are_literal(tmp_path):
    for name, level in (("z1.png", 10), ("z%d.png", 200), ("z%03d*[a]?.png", 90), ("-i:concat.png", 30)):
        Image.fromarray(np.full((20, 30, 3), level, np.uint8)).save(tmp_path / name)
        (frame,) = read_video(tmp_path / name).frames
        assert (frame == level).all()


def test_a_16_bit_picture_is_decoded_without_rounding(tmp_path):
    levels = np.linspace(0, 65535, 40 * 30 * 3).astype(">u2").reshape(40, 30, 3)
    (tmp_path / "a.ppm").write_bytes(b"P6 30 40 65535\n" + levels.tobytes())
    run(tmp_path, "-i", "a.ppm", "-pix_fmt", "rgb48be", "a.png")
    file = open_video(tmp_path / "a.png")
    with Decoder(file, file.bit_depth) as decoder:
        (frame,) = decoder.read(5)
    assert file.bit_depth == 16 and frame.dtype == np.uint16 and (frame == levels).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_transparent_pixels_show_a_checkerboard(dtype):
    peak = np.iinfo(dtype).max
    clear, opaque = np.zeros((1, 16, 16, 4), dtype), np.full((1, 16, 16, 4), peak, dtype)
    shown = over_checkerboard(clear)
    assert (shown[0, :8, :8] == 0).all() and (shown[0, :8, 8:] == peak).all() and (shown[0, 8:, :8] == peak).all()
    assert (over_checkerboard(opaque) == peak).all()
    half = opaque.copy()
    half[..., 3] = peak // 2
    assert over_checkerboard(half)[0, 0, 0, 0] == peak // 2


def test_a_file_without_video_is_refused_and_its_cover_is_none(frames, tmp_path):
    Image.fromarray(frames[0]).save(tmp_path / "cover.png")
    tone = ("-f", "lavfi", "-i", "sine=duration=1")
    run(tmp_path, *tone, "-i", "cover.png", "-map", "0", "-map", "1", "-c:v", "png", "-disposition:v", "attached_pic",
        "a.mp3")  # fmt: skip
    with pytest.raises(VideoError, match=r"a.mp3 has no video stream, of which a cover picture is none"):
        read_video(tmp_path / "a.mp3")


def test_frames_are_decoded_some_at_a_time(frames, tmp_path):
    write_video(tmp_path / "a.mp4", frames, 8)
    whole = read_video(tmp_path / "a.mp4").frames
    with Decoder(open_video(tmp_path / "a.mp4")) as decoder:
        parts = [decoder.read(4), decoder.read(4), decoder.read(4)]
    assert [len(part) for part in parts] == [4, 2, 0]
    assert (np.concatenate(parts) == whole).all()
