"""The commands that a report prints, parsed by the command line."""

import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from sparsetune.cli.main import COMMANDS, main
from sparsetune.cli.options import build_config
from sparsetune.config import Config, resolve
from sparsetune.report.command import eval_command, tune_command
from sparsetune.tuning.record import TuningRecord
from sparsetune.tuning.reproduce import recorded
from tests.report.synthetic import record_of, result_of


def understood(command: str) -> tuple[click.Context, Config]:
    """The configuration that the command line parses from a printed command."""
    program, verb, *arguments = shlex.split(command)
    assert program == "sparsetune" and verb in COMMANDS
    subcommand = main.get_command(click.Context(main), verb)
    assert subcommand is not None
    context = subcommand.make_context(verb, arguments, parent=click.Context(main, obj=None))
    return context, build_config(context)


def record_with(**settings: Any) -> tuple[TuningRecord, Config]:
    config = resolve("demo", (), {}, settings)
    return record_of().model_copy(update={"config": recorded(config)}), config


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tune.n_trials": 3, "tune.orders": "hilbert,raster", "gate.min_psnr_worst": "null", "tune.max_minutes": 2.5},
        {"generation.negative_prompt": 'it\'s "dark"; rm -rf $HOME', "tune.schedule": False, "backend": "reference"},
        {"model.source": "cogvideox-2b", "model.random_weights": "tiny", "generation.guidance_scale": 5.5},
        {"model.source": "/models/my own model", "eval.metrics": "ssim,vmaf"},
        {"gate.preset": "trajectory", "gate.min_metrics": "ssim=.9,vmaf=70"},
    ],
)
def test_a_search_is_repeated_with_its_settings(settings: dict[str, Any]) -> None:
    record, config = record_with(**settings)
    _, again = understood(tune_command(record))
    assert recorded(again) == recorded(config)


def test_a_prompt_file_of_ones_own_is_named(tmp_path: Path) -> None:
    record, config = record_with(**{"tune.prompt_file": str(tmp_path / "my prompts.txt")})
    _, again = understood(tune_command(record))
    assert again.tune.prompt_file == config.tune.prompt_file == tmp_path / "my prompts.txt"


def test_defaults_are_not_repeated() -> None:
    record, _ = record_with(**{"tune.n_trials": 3})
    assert tune_command(record) == "sparsetune tune --model demo --set tune.n_trials=3"


def test_an_evaluation_is_repeated_with_its_settings() -> None:
    result = result_of(5, tuned_path="results/my demo/checkpoint", seed=7, guidance_scale=1.0, prompt_file=None)
    context, config = understood(eval_command(result))
    assert context.params["checkpoint"] == "results/my demo/checkpoint"
    made = result.config
    assert (config.eval.num_prompts, config.eval.seed) == (made.num_prompts, 7)
    for name in ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "fps"):
        assert getattr(config.generation, name) == getattr(made, name), name
    assert (config.backend, config.gate.min_psnr, config.eval.ladder) == ("reference", 35.0, True)
    assert set(config.eval.metrics) == set(made.metrics)


def test_an_evaluation_is_repeated_with_the_guidance_of_its_second_transformer() -> None:
    _, config = understood(eval_command(result_of(2, guidance_scale_2=2.5)))
    assert config.generation.guidance_scale_2 == 2.5


def test_an_evaluation_of_a_model_with_few_steps_is_repeated_with_its_lora_and_shift() -> None:
    result = result_of(2, yardsticks=("seed", "steps=50"))
    changes = {"lora": "owner/few-steps", "lora_scale": 0.8, "flow_shift": 3.0}
    model = result.config.model.model_copy(update=changes)
    _, config = understood(
        eval_command(result.model_copy(update={"config": result.config.model_copy(update={"model": model})}))
    )
    assert {name: getattr(config.model, name) for name in changes} == changes
    assert config.eval.yardsticks == ("seed", "steps=50")


def test_an_evaluation_of_random_weights_says_so() -> None:
    result = result_of(2)
    random = result.config.model.model_copy(update={"source": "zai-org/CogVideoX-2b", "random_weights": "tiny"})
    command = eval_command(result.model_copy(update={"config": result.config.model_copy(update={"model": random})}))
    _, config = understood(command)
    assert (config.model.source, config.model.random_weights) == ("zai-org/CogVideoX-2b", "tiny")
    assert command.count("random_weights") == 1


def test_a_model_that_is_no_longer_packaged_still_has_its_command() -> None:
    record = record_of().model_copy(update={"config": {"model": {"source": "lab/x"}, "tune": {"n_trials": 3}}})
    assert tune_command(record) == "sparsetune tune --model lab/x --set tune.n_trials=3"
