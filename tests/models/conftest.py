from collections.abc import Iterator

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from sparsetune.config import GenerationConfig, ModelConfig
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import LoadedModel, load_pipeline

SMALL = GenerationConfig(num_frames=9, height=64, width=64, num_inference_steps=4, guidance_scale=1.0)
PROMPT = "a red circle moving right over a grey background"


@pytest.fixture(autouse=True)
def attention_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore diffusers' kernel for all models of the process, which `set_attention_backend` of any one changes."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


@pytest.fixture(scope="session")
def shared_demo() -> LoadedModel:
    return load_pipeline(ModelConfig(device="cpu", dtype="float32"))


@pytest.fixture
def demo(shared_demo: LoadedModel) -> Iterator[LoadedModel]:
    """The packaged model; tests must not change it."""
    before = {name: dict(module.__dict__) for name, module in shared_demo.pipe.transformer.named_modules()}
    yield shared_demo
    for name, module in shared_demo.pipe.transformer.named_modules():
        assert module.__dict__.get("forward") is before[name].get("forward"), name
        assert len(module._forward_pre_hooks) == len(before[name]["_forward_pre_hooks"]), name


@pytest.fixture
def renderer(demo: LoadedModel) -> Renderer:
    return Renderer(demo, SMALL)
