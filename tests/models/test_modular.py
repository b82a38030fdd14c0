"""Modular pipelines of diffusers: sparse as other pipelines are, rendered and loaded through the same API."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimaAutoBlocks, ErnieImageAutoBlocks, FluxAutoBlocks, WanBlocks, ZImageAutoBlocks

from sparsetune.config import GenerationConfig, ModelConfig
from sparsetune.models import loading
from sparsetune.models.families import family_named
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import LoadedModel, load_pipeline
from sparsetune.models.random_weights import blueprint, build_pipeline
from sparsetune.models.sparsify import sparsify
from tests.models.support import DENSE, HALF, policy

SETTINGS = GenerationConfig(num_frames=1, height=256, width=256, num_inference_steps=2, guidance_scale=3.0)


@pytest.fixture(scope="module")
def plain() -> Any:
    return build_pipeline(blueprint("flux-dev"), "tiny")


@pytest.fixture(scope="module")
def modular(plain: Any) -> Any:
    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in plain.components.items() if name in pipe.component_names})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loaded(pipe: Any) -> LoadedModel:
    identity = loading._identity(pipe, ModelConfig(name="flux"), None, "")
    return LoadedModel(pipe, identity, loading.family_of(pipe), torch.device("cpu"), torch.float32)


def test_a_modular_pipeline_renders_as_the_other_one_dense_and_sparse(modular: Any, plain: Any) -> None:
    renderers = [Renderer(loaded(pipe), SETTINGS) for pipe in (plain, modular)]
    dense = [one.render("a red circle", 0).frames for one in renderers]
    assert np.array_equal(*dense)
    sparse, counts = [], []
    for one in renderers:
        with sparsify(one.loaded.pipe, policy(one.loaded.pipe, HALF), "reference") as handle:
            sparse.append(one.render("a red circle", 0).frames)
            counts.append((handle.stats().num_calls, handle.stats().by_step))
    assert np.array_equal(*sparse) and not np.array_equal(sparse[0], dense[0])
    assert counts[0] == counts[1]
    with sparsify(modular, policy(modular, DENSE), "reference"):
        assert np.array_equal(renderers[1].render("a red circle", 0).frames, dense[1])
    assert np.array_equal(renderers[1].render("a red circle", 0).frames, dense[1])


def test_a_modular_pipeline_is_loaded_from_its_folder(modular: Any, tmp_path: Path) -> None:
    """All of its components are, of which the tokenizers aren't diffusers' or transformers'."""
    modular.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    made = load_pipeline(ModelConfig(source=str(tmp_path), device="cpu", dtype="float32"))
    assert made.family.name == "flux"
    assert made.identity.pipeline_class == "FluxModularPipeline" and made.identity.layers
    wanted = Renderer(loaded(modular), SETTINGS).render("a red circle", 0).frames
    assert np.array_equal(Renderer(made, SETTINGS).render("a red circle", 0).frames, wanted)


@pytest.mark.parametrize(
    ("blocks", "transformer", "family"),
    [
        (WanBlocks, "WanTransformer3DModel", "wan"),
        (ZImageAutoBlocks, "ZImageTransformer2DModel", "z-image"),
        (AnimaAutoBlocks, "CosmosTransformer3DModel", "anima"),
        (ErnieImageAutoBlocks, "ErnieImageTransformer2DModel", "ernie-image"),
    ],
)
def test_the_family_of_a_modular_pipeline_is_that_of_its_transformer(
    blocks: Any, transformer: str, family: str
) -> None:
    assert family_named(type(blocks().init_pipeline()).__name__, transformer).name == family
