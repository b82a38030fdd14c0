from pathlib import Path

import pytest

from sparsetune.config import ModelConfig
from sparsetune.errors import ModelError
from sparsetune.models.demo import WEIGHTS
from sparsetune.models.loading import LoadedModel, load_pipeline


def test_the_demo_is_cogvideox_with_its_own_classes(demo: LoadedModel) -> None:
    assert demo.identity.pipeline_class == "CogVideoXPipeline"
    assert demo.identity.transformer_class == "CogVideoXTransformer3DModel"
    assert demo.family.name == "cogvideo"
    assert len(demo.identity.layers) == 8
    assert len(demo.identity.fingerprint) == 64


def test_a_local_folder_loads_as_the_same_model(demo: LoadedModel) -> None:
    local = load_pipeline(
        ModelConfig(name="local", source=str(WEIGHTS), device="cpu", vae_tiling=True, vae_slicing=True)
    )
    assert local.identity.fingerprint == demo.identity.fingerprint
    assert local.pipe.vae.use_tiling
    assert local.pipe.vae.use_slicing


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "nowhere"])
def test_a_folder_that_isnt_there_is_said(source: str) -> None:
    with pytest.raises(ModelError, match=r"existing folder or a hub id.*--model demo"):
        load_pipeline(ModelConfig(source=source))


def test_a_folder_without_a_pipeline_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="must hold a pipeline as diffusers saves it"):
        load_pipeline(ModelConfig(source=str(tmp_path)))


def test_an_unreachable_hub_is_said() -> None:
    with pytest.raises(ModelError, match=r"the hub must be reachable and have nobody/nothing.*--model demo"):
        load_pipeline(ModelConfig(source="nobody/nothing"))


def test_a_gpu_that_isnt_there_is_said() -> None:
    with pytest.raises(ModelError, match="device cuda:99 must be a GPU of this machine"):
        load_pipeline(ModelConfig(device="cuda:99"))


def test_offloading_needs_a_gpu() -> None:
    with pytest.raises(ModelError, match="offload model must have a CUDA GPU to offload from"):
        load_pipeline(ModelConfig(device="cpu", offload="model"))
