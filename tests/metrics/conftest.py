import numpy as np
import pytest

from sparsetune import ffmpeg
from sparsetune.decoding import read_video


@pytest.fixture(scope="session")
def panning():
    """Nine frames of 180 x 200 pixels, panning over scikit-image's photograph of an astronaut."""
    data = pytest.importorskip("skimage.data")
    photograph = data.astronaut()
    return np.stack([photograph[60 + 3 * t : 240 + 3 * t, 120 + 5 * t : 320 + 5 * t] for t in range(9)])


@pytest.fixture(scope="session")
def decoded(panning, tmp_path_factory):
    """The same video decoded from a fine and from a coarse H.264 file: what real, related artifacts look like."""
    folder = tmp_path_factory.mktemp("decoded")
    height, width = panning.shape[1:3]
    videos = []
    for quality in (18, 38):
        path = folder / f"{quality}.mp4"
        arguments = f"-y -f rawvideo -pix_fmt rgb24 -s {width}x{height} -r 8 -i pipe:0 -c:v libx264 -crf {quality}"
        done = ffmpeg.run(
            ffmpeg.executable(), [*arguments.split(), "-pix_fmt", "yuv420p", str(path)], feed=[panning.tobytes()]
        )
        assert done.status == 0, done.log
        videos.append(read_video(path).frames)
    return tuple(videos)


@pytest.fixture
def noise():
    """Returns a pair of unrelated random videos of a given shape."""

    def make(*shape, seed=0):
        generator = np.random.default_rng(seed)
        return tuple(generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(2))

    return make
