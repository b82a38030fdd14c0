import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

from sparsetune.config import ModelConfig, resolve
from sparsetune.errors import ModelError
from sparsetune.models import loading
from sparsetune.models.demo import WEIGHTS
from sparsetune.models.loading import LoadedModel, ModelIdentity, load_pipeline


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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "there is no folder nowhere"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("nowhere", "unknown model nowhere; list them with `sparsetune models`"),
        ("cogvideo-2b", r"unknown model cogvideo-2b; did you mean cogvideox-2b\?"),
    ],
)
def test_a_model_that_isnt_there_is_said(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        load_pipeline(ModelConfig(source=source))
    assert raised.value.exit_code == 2


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


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the demo model, saved as users save theirs."""
    folder, pipe = tmp_path_factory.mktemp("lora"), load_pipeline(ModelConfig(device="cpu")).pipe
    torch.manual_seed(0)
    layers = ["to_q", "to_k", "to_v"]
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=layers))
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


def query_weight(model: LoadedModel) -> torch.Tensor:
    return model.pipe.transformer.transformer_blocks[0].attn1.to_q.weight


def test_a_lora_is_fused_and_makes_it_another_model(demo: LoadedModel, lora: Path) -> None:
    whole = load_pipeline(ModelConfig(device="cpu", lora=str(lora)))
    half = load_pipeline(ModelConfig(device="cpu", lora=str(lora / "pytorch_lora_weights.safetensors"), lora_scale=0.5))
    assert (whole.identity.lora, whole.identity.lora_scale) == (str(lora), 1.0)
    assert whole.identity.layers == demo.identity.layers
    assert len({model.identity.fingerprint for model in (demo, whole, half)}) == 3
    change = query_weight(whole) - query_weight(demo)
    assert change.abs().max() > 1e-3
    assert torch.allclose(query_weight(half) - query_weight(demo), change / 2, atol=1e-6)


def test_a_lora_of_two_transformers_is_fused_into_each(tmp_path: Path) -> None:
    """Two files in a folder, as the distilled ones of Wan 2.2 are published."""
    wan = ModelConfig(source="wan2.2-t2v-a14b", random_weights="tiny", device="cpu")
    plain, torch_state = load_pipeline(wan), torch.random.get_rng_state()
    for name in ("high_noise_model", "low_noise_model"):
        pipe = load_pipeline(wan).pipe
        pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q"]))
        layers = get_peft_model_state_dict(pipe.transformer)
        pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers, weight_name=f"{name}.safetensors")
    torch.random.set_rng_state(torch_state)
    loras = (tmp_path, tmp_path / "high_noise_model.safetensors")
    both, high = (load_pipeline(wan.model_copy(update={"lora": str(lora)})) for lora in loras)

    def change(model: LoadedModel, name: str) -> torch.Tensor:
        after, before = (getattr(one.pipe, name).blocks[0].attn1.to_q.weight for one in (model, plain))
        return after - before

    assert change(both, "transformer").abs().max() > 1e-3 < change(both, "transformer_2").abs().max()
    assert torch.equal(change(high, "transformer"), change(both, "transformer"))
    assert not change(high, "transformer_2").any()
    assert not torch.allclose(change(both, "transformer"), change(both, "transformer_2"), atol=1e-3)
    assert len({model.identity.fingerprint for model in (plain, both, high)}) == 3


@pytest.mark.parametrize(
    ("source", "place", "names"),
    [
        ("owner/repo", "owner/repo", (None,)),
        ("owner/repo/lora.safetensors", "owner/repo", ("lora.safetensors",)),
        ("owner/repo/in/lora.safetensors", "owner/repo", ("in/lora.safetensors",)),
        ("owner/repo/V1.1", "owner/repo", ("V1.1/high_noise_model.safetensors", "V1.1/low_noise_model.safetensors")),
    ],
)
def test_a_lora_may_be_a_file_or_folder_of_a_hub_repository(source: str, place: str, names: tuple[str | None]) -> None:
    assert loading._lora_files(SimpleNamespace(transformer_2=object()), source) == (place, names)


def test_a_lora_that_isnt_there_is_said() -> None:
    with pytest.raises(ModelError, match=r"cannot load the LoRA nowhere/lora: .*use a file, a folder or a hub id"):
        load_pipeline(ModelConfig(device="cpu", lora="nowhere/lora"))


def test_sigmas_are_shifted_where_a_scheduler_can(demo: LoadedModel) -> None:
    with pytest.raises(ModelError, match=r"shifts no sigmas, so that model.flow_shift 3 can't be set; leave it out"):
        load_pipeline(ModelConfig(device="cpu", flow_shift=3.0))
    wan = ModelConfig(source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", random_weights="tiny", device="cpu")
    plain, shifted = (load_pipeline(wan.model_copy(update={"flow_shift": shift})).pipe for shift in (None, 8.0))
    for pipe in (plain, shifted):
        pipe.scheduler.set_timesteps(4)
    assert shifted.scheduler.sigmas[1] > plain.scheduler.sigmas[1]


def test_a_shift_replaces_one_by_size_and_a_stretch_to_the_last_sigma() -> None:
    config = resolve("qwen-image-4steps", (), {}, {"model.random_weights": "tiny", "model.device": "cpu"}).model
    scheduler = load_pipeline(config).pipe.scheduler
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.9)  # as the pipeline does
    assert scheduler.sigmas.tolist() == pytest.approx([3 * s / (1 + 2 * s) for s in (1.0, 0.75, 0.5, 0.25, 0.0)])
    assert config.lora is None  # nothing is downloaded for random weights


@pytest.mark.parametrize(
    ("source", "random_weights", "published"),
    [
        ("THUDM/CogVideoX-2b", "no", "THUDM/CogVideoX-2b"),
        ("THUDM/CogVideoX-2b", "tiny", "short"),
        ("demo", "no", "short"),
        ("/models/CogVideoX-2b", "no", "short"),
        ("models/mine", "no", "short"),
    ],
)
def test_only_a_hub_model_is_published_under_its_id(source, random_weights, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    identity = ModelIdentity("short", source, None, "f" * 64, "Pipeline", "Transformer", (), random_weights)
    assert identity.published_name == published
