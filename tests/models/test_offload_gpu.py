"""Offloading on a real GPU: weights move between two devices in repeated generations."""

from typing import Literal

import numpy as np
import pytest
import torch

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.config import GenerationConfig, ModelConfig
from sparsetune.models.families import attention_sites
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import load_pipeline
from sparsetune.models.sparsify import sparsify

pytestmark = pytest.mark.gpu

SETTINGS = GenerationConfig(num_frames=9, height=256, width=256, num_inference_steps=2, guidance_scale=1.0)


def renderer(source: str, offload: Literal["none", "model", "sequential"]) -> Renderer:
    model = ModelConfig(name="tiny", source=source, random_weights="tiny", device="cuda", offload=offload)
    return Renderer(load_pipeline(model), SETTINGS)


@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.parametrize("source", ["cogvideox-2b", "wan2.1-t2v-1.3b", "wan2.2-t2v-a14b"])
@pytest.mark.filterwarnings("ignore")  # accelerate's own
def test_an_offloaded_model_renders_as_one_that_stays(source: str, offload: Literal["model", "sequential"]) -> None:
    frames = {}
    for way in ("none", offload):
        made = renderer(source, way)
        pipe = made.loaded.pipe
        layers = [(layer.name, layer.num_heads) for layer in attention_sites(pipe).layers]
        dense = made.render("a red ball", 0).frames
        with sparsify(pipe, Policy.uniform(layers, HeadThresholds(-1.0, topk=0.5)), "reference") as handle:
            frames[way] = [made.render("a red ball", 0).frames for _ in range(3)]
            assert handle.stats().fallbacks == {}
            assert handle.stats().sparsity > 0.2
        assert np.array_equal(made.render("a red ball", 0).frames, dense)
        if way != "none":
            assert {weight.device.type for weight in pipe.transformer.parameters()} <= {"cpu", "meta"}
    for one, other in zip(frames["none"], frames[offload], strict=True):
        assert np.array_equal(one, other)


def test_auto_offloads_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1, 1))
    model = ModelConfig(name="tiny", source="cogvideox-2b", random_weights="tiny", device="cuda", offload="auto")
    pipe = load_pipeline(model).pipe
    assert next(pipe.transformer.parameters()).device.type == "cpu"
    assert pipe._execution_device.type == "cuda"
