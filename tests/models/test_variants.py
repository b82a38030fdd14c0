from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsetune.bench.step import capture_step
from sparsetune.config import GenerationConfig, ModelConfig
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import LoadedModel, load_pipeline
from sparsetune.models.variants import VARIANTS

BOUNDS = {"kernel": (0.0, 1e-5), "dtype": (1e-4, 0.1), "fp8": (1e-3, 0.3)}
"""Relative error of the transformer's output that each variant may cause."""


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_pipeline(ModelConfig(device="cpu"))


@pytest.fixture(scope="module")
def output(loaded: LoadedModel) -> Callable[[], Tensor]:
    settings = GenerationConfig(num_frames=9, height=64, width=64, num_inference_steps=2, guidance_scale=1.0)
    module, args, kwargs = capture_step(Renderer(loaded, settings), "a red circle", 7).calls[0]

    def run() -> Tensor:
        with torch.inference_mode():
            result: Tensor = module(*args, **kwargs)[0]
        return result

    return run


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_the_output_a_little_and_leaves_the_model_as_it_was(
    name: str, loaded: LoadedModel, output: Callable[[], Tensor]
) -> None:
    transformer = loaded.pipe.transformer
    before, weights = output(), {key: value.clone() for key, value in transformer.state_dict().items()}
    with VARIANTS[name](loaded):
        changed = output()
        rounded = {key for key, value in transformer.state_dict().items() if not torch.equal(value, weights[key])}
    low, high = BOUNDS[name]
    assert low <= float((changed - before).norm() / before.norm()) <= high
    assert bool(rounded) == (name == "fp8")
    assert not any("norm" in key or "patch_embed" in key for key in rounded)
    assert all(torch.equal(value, weights[key]) for key, value in transformer.state_dict().items())
    assert torch.equal(output(), before)
