from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetune.config import resolve
from sparsetune.models.demo import WEIGHTS
from sparsetune.models.generation import check_size

REPOSITORY = Path(__file__).parents[2]
MAX_BYTES = 16_000_000


@pytest.fixture(scope="module")
def pipeline() -> Any:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.CogVideoXPipeline.from_pretrained(WEIGHTS, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(name: str) -> list[str]:
    lines = (REPOSITORY / "configs" / "prompts" / f"demo-{name}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_folder_is_small_and_in_the_hubs_layout() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= MAX_BYTES
    assert {path.name for path in WEIGHTS.iterdir()} == {
        "README.md",
        "model_index.json",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    }


def test_it_is_made_of_cogvideox_classes(pipeline: Any) -> None:
    assert {name: type(part).__name__ for name, part in pipeline.components.items()} == {
        "tokenizer": "T5Tokenizer",
        "text_encoder": "T5EncoderModel",
        "vae": "AutoencoderKLCogVideoX",
        "transformer": "CogVideoXTransformer3DModel",
        "scheduler": "CogVideoXDDIMScheduler",
    }


@pytest.mark.parametrize(("name", "tokens"), [("demo", 1312), ("demo-long", 17972), ("demo-xl", 70232)])
def test_a_configuration_has_the_tokens_that_its_documentation_says(pipeline: Any, name: str, tokens: int) -> None:
    config, size = pipeline.transformer.config, resolve(name, (), {}).generation
    check_size(pipeline, size)
    frames = (size.num_frames - 1) // config.temporal_compression_ratio + 1
    scale = pipeline.vae_scale_factor_spatial
    found = config.max_text_seq_length + frames * (size.height // scale) * (size.width // scale)
    assert (config.num_attention_heads, config.attention_head_dim, found) == (3, 64, tokens)


@pytest.mark.parametrize("name", ["demo-long", "demo-xl"])
def test_a_larger_configuration_is_of_the_same_model_and_gate(name: str) -> None:
    small, large = resolve("demo", (), {}), resolve(None, (), {}, {"model.source": name})
    assert (large.model.name, large.model.source, large.model.dtype) == (name, "demo", "auto")
    assert (large.tune.prompt_file, large.eval.prompt_file) == (small.tune.prompt_file, small.eval.prompt_file)
    assert large.gate == small.gate


def test_the_weights_are_stored_as_finite_fp16(pipeline: Any) -> None:
    from safetensors.torch import load_file

    for path in WEIGHTS.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == torch.float16, name
            assert tensor.isfinite().all(), name


def test_every_word_of_the_prompts_is_one_token(pipeline: Any) -> None:
    for prompt in prompts("tune") + prompts("eval"):
        ids = pipeline.tokenizer(prompt).input_ids
        assert len(ids) == len(prompt.split()) + 1, prompt
        assert pipeline.tokenizer.unk_token_id not in ids, prompt


def test_the_prompt_sets_are_disjoint() -> None:
    tune, evaluation = prompts("tune"), prompts("eval")
    assert min(len(set(tune)), len(set(evaluation))) >= 12
    assert not set(tune) & set(evaluation)


def test_prompts_are_captions_of_the_world_and_eval_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from tools.demo_model.world import held_out_scenes, parse_caption

    held_out = held_out_scenes()
    assert all(parse_caption(prompt) in held_out for prompt in prompts("eval"))
    assert not any(parse_caption(prompt) in held_out for prompt in prompts("tune"))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["17x64x64", "49x120x184"])
def test_the_scorer_reads_what_was_drawn(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from tools.demo_model.drawing import draw
    from tools.demo_model.scorer import read
    from tools.demo_model.world import Size, held_out_scenes

    scenes = list(held_out_scenes()[:4])
    video = draw(scenes, torch.device("cpu"), torch.Generator().manual_seed(0), size=Size.parse(size)).video
    frames = ((video + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    assert all(read(clip).shows(scene) for clip, scene in zip(frames, scenes, strict=True))


@pytest.mark.slow
def test_videos_of_held_out_captions_show_what_they_say(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from tools.demo_model.sampling import sample, score
    from tools.demo_model.world import held_out_scenes

    scenes = held_out_scenes()[:4]
    videos = sample(pipeline, [scene.caption() for scene in scenes], steps=10, guidance=1.0, seed=0)
    _, readings = score(videos, scenes)
    assert all(reading.shows(scene) for reading, scene in zip(readings, scenes, strict=True)), readings


def test_a_scene_is_the_same_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from tools.demo_model.drawing import draw
    from tools.demo_model.world import Size, held_out_scenes

    scenes = list(held_out_scenes()[:6])
    small, large = (
        draw(scenes, torch.device("cpu"), torch.Generator().manual_seed(0), size=Size(17, side, side)).video
        for side in (64, 192)
    )
    reduced = torch.nn.functional.avg_pool3d(large, (1, 3, 3))
    assert (reduced - small).abs().mean() < 0.01
    longer = draw(scenes, torch.device("cpu"), torch.Generator().manual_seed(0), size=Size(33, 64, 64)).video
    assert torch.equal(longer[:, :, ::2], small) or (longer[:, :, ::2] - small).abs().max() < 1e-3


def test_sizes_that_the_pipeline_would_round_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from tools.demo_model.world import Size

    assert str(Size.parse("49x240x360")) == "49x240x360"
    with pytest.raises(ValueError, match=r"frames must be 4 n \+ 1, height and width multiples of 8, got 48x"):
        Size(48, 64, 64)
