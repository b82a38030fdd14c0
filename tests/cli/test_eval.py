from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from sparsetune.api import TunedCheckpoint
from sparsetune.checkpoint import save_checkpoint
from sparsetune.cli import eval as eval_command
from sparsetune.cli.main import main
from sparsetune.config import Config
from tests.tuning.tables import smooth
from tests.tuning.test_dial import checkpoint


class Stop(Exception):
    """Ends the command where it would call the library."""


class Asked:
    """The arguments of the library call."""

    def __init__(self) -> None:
        self.config = Config()
        self.checkpoint: TunedCheckpoint | str | None = None
        self.output_dir = Path()
        self.difference = False
        self.reuse: tuple[Path, ...] = ()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    seen = Asked()

    def evaluate_config(
        config: Config,
        checkpoint: str | None,
        output_dir: Path,
        listeners: Any,
        *,
        difference: bool,
        reuse: tuple[Path, ...],
    ) -> None:
        seen.reuse = reuse
        seen.config, seen.checkpoint, seen.output_dir, seen.difference = config, checkpoint, output_dir, difference
        raise Stop

    monkeypatch.setattr("sparsetune.evaluation.evaluate.evaluate_config", evaluate_config)
    monkeypatch.setattr("sparsetune.cli.options.check_inputs", lambda *_, **__: None)  # the named files don't exist
    return seen


def evaluate(*args: str) -> None:
    result = CliRunner().invoke(main, ["eval", "--no-track", *args])
    assert "unexpected Stop" in result.stderr, result.output
    assert result.stdout == ""


# (option, value, attribute) of every option that SpargeAttn-style accuracy scripts have
KNOWN = [
    ("--tuned-path", "some/checkpoint", "checkpoint"),
    ("--checkpoint", "some/checkpoint", "checkpoint"),
    ("--num-prompts", "3", "config.eval.num_prompts"),
    ("--prompt-file", "words.txt", "config.eval.prompt_file"),
    ("--output-dir", "out", "output_dir"),
    ("--num-inference-steps", "20", "config.generation.num_inference_steps"),
    ("--num-frames", "9", "config.generation.num_frames"),
    ("--height", "32", "config.generation.height"),
    ("--width", "48", "config.generation.width"),
    ("--guidance-scale", "3.5", "config.generation.guidance_scale"),
    ("--seed", "7", "config.eval.seed"),
    ("--model", "owner/other", "config.model.source"),
    ("--backend", "reference", "config.backend"),
    ("--offload", "sequential", "config.model.offload"),
    ("--dtype", "float16", "config.model.dtype"),
]


@pytest.mark.parametrize("underscores", [False, True])
@pytest.mark.parametrize(("option", "value", "attribute"), KNOWN)
def test_known_option_arrives_in_either_spelling(
    asked: Asked, option: str, value: str, attribute: str, underscores: bool
) -> None:
    evaluate("--" + option[2:].replace("-", "_") if underscores else option, value)
    found: Any = asked
    for name in attribute.split("."):
        found = getattr(found, name)
    assert str(found) == value


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("--save-videos", True), ("--save_videos", True), ("--no-save-videos", False), ("--no_save_videos", False)],
)
def test_saving_of_videos_is_switched(asked: Asked, flag: str, expected: bool) -> None:
    evaluate("--set", f"eval.save_videos={not expected}", flag)
    assert asked.config.eval.save_videos is expected


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("--vae-tiling", True), ("--vae_tiling", True), ("--no-vae-tiling", False), ("--no_vae_tiling", False)],
)
def test_vae_tiling_is_switched(asked: Asked, flag: str, expected: bool) -> None:
    evaluate("--model", "cogvideox-2b", flag)
    assert asked.config.model.vae_tiling is expected


@pytest.mark.parametrize(("flags", "expected"), [((), False), (("--compile",), True), (("--no-compile",), False)])
def test_compilation_is_switched_on(asked: Asked, flags: tuple[str, ...], expected: bool) -> None:
    evaluate(*flags)
    assert asked.config.model.compile is expected


