"""Documents from anybody's files."""

import os
import resource
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from sparsetune.checkpoint import load_checkpoint
from sparsetune.cli.main import main
from sparsetune.documents import DocumentError, read_json, read_text, read_yaml
from sparsetune.errors import CheckpointError, PromptError, ResultError
from sparsetune.evaluation.result import load_result
from sparsetune.models.prompts import load_prompts

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
DEEP = {"json": "[" * 100_000 + "]" * 100_000, "yaml": "[" * 1000 + "]" * 1000}


def test_plain_documents_are_read() -> None:
    assert read_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    assert read_yaml("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("text", [DEEP["json"], "[" * 70 + "]" * 70, "{", '{"a": 1e}', "[" + "1" * 5000 + "]"])
def test_json_that_is_deep_or_damaged_is_one_error(text: str) -> None:
    with pytest.raises(DocumentError, match=r"^not valid JSON") as raised:
        read_json(text)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    "text",
    [
        DEEP["yaml"],
        "- " * 1000 + "x",
        BOMB,
        "a: 2026-13-45",
        "!!bool x",
        "!!int ''",
        "!!timestamp x",
        "a: &a [*a",
        "\0",
    ],
)
def test_yaml_that_is_deep_a_bomb_or_damaged_is_one_error_in_no_time(text: str) -> None:
    started = time.process_time()
    with pytest.raises(DocumentError, match=r"^not valid YAML") as raised:
        read_yaml(text)
    assert len(str(raised.value)) < 300
    assert time.process_time() - started < 5.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4e6


def test_an_endless_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            read_text(path)


def test_every_reader_bounds_its_input(tmp_path: Path) -> None:
    from tests.checkpoint.test_storage import make_checkpoint, save_checkpoint

    saved = save_checkpoint(make_checkpoint(), tmp_path / "tuned")
    (saved / "manifest.json").write_text(DEEP["json"])
    with pytest.raises(CheckpointError, match="nested too deeply"):
        load_checkpoint(saved)
    (tmp_path / "result.json").write_text(DEEP["json"])
    with pytest.raises(ResultError, match="nested too deeply"):
        load_result(tmp_path / "result.json")
    for suffix in ("yaml", "jsonl"):
        (tmp_path / f"prompts.{suffix}").write_text(DEEP["yaml" if suffix == "yaml" else "json"])
        with pytest.raises(PromptError, match="nested"):
            load_prompts(tmp_path / f"prompts.{suffix}")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(PromptError, match="not a regular file"):
        load_prompts(tmp_path / "pipe.txt")


@pytest.mark.parametrize("text", [DEEP["yaml"], f"model:\n  name: &n\n{BOMB}", BOMB])
def test_a_hostile_configuration_is_an_error_of_one_line(working_folder: Path, text: str) -> None:
    Path("bad.yaml").write_text(text)
    result = CliRunner().invoke(main, ["cache", "ls", "--config", "bad.yaml"])
    assert result.exit_code == 2
    assert "bad.yaml is not valid YAML" in result.output and result.output.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["cache", "ls", "--set", f"{'k' * 100_000}=1"],
        ["cache", "ls", "--set", "x" * 100_000],
        ["cache", "ls", f"--{'x' * 100_000}"],
        ["x" * 100_000],
        ["tune", "--n-trials", "9" * 100_000],
        ["cache", "ls", "--set", f"model.name={'é x' * 50_000}"],
    ],
)
def test_a_long_value_is_cut_in_messages(working_folder: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert max(map(len, result.output.splitlines())) < 1200
