import shutil
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
    with pytest.raises(ModelError, match=r"neither an existing folder nor a hub id.*--model demo"):
        load_pipeline(ModelConfig(source=source))


def test_a_folder_without_a_pipeline_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="as a diffusers pipeline"):
        load_pipeline(ModelConfig(source=str(tmp_path)))


def test_an_unreachable_hub_is_said() -> None:
    with pytest.raises(ModelError, match=r"cannot load nobody/nothing from the hub.*--model demo"):
        load_pipeline(ModelConfig(source="nobody/nothing"))


def test_a_gpu_that_isnt_there_is_said() -> None:
    with pytest.raises(ModelError, match="there is no device cuda:99"):
        load_pipeline(ModelConfig(device="cuda:99"))


def test_offloading_needs_a_gpu() -> None:
    with pytest.raises(ModelError, match="--offload model needs a CUDA GPU"):
        load_pipeline(ModelConfig(device="cpu", offload="model"))


COMMIT = "1137dacfc2c9c012bed6a0793f4ecf2ca8e7ba01"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Hub model in the local cache, with the cache's layout; the Hub is unreachable."""
    folder = tmp_path / "models--nobody--demo"
    shutil.copytree(WEIGHTS, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return "nobody/demo"


@pytest.mark.parametrize("revision", [None, "main"])
def test_the_commit_that_the_hub_gave_is_recorded_and_said_not_to_be_pinned(
    hub: str, revision: str | None, demo: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    identity = load_pipeline(ModelConfig(source=hub, revision=revision, device="cpu")).identity
    assert (identity.revision, identity.fingerprint) == (COMMIT, demo.identity.fingerprint)
    assert f"nobody/demo was loaded at {COMMIT}, but its revision isn't pinned" in caplog.text


def test_a_pinned_commit_is_loaded_without_a_word(hub: str, caplog: pytest.LogCaptureFixture) -> None:
    assert load_pipeline(ModelConfig(source=hub, revision=COMMIT, device="cpu")).identity.revision == COMMIT
    assert "pinned" not in caplog.text


def test_a_folder_has_no_revision_unless_it_is_one_of_the_hubs(hub: str, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--nobody--demo" / "snapshots" / COMMIT
    assert load_pipeline(ModelConfig(source=str(snapshot), device="cpu")).identity.revision == COMMIT
    assert load_pipeline(ModelConfig(source=str(WEIGHTS), revision="v1", device="cpu")).identity.revision is None
