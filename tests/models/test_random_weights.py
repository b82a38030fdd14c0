"""Models with random weights, loaded through the same API as others."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES

from sparsetune.cli.main import main
from sparsetune.config import resolve
from sparsetune.errors import GenerationError, ModelError
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import load_pipeline
from sparsetune.models.prompts import Prompt
from sparsetune.models.random_weights import blueprint, blueprints, build_component
from sparsetune.models.sparsify import default_policy, sparsify
from tests.models.cases import image

TINY = {"model.random_weights": "tiny", "model.device": "cpu"}


def renderer(name: str, **settings: object) -> Renderer:
    flags = {f"generation.{key}": value for key, value in settings.items()}
    config = resolve(None, (), {}, {"model.source": name} | TINY | flags)
    return Renderer(load_pipeline(config.model), config.generation)


@pytest.mark.parametrize(
    ("name", "frames"),
    [("flux-dev", 1), ("wan2.1-t2v-1.3b", 9), pytest.param("ltx-video", 9, marks=pytest.mark.slow),
     pytest.param("mochi", 13, marks=pytest.mark.slow), pytest.param("hunyuanvideo", 9, marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_tiny_models_render_the_same_twice_and_run_sparse(name: str, frames: int) -> None:
    made = renderer(name, num_inference_steps=2)
    dense = made.render("a red circle", 0).frames
    assert dense.shape[0] == frames and dense.shape[-1] == 3
    assert np.array_equal(made.render("a red circle", 0).frames, dense)
    with sparsify(made.loaded.pipe, default_policy(made.loaded.pipe)) as handle:
        made.render("a red circle", 0)
        assert handle.stats().num_calls["sparse"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("chroma1-hd", 1),
        ("flux-schnell", 1),
        ("flux2-dev", 1),
        ("flux2-klein-4b", 1),
        ("kandinsky-5-lite", 9),
        ("z-image-turbo", 1),
        ("allegro", 8),
        ("cosmos-2.5-2b", 9),
        ("easyanimate", 9),
        ("ltx-2", 9),
        ("qwen-image", 1),
        ("sd3-medium", 1),
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers on its scheduler's tensors
def test_models_with_ways_of_their_own_render_frames(name: str, frames: int) -> None:
    """A VAE that only works with tiling, separate or no negative prompts, audio beside the video."""
    size = {"num_frames": frames, "height": 128, "width": 192, "num_inference_steps": 2, "guidance_scale": 3.0}
    assert renderer(name, **size).render("a red circle", 0).frames.shape == (frames, 128, 192, 3)


@pytest.mark.slow
def test_a_guider_takes_the_guidance_of_the_settings() -> None:
    size = {"num_frames": 5, "height": 128, "width": 128, "num_inference_steps": 1}
    calls = []
    for scale in (1.0, 9.0):
        made = renderer("hunyuanvideo-1.5", guidance_scale=scale, **size)
        with sparsify(made.loaded.pipe, default_policy(made.loaded.pipe), "reference") as handle:
            made.render("a red circle", 0)
            calls.append(sum(handle.stats().num_calls.values()))
    assert calls[1] == 2 * calls[0] > 0  # with and without the prompt


@pytest.mark.slow
def test_each_of_two_transformers_has_a_guidance_of_its_own() -> None:
    size = {"num_frames": 5, "height": 64, "width": 64, "num_inference_steps": 4}
    made = {scale: renderer("wan2.2-t2v-a14b", guidance_scale_2=scale, **size) for scale in (None, 4.0, 1.0)}
    frames = {scale: one.render("a red circle", 0).frames for scale, one in made.items()}
    assert np.array_equal(frames[None], frames[4.0])  # the first's is 4
    assert not np.array_equal(frames[None], frames[1.0])
    keys = {baseline_key(one, "a red circle", 0).digest for one in made.values()}
    assert len(keys) == 3


def test_a_second_guidance_needs_a_second_transformer() -> None:
    with pytest.raises(GenerationError, match="guidance_scale_2 needs a pipeline with a second transformer"):
        renderer("wan2.1-t2v-1.3b", guidance_scale_2=3.0)


def test_sigmas_are_those_of_the_steps_of_a_distilled_model() -> None:
    size = {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 3}
    made = renderer("ltx-2-8steps", sigmas=(1.0, 0.9, 0.4), **size)
    made.render("a red circle", 0)
    assert made.loaded.pipe.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.9, 0.4, 0.0])
    assert baseline_key(made, "a red circle", 0).sigmas == (1.0, 0.9, 0.4)
    assert made.with_steps(2).settings.sigmas == ()
    with pytest.raises(GenerationError, match=r"generation\.sigmas has 2 values for 3 steps; empty it with --set"):
        renderer("ltx-2-8steps", sigmas=(1.0, 0.5), **size)
    with pytest.raises(GenerationError, match=r"WanPipeline takes no sigmas; leave generation\.sigmas empty"):
        renderer("wan2.1-t2v-1.3b", sigmas=(1.0, 0.5), num_inference_steps=2)
    published = resolve("ltx-2-8steps", (), {}).generation
    assert list(published.sigmas) == DISTILLED_SIGMA_VALUES and published.num_inference_steps == 8


def test_a_data_type_that_the_device_cant_compute_in_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU can't pool Cosmos' frames in bfloat16, for example."""
    made = renderer("flux-dev", num_inference_steps=1)

    def cant(*_args: object, **_kwargs: object) -> None:
        raise NotImplementedError("\"pool\" not implemented for 'BFloat16'")

    monkeypatch.setattr(made.loaded.pipe.vae, "decode", cant)
    with pytest.raises(GenerationError, match=r"cannot compute on cpu in float32: \"pool\".*another --dtype"):
        made.render("a red circle", 0)


