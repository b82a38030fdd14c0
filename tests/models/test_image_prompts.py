"""Image-to-video models with an image for each prompt: rendering, search and evaluation."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from sparsetune.cli.main import main
from sparsetune.config import Config, resolve
from sparsetune.errors import GenerationError
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import load_pipeline
from sparsetune.models.prompts import Prompt
from sparsetune.tuning import tune
from tests.models.cases import image

pytestmark = pytest.mark.slow
SMALL = {"num_frames": 9, "height": 128, "width": 192, "num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    image().save(tmp_path / "start.png")
    return tmp_path / "start.png"


def config(name: str, **settings: object) -> Config:
    flags = {f"generation.{key}": value for key, value in SMALL.items()}
    flags |= {"model.source": name, "model.random_weights": "tiny", "model.device": "cpu"}
    return resolve(None, (), {}, flags | settings)


def test_a_search_renders_every_prompt_from_its_image(start: Path, tmp_path: Path) -> None:
    image().rotate(90).save(tmp_path / "turned.png")
    (tmp_path / "tune.yaml").write_text("- {prompt: a red circle, image: start.png, seed: 3}\n")
    (tmp_path / "eval.jsonl").write_text('{"prompt": "a red circle", "image": "turned.png"}\n')
    settings = {
        "tune.prompt_file": tmp_path / "tune.yaml",
        "tune.tuner": "calibrate",
        "tune.l1": 0.5,
        "tune.pv_l1": 0.6,
        "tune.num_prompts": 1,
        "tune.calibration_steps": 1,
        "tune.orders": ("raster",),
        "tune.caches": ("none",),
        "tune.margin_db": 0.0,
        "eval.prompt_file": tmp_path / "eval.jsonl",
        "eval.num_prompts": 1,
        "eval.save_videos": False,
        "eval.metrics": ("frame_cosine", "psnr"),
        "gate.min_psnr": 0.0,
        "gate.min_frame_cosine": -1.0,
        "cache.dir": tmp_path / "cache",
        "tracking.root": tmp_path / "mlruns",
    }
    result = tune(config("wan2.1-i2v-14b", **settings), output_dir=tmp_path / "results")
    assert result.best is not None and result.evaluation is not None
    assert [trial.state for trial in result.trials] == ["complete"]
    # The same text with another image is another prompt.
    assert result.evaluation.config.prompts_in_tune_set == ()
    assert (tmp_path / "results" / "checkpoint" / "policy.safetensors").is_file()


def test_a_video_starts_from_the_image_and_not_without_one(start: Path, working_folder: Path) -> None:
    options = ["--model", "wan2.1-i2v-14b", "--tiny", "--num-frames", "9", "--height", "128", "--width", "192"]
    options += ["--num-inference-steps", "2", "--guidance-scale", "1"]
    run = CliRunner().invoke(main, ["generate", "a red circle", *options, "--image", str(start), "-o", "out.mp4"])
    assert run.exit_code == 0, run.output
    assert (working_folder / "out.mp4").stat().st_size > 0
    without = CliRunner().invoke(main, ["generate", "a red circle", *options])
    assert without.exit_code == 1
    assert "needs an image with each prompt" in without.stderr
    assert "use --image" in without.stderr


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers on its scheduler's tensors
@pytest.mark.parametrize("name", ["cosmos-2-v2w-2b", "cosmos-1-v2w-7b"])
def test_a_world_that_grows_from_an_image_needs_one(name: str, start: Path) -> None:
    wanted = config(name, **{"generation.num_frames": 17})
    renderer = Renderer(load_pipeline(wanted.model), wanted.generation)
    with pytest.raises(GenerationError, match="needs an image with each prompt"):
        renderer.render("a red circle", 0)
    assert renderer.render(Prompt("a red circle", start), 0).frames.shape == (17, 128, 192, 3)
