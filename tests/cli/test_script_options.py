"""What SpargeAttn-style scripts have: every command, option, file and key has its counterpart."""

import re

import click
import pytest

from sparsetune.cli.main import main
from sparsetune.evaluation.report_markdown import report_markdown
from sparsetune.evaluation.result import ConfigSection, EvaluationResult, MetricStatistics, PromptRow
from tests.docs.blocks import ROOT
from tests.tracking.conftest import make_result

PAGES = [ROOT / "docs" / f"from-spargeattn-scripts{language}.md" for language in ("", ".zh-CN")]

COMMANDS = [
    ("eval", "--num_prompts 3 --save_videos"),
    ("eval", "--use_tuned --tuned_path models_dict/CogVideoX-2b_0.06_0.07.pt --num_prompts 5 --save_videos"),
    ("eval", "--prompt_file prompts.txt --num_prompts 10 --save_videos --output_dir results/full_test"),
    ("eval", "--num_prompts 3 --num_inference_steps 30"),
    ("eval", "--num_frames 25"),
    (
        "eval",
        "--use_spas_sage_attn --model_out_path tuned.pt --out_path results --model_name THUDM/CogVideoX-2b --compile",
    ),
    ("tune", "--use_spas_sage_attn --tune --parallel_tune --l1 0.06 --pv_l1 0.065 --verbose --out_path results"),
    ("generate", "prompt --model_out_path tuned.pt --compile --verbose"),
    ("compare", "before/cogvideo_accuracy_default.json after/cogvideo_accuracy_tuned.json"),
]


def parse(command: str, text: str) -> click.Context:
    with click.Context(main) as parent:
        found = main.get_command(parent, command)
        assert found is not None
        return found.make_context(command, text.split(), parent=parent)


@pytest.mark.parametrize(("command", "text"), COMMANDS)
def test_every_command_line_of_the_scripts_is_accepted(command: str, text: str) -> None:
    parse(command, text)


def test_a_script_s_option_has_the_value_of_ours() -> None:
    assert parse("eval", "--model_out_path=a.pt").params["checkpoint"] == "a.pt"
    assert parse("generate", "prompt --model_out_path a.pt").params["checkpoint"] == "a.pt"


@pytest.mark.parametrize(
    ("command", "text", "answer"),
    [
        ("tune", "--model_out_path my.pt", "tune has no option --model_out_path; use --output-dir FOLDER"),
        ("tune", "--use_tuned", "tune has no option --use_tuned; it is an option of `sparsetune eval`"),
        ("generate", "x --use_spas_sage_attn", "attention is sparse with --use-tuned or --checkpoint PATH"),
        ("generate", "x --out_path videos", "generate has no option --out_path; use --output FILE.mp4"),
        ("eval", "--parallel_tune", "it is an option of `sparsetune tune`"),
    ],
)
def test_what_a_command_does_otherwise_is_answered_with_its_own_option(command: str, text: str, answer: str) -> None:
    with pytest.raises(click.UsageError, match=re.escape(answer)):
        parse(command, text)


def test_a_value_that_looks_like_a_script_s_option_is_kept() -> None:
    assert parse("generate", "-- --tune").params["prompt"] == "--tune"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_both_pages_list_every_option_file_and_key(page) -> None:
    text = page.read_text("utf-8")
    options = {word for _, line in COMMANDS for word in line.split() if word.startswith("--")}
    keys = {"overall_score", "detailed_results", *(f"config.{name}" for name in ("model_name", "use_tuned", "seed"))}
    files = {"cogvideo_accuracy_default.json", "cogvideo_accuracy_tuned.json", "videos/prompt_0_dense.mp4"}
    missing = [word for word in sorted(options | keys | files) if not re.search(rf"`{re.escape(word)}\b", text)]
    assert missing == []


def test_both_pages_say_the_same() -> None:
    names = [re.findall(r"`([^`]+)`", page.read_text("utf-8")) for page in PAGES]
    assert sorted(names[0]) == sorted(names[1])


def test_the_scripts_keys_are_in_the_result() -> None:
    assert {"config", "statistics", "detailed_results", "overall_score"} <= EvaluationResult.model_fields.keys()
    assert {"model_name", "use_tuned", "num_prompts", "seed"} <= ConfigSection.model_fields.keys()
    assert {"mean", "std", "min", "max"} <= MetricStatistics.model_fields.keys()
    assert {"prompt", "frame_cosine", "psnr", "frame_l1", "frame_diff"} <= PromptRow.model_fields.keys()


def test_the_scripts_report_template_is_in_the_report(tmp_path) -> None:
    text = report_markdown(make_result(), tmp_path)
    for part in ("## Configuration", "## Objective metrics", "## Sparsity", "## Human review", "## Conclusion"):
        assert part in text
    assert "Theoretical speed-up" in text and "| Tuned |" in text