def test_nothing_of_a_random_model_is_taken_for_the_real_one() -> None:
    config = resolve(None, (), {}, {"model.source": "wan2.1-t2v-1.3b"} | TINY)
    assert config.model.name == "wan2.1-t2v-1.3b-tiny"
    assert (config.generation.num_frames, config.generation.height, config.model.dtype) == (9, 128, "auto")
    full = resolve(None, (), {}, {"model.source": "wan2.1-t2v-1.3b", "model.random_weights": "full"})
    assert (full.model.name, full.generation.num_frames) == ("wan2.1-t2v-1.3b-random", 81)
    explicit = resolve(None, (), {}, {"model.source": "mochi", "generation.num_frames": 19} | TINY)
    assert explicit.generation.num_frames == 19


def test_an_unknown_model_is_told_the_nearest() -> None:
    with pytest.raises(ModelError, match="did you mean allegro"):
        blueprint("alegro")


@pytest.mark.parametrize("size", ["full", "tiny"])
@pytest.mark.slow
@pytest.mark.parametrize("name", blueprints())
def test_every_component_can_be_built(name: str, size: str) -> None:
    with torch.device("meta"):
        for component in ("transformer", "vae"):
            assert sum(1 for _ in build_component(blueprint(name), component, size).parameters()) > 0


@pytest.mark.slow
def test_an_image_model_needs_an_image_and_a_text_model_takes_none(tmp_path) -> None:
    image().save(tmp_path / "start.png")
    prompt = Prompt("a red circle", tmp_path / "start.png", seed=3)
    made = renderer("cogvideox-5b-i2v", num_frames=9, height=128, width=192, num_inference_steps=2)
    frames = made.render(prompt, 0).frames
    assert frames.shape == (9, 128, 192, 3)
    assert np.array_equal(made.render(prompt, 1).frames, frames)  # the prompt's own seed counts
    with pytest.raises(GenerationError, match="needs an image with each prompt"):
        made.render("a red circle", 0)
    with pytest.raises(GenerationError, match="use an image-to-video model"):
        renderer("cogvideox-2b").render(prompt, 0)


@pytest.mark.slow
def test_the_command_line_builds_evaluates_and_lists(working_folder) -> None:
    run = CliRunner().invoke(
        main, ["generate", "a red circle", "--model", "flux-dev", "--random-weights", "--tiny", "-o", "out.mp4"]
    )
    assert run.exit_code == 0, run.output
    assert (working_folder / "out.mp4").stat().st_size > 0
    options = ["--model", "flux-dev", "--tiny", "--num-prompts", "1", "--num-inference-steps", "2", "--no-track"]
    judged = CliRunner().invoke(main, ["eval", *options, "--output-dir", "judged"])
    assert judged.exit_code == 0, judged.output
    result = json.loads((working_folder / "judged" / "flux_accuracy_default.json").read_text())
    assert result["statistics"]["frame_diff"]["mean"] == 0.0  # nothing moves in one frame
