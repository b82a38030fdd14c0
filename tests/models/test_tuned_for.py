import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsetune.checkpoint import Manifest
from sparsetune.config import GenerationConfig
from sparsetune.models.sparsify import warn_at_first_call, warn_of_other_settings

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


class _Transformer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=16, patch_size_t=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def pipeline(steps: int) -> Any:
    return SimpleNamespace(
        transformer=_Transformer(),
        scheduler=SimpleNamespace(num_inference_steps=steps),
        vae_scale_factor_spatial=8,
        vae_scale_factor_temporal=4,
    )


@pytest.mark.parametrize(
    ("shape", "steps", "difference"),
    [
        ((1, 6, 16, 8, 12), 10, None),  # 5 latent frames, padded to whole patches of 2
        ((1, 16, 6, 8, 12), 10, None),  # channels before frames
        ((1, 6, 16, 8, 8), 10, "width 96 and renders 64"),
        ((1, 4, 16, 8, 12), 10, "num_frames 17 and renders 13"),
        ((1, 6, 16, 8, 12), 30, "num_inference_steps 10 and renders 30"),
        ((1, 480, 16), 10, None),  # packed latents don't have a size
    ],
)
def test_first_call_logs_what_is_rendered_and_leaves_nothing_behind(
    caplog: pytest.LogCaptureFixture, shape: tuple[int, ...], steps: int, difference: str | None
) -> None:
    pipe = pipeline(steps)
    warn_at_first_call(pipe, TUNED)
    for _ in range(2):
        pipe.transformer(hidden_states=torch.zeros(shape))
    assert [message.partition(":")[0] for message in caplog.messages] == (
        [] if difference is None else [f"the checkpoint was tuned for {difference}"]
    )
    assert not pipe.transformer._forward_pre_hooks
    assert all(record.levelno == logging.WARNING for record in caplog.records)
