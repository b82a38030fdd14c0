"""The result's JSON."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sparsetune.errors import ResultError
from sparsetune.evaluation.report_markdown import pooled_text
from sparsetune.evaluation.result import SCHEMA_PATH, load_result, result_schema, save_result
from tests.evaluation.conftest import Evaluate

NAME = "cogvideo_accuracy_tuned.json"


def test_the_shipped_schema_is_up_to_date() -> None:
    assert json.loads(SCHEMA_PATH.read_text()) == result_schema(), "run sparsetune.evaluation.result.write_schema()"


def test_the_shipped_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(result_schema())


def broken(value: dict[str, Any], *path: Any) -> dict[str, Any]:
    inner: Any = value
    for part in path[:-2]:
        inner = inner[part]
    inner[path[-2]] = path[-1]
    return value


@pytest.mark.parametrize(
    "path",
    [
        ("detailed_results", 0, "psnr", "high"),
        ("detailed_results", 0, "another", "text"),
        ("detailed_results", 0, "sparsity", 1.5),
        ("statistics", "psnr", {"mean": 1.0}),
        ("verdict", "splendid"),
        ("extra", 1),
        ("schema_version", 2),
    ],
)
def test_the_schema_refuses_what_the_model_refuses(evaluate: Evaluate, path: tuple[Any, ...], tmp_path: Path) -> None:
    value = broken(evaluate().to_dict(), *path)
    with pytest.raises(jsonschema.ValidationError, match=r"."):
        jsonschema.validate(value, result_schema())
    (tmp_path / NAME).write_text(json.dumps(value))
    with pytest.raises(
        ResultError,
        match=r"is not a valid evaluation result|must be the JSON of sparsetune\'s evaluation with schema_version 1",
    ):
        load_result(tmp_path / NAME)


def test_a_result_is_read_from_file_or_folder(evaluate: Evaluate, tmp_path: Path) -> None:
    result = evaluate()
    save_result(result, tmp_path / NAME)
    assert load_result(tmp_path / NAME) == load_result(str(tmp_path)) == result


def test_a_result_of_before_compilation_could_be_chosen_is_of_an_uncompiled_model(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    save_result(evaluate(), tmp_path / NAME)
    content = json.loads((tmp_path / NAME).read_text())
    del content["config"]["compile"]
    (tmp_path / NAME).write_text(json.dumps(content))
    assert load_result(tmp_path / NAME).config.compile is False


def test_a_result_of_before_pooled_psnr_and_seconds_by_prompt_is_read(evaluate: Evaluate, tmp_path: Path) -> None:
    value = evaluate().to_dict()
    del value["gate"]["num_identical"]
    value["gate"]["conditions"] = [one for one in value["gate"]["conditions"] if one["name"] != "pooled psnr"]
    for row in value["detailed_results"]:
        del row["denoising_dense"], row["denoising_sparse"]
    (tmp_path / "old.json").write_text(json.dumps(value))
    old = load_result(tmp_path / "old.json")
    assert old.gate.num_identical == 0 and old.detailed_results[0].denoising_dense is None
    assert pooled_text(old) is None


def test_a_missing_result_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"there is no result .*none"):
        load_result(tmp_path / "none")
    with pytest.raises(ResultError, match=r"must hold one \*_accuracy_\*.json file, found none"):
        load_result(tmp_path)


def test_a_folder_with_two_results_names_them(evaluate: Evaluate, tmp_path: Path) -> None:
    result = evaluate()
    for name in ("cogvideo_accuracy_default.json", NAME):
        save_result(result, tmp_path / name)
    with pytest.raises(ResultError, match=r"found cogvideo_accuracy_default.json, cogvideo_accuracy_tuned.json; pass"):
        load_result(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("width", 0, "config.width: Input should be greater than 0"),
        ("fps", -1, "config.fps: Input should be greater than 0"),
        ("tuned_path", "\ud800", r"cannot read .*surrogates not allowed"),
    ],
)
def test_values_that_no_report_can_show_are_refused(
    evaluate: Evaluate, tmp_path: Path, name: str, value: object, message: str
) -> None:
    save_result(evaluate(), tmp_path / NAME)
    content = json.loads((tmp_path / NAME).read_text())
    content["config"][name] = value
    (tmp_path / NAME).write_text(json.dumps(content))
    with pytest.raises(ResultError, match=message):
        load_result(tmp_path / NAME)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read .*: Expecting"),
        ("[]", "must be the JSON of sparsetune's evaluation with schema_version 1, got None"),
        ('{"schema_version": 2}', "got 2; update sparsetune"),
        ('{"schema_version": 1}', "is not a valid evaluation result: config: Field required"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / NAME).write_text(content)
    with pytest.raises(ResultError, match=message):
        load_result(tmp_path / NAME)
