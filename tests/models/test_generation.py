import numpy as np
import pytest
import torch

from sparsetune.config import GenerationConfig
from sparsetune.errors import GenerationError
from sparsetune.models.generation import Renderer, to_uint8
from sparsetune.models.loading import LoadedModel
from tests.models.conftest import PROMPT, SMALL


def test_a_rendering_is_uint8_frames_and_the_same_for_the_same_seed(renderer: Renderer) -> None:
    steps = []
    one = renderer.render(PROMPT, 3, lambda step, num_steps: steps.append((step, num_steps)))
    two = renderer.render(PROMPT, 3)
    other = renderer.render(PROMPT, 4)
    assert one.frames.dtype == np.uint8
    assert one.frames.shape == (9, 64, 64, 3)
    assert one.seconds > 0
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert np.array_equal(one.frames, two.frames)
    assert not np.array_equal(one.frames, other.frames)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 16}, "num_frames must be a multiple of 8 plus 1, got 16; the nearest is 17"),
        ({"height": 66}, "height must be a multiple of 8, got 66; the nearest is 64"),
        ({"width": 1}, "width must be a multiple of 8, got 1; the nearest is 8"),
    ],
)
def test_a_size_that_the_model_cant_do_names_the_nearest(demo: LoadedModel, change: dict, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        Renderer(demo, GenerationConfig(**(SMALL.model_dump() | change)))


def test_frames_are_rounded_and_clipped() -> None:
    frames = np.array([[[[-0.1, 0.5, 1.1]]]], dtype=np.float32)
    assert to_uint8(frames).tolist() == [[[[0, 128, 255]]]]


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN or infinite frames"), (0.0, "all frames are black")])
def test_broken_frames_are_an_error_and_no_video(value: float, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        to_uint8(np.full((2, 4, 4, 3), value, dtype=np.float32))


def test_out_of_memory_says_what_would_help(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*args: object, **kwargs: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(renderer.loaded.pipe.vae, "decode", allocate)
        with pytest.raises(
            GenerationError, match="out of memory while rendering; try, in this order: --vae-tiling, --off"
        ):
            renderer.render(PROMPT, 0)


def test_the_demo_model_names_words_that_it_does_not_know_once(
    renderer: Renderer, caplog: pytest.LogCaptureFixture
) -> None:
    short = renderer.with_steps(1)
    for _ in range(2):
        short.render("a panda eats bamboo over a grey background", 1)
    short.render("a red circle moving right over a grey background", 1)
    assert [record.getMessage().partition(" and will")[0] for record in caplog.records] == [
        "the demo model doesn't know panda, eats, bamboo"
    ]