def test_underscore_spellings_are_hidden() -> None:
    assert "num_prompts" not in CliRunner().invoke(main, ["eval", "--help"]).output


def test_without_a_checkpoint_it_judges_the_defaults(asked: Asked) -> None:
    evaluate()
    assert asked.checkpoint is None
    assert asked.output_dir == Path("results/demo/eval")


def test_what_tune_evaluated_is_reused_unless_told_otherwise(asked: Asked) -> None:
    evaluate("--use-tuned")
    assert asked.reuse == (Path("results/demo/evaluation"),)
    evaluate("--output-dir", "out")
    assert asked.reuse == (Path("results/demo/before"),)
    for again in ("--no-reuse", "--difference"):
        evaluate("--use-tuned", again)
        assert asked.reuse == ()


@pytest.mark.parametrize("flag", ["--use-tuned", "--use_tuned"])
def test_use_tuned_takes_what_tune_left(asked: Asked, flag: str) -> None:
    evaluate(flag)
    assert asked.checkpoint == "results/demo/checkpoint"


def test_tuned_path_goes_before_the_default_place(asked: Asked) -> None:
    evaluate("--use-tuned", "--tuned-path", "other")
    assert asked.checkpoint == "other"


@pytest.mark.parametrize("option", ["--checkpoint", "--tuned-path", "--tuned_path"])
def test_a_checkpoint_needs_no_use_tuned(asked: Asked, option: str) -> None:
    evaluate(option, "some.pt")
    assert asked.checkpoint == "some.pt"


def test_use_tuned_of_another_model_takes_its_own_checkpoint(asked: Asked) -> None:
    evaluate("--use-tuned", "--model", "cogvideox-2b")
    assert asked.checkpoint == "results/cogvideox-2b/checkpoint"


def test_metric_modules_add_up(asked: Asked) -> None:
    evaluate("--metric-module", "one.py", "--metric_module", "two")
    assert asked.config.eval.metric_modules == ("one.py", "two")


def test_difference_is_passed_on(asked: Asked) -> None:
    evaluate("--difference")
    assert asked.difference is True


def test_too_many_prompts_is_a_usage_error_that_says_how_many_there_are(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    result = CliRunner().invoke(
        main, ["eval", "--no-track", "--prompt-file", str(prompts), "--num-prompts", "3", "--output-dir", str(tmp_path)]
    )
    assert result.exit_code == 2
    assert "from 1 to the 2 that" in result.stderr


def test_choices_are_the_configuration_s() -> None:
    options = {param.name: param for param in eval_command.command.params}
    backend = options["backend"].type
    assert isinstance(backend, click.Choice)
    assert tuple(backend.choices) == ("auto", "reference", "sparge", "flex", "dense")


def test_sparsity_is_read_off_the_checkpoint_s_calibration(asked: Asked, tmp_path: Path) -> None:
    tuned = checkpoint(smooth())
    save_checkpoint(tuned, tmp_path / "tuned")
    evaluate("--checkpoint", str(tmp_path / "tuned"), "--sparsity", "0.3", "--gate", "trajectory", "--yardsticks")
    assert isinstance(asked.checkpoint, TunedCheckpoint)
    assert asked.checkpoint.policy == tuned.with_sparsity(0.3).policy
    assert asked.config.gate.preset == "trajectory"
    assert asked.config.eval.yardsticks == ("kernel", "dtype", "fp8", "seed")
    evaluate("--yardsticks", "seed,steps=50")
    assert asked.config.eval.yardsticks == ("seed", "steps=50")


def test_sparsity_needs_a_checkpoint() -> None:
    result = CliRunner().invoke(main, ["eval", "--no-track", "--sparsity", "0.3"])
    assert result.exit_code == 2
    assert "--sparsity needs --checkpoint or --use-tuned" in result.stderr
