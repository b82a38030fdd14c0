import json

import click
import pytest
from click.testing import CliRunner

from sparsetune.cli.main import Command
from sparsetune.cli.options import (
    OPTIONS_TABLE,
    build_config,
    config_options,
    model_options,
    options_table,
    setting,
    settings,
)
from sparsetune.config import Config, EvalConfig
from sparsetune.config.resolver import config_fields
from sparsetune.errors import ConfigError
from tools.options_table import options_json


@click.command(cls=Command)
@config_options
@settings("eval.num_prompts", "eval.save_videos", "eval.metrics", "eval.prompt_file", "gate.min_psnr_worst")
@setting("tracking.enabled", "--track/--no-track")
@model_options
@click.pass_context
def probe(ctx: click.Context) -> Config:
    return build_config(ctx)


def test_the_options_table_is_fresh() -> None:
    written = OPTIONS_TABLE.read_text(encoding="utf-8")
    assert written == options_json(), "run `python -m tools.options_table`"


def test_every_setting_s_option_parses_as_its_field() -> None:
    table = json.loads(options_json())
    assert table.keys() == config_fields().keys()
    assert table["eval.num_prompts"]["type"] == "int"
    text = config_fields()["gate.min_psnr_worst"].description.rstrip(".")
    assert table["gate.min_psnr_worst"] == {"type": "float", "help": text, "default": "28.0"}
    assert table["backend"]["type"] == ["auto", "reference", "sparge", "flex", "dense"]
    assert table["model.vae_tiling"]["type"] == "bool"


def parse(*args: str, env: dict[str, str] | None = None) -> Config:
    result = CliRunner(env=env).invoke(probe, list(args), standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    config = result.return_value
    assert isinstance(config, Config)
    return config


def help_text() -> str:
    return " ".join(CliRunner().invoke(probe, ["--help"]).output.split())


def test_option_beats_set_beats_environment() -> None:
    env = {"SPARSETUNE_EVAL__NUM_PROMPTS": "2"}
    assert parse(env=env).eval.num_prompts == 2
    assert parse("--set", "eval.num_prompts=3", env=env).eval.num_prompts == 3
    assert parse("--set", "eval.num_prompts=3", "--num-prompts", "4", env=env).eval.num_prompts == 4


def test_option_that_was_not_given_leaves_the_environment_alone() -> None:
    assert parse(env={"SPARSETUNE_EVAL__SAVE_VIDEOS": "false"}).eval.save_videos is False


@pytest.mark.parametrize(("flag", "expected"), [("--save-videos", True), ("--no-save-videos", False)])
def test_either_side_of_a_flag_counts_as_given(flag: str, expected: bool) -> None:
    env = {"SPARSETUNE_EVAL__SAVE_VIDEOS": str(not expected)}
    assert parse(flag, env=env).eval.save_videos is expected


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--num_prompts", "2"), 2),
        (("--num_prompts=2",), 2),
        (("--num-prompts", "2"), 2),
    ],
)
def test_underscores_are_taken_for_dashes(args: tuple[str, ...], expected: int) -> None:
    assert parse(*args).eval.num_prompts == expected


def test_underscores_of_a_flag_s_other_side() -> None:
    assert parse("--no_save_videos").eval.save_videos is False


def test_underscore_spellings_are_not_in_the_help() -> None:
    assert "--num_prompts" not in help_text()


def test_unknown_option_with_underscores_keeps_its_spelling_in_the_error() -> None:
    with pytest.raises(click.NoSuchOption, match="--no_such_thing"):
        parse("--no_such_thing")


def test_comma_list_and_path() -> None:
    config = parse("--metrics", "psnr,ssim", "--prompt-file", "my.txt")
    assert config.eval.metrics == ("psnr", "ssim")
    assert str(config.eval.prompt_file) == "my.txt"


def test_value_out_of_range_names_the_option_if_given_by_one_and_else_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"^--min-psnr-worst must be .*, got -1\.0$"):
        parse("--min-psnr-worst", "-1")
    with pytest.raises(ConfigError, match=r"^gate\.min_psnr_worst must be .*, got '-1' \(given with --set\)$"):
        parse("--set", "gate.min_psnr_worst=-1", "--num-prompts", "1")


def test_wrong_type_is_click_s_error() -> None:
    with pytest.raises(click.BadParameter, match="'x' is not a valid float"):
        parse("--min-psnr-worst", "x")


def test_model_takes_a_packaged_configuration_and_config_a_file() -> None:
    assert parse("--model", "cogvideox-2b").generation.num_frames == 49
    assert parse("--config", "cogvideox-2b").model.source == "zai-org/CogVideoX-2b"


def test_help_states_default_and_the_demo_s_own() -> None:
    text = help_text()
    demo = parse().eval.num_prompts
    assert f"[default: {EvalConfig().num_prompts}; {demo} for demo]" in text
    assert options_table()["tune.n_trials"]["default"] == "30; 9 for demo, 40 for most packaged models"
    assert options_table()["generation.height"]["default"] == "480; 64 for demo, its own for a packaged model"
    assert "[default: configs/prompts/eval.txt; configs/prompts/demo-eval.txt for demo]" in text
    assert "Record runs in MLflow. [default: yes]" in text
