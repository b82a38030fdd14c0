from types import SimpleNamespace

import pytest

from sparsetune.checkpoint import Checkpoint, Manifest
from sparsetune.config import GenerationConfig
from sparsetune.models import sparsify as sparsify_module
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import LoadedModel
from sparsetune.models.sparsify import default_policy, sparsify, warn_of_other_settings
from tests.models.conftest import PROMPT

TUNED = Manifest(tuner="manual", num_frames=17, height=64, width=96, num_inference_steps=10)


def test_settings_that_were_tuned_for_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    settings = GenerationConfig(num_frames=17, height=64, width=96, num_inference_steps=10, guidance_scale=3.0)
    warn_of_other_settings(TUNED, settings)
    warn_of_other_settings(Manifest(tuner="unknown"), GenerationConfig())
    assert caplog.messages == []


def test_other_settings_are_told_beside_the_tuned_ones(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_other_settings(TUNED, GenerationConfig(num_frames=9, height=64, width=96, num_inference_steps=4))
    (message,) = caplog.messages
    assert message.startswith(
        "the checkpoint was tuned for num_frames 17 and renders 9, num_inference_steps 10 and renders 4: "
    )


@pytest.mark.parametrize(
    ("tuned", "difference"),
    [
        ({"num_inference_steps": 4, "num_frames": 9, "height": 64, "width": 64}, None),
        ({"num_inference_steps": 4, "num_frames": 7, "height": 64, "width": 64}, "num_frames 7 and renders 9"),
        ({"num_inference_steps": 30, "width": 96}, "num_inference_steps 30 and renders 4, width 96 and renders 64"),
    ],
)
def test_the_first_call_warns_of_what_is_rendered(
    demo: LoadedModel, renderer: Renderer, caplog: pytest.LogCaptureFixture, tuned: dict[str, int], difference: str
) -> None:
    checkpoint = Checkpoint(default_policy(demo.pipe), Manifest(tuner="manual", **tuned))
    with sparsify(demo.pipe, checkpoint, "reference"):
        renderer.render(PROMPT, 0)
    assert [message.partition(":")[0] for message in caplog.messages] == (
        [] if difference is None else [f"the checkpoint was tuned for {difference}"]
    )


@pytest.mark.parametrize(("tuned", "found"), [(17, {}), (25, {"num_frames": 21})])
def test_frames_padded_to_whole_patches_are_those_tuned_for(
    monkeypatch: pytest.MonkeyPatch, tuned: int, found: dict[str, int]
) -> None:
    """CogVideoX 1.5 has patches of two latent frames: 17 frames are 5 latent ones, padded to 6."""
    pipe = SimpleNamespace(
        transformer=SimpleNamespace(config=SimpleNamespace(patch_size=2, patch_size_t=2)),
        vae_scale_factor_temporal=4,
    )
    monkeypatch.setattr(sparsify_module, "token_side", lambda pipe: 16)
    pixels = sparsify_module._pixels(pipe, (3, 4, 6), Manifest(tuner="manual", num_frames=tuned))
    assert pixels == {"height": 64, "width": 96} | found


def test_packed_tokens_of_an_unknown_grid_have_no_size() -> None:
    assert sparsify_module._pixels(None, (1, 1, 480), TUNED) == {}
