import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sparsetune.attention.policy import Policy
from sparsetune.cli.main import main
from sparsetune.config import Config
from sparsetune.report.words import words
from sparsetune.tracking import TrackingListener
from sparsetune.tuning.events import TrialResult, TuningListener, TuningResult
from tests.tracking.conftest import make_result

TRIAL = TrialResult(
    number=3, params={"l1_all": 0.1}, state="complete", reason=None, policy=Policy.uniform([("transformer.a", 2)]),
    prompts=(), sparsity=0.3, psnr=34.5, psnr_worst=33.0, frame_cosine=0.99, feasible=False, seconds=1.0,
)  # fmt: skip
WON = TuningResult(
    study_name="demo-1", trials=(TRIAL,), best=TRIAL, closest=None, checkpoint_path=Path("out/checkpoint"),
    evaluation=None, calibration_path=Path("c.npz"), seconds=1.0,
)  # fmt: skip
LOST = dataclasses.replace(WON, best=None, closest=TRIAL, checkpoint_path=None)

Tune = Callable[..., Result]


class Asked:
    """The arguments of the library call."""

    config: Config
    output_dir: Path
    listeners: Sequence[TuningListener]


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, asked: Asked) -> Tune:
    """Run the command with a stand-in for the library that records the call and returns `result`."""

    def run(*args: str, result: TuningResult = WON) -> Result:
        def tune(config: Config, *, output_dir: Path, listeners: Sequence[TuningListener]) -> TuningResult:
            asked.config, asked.output_dir, asked.listeners = config, output_dir, listeners
            return result

        monkeypatch.setattr("sparsetune.tuning.tune", tune)
        return CliRunner().invoke(main, ["tune", *args])

    return run


@pytest.mark.parametrize(
    ("option", "value", "attribute"),
    [
        ("--n-trials", "5", "tune.n_trials"),
        ("--num-prompts", "3", "tune.num_prompts"),
        ("--num_prompts", "3", "tune.num_prompts"),
        ("--num-eval-prompts", "3", "eval.num_prompts"),
        ("--prompt-file", "words.txt", "tune.prompt_file"),
        ("--eval-prompt-file", "words.txt", "eval.prompt_file"),
        ("--max-minutes", "1.5", "tune.max_minutes"),
        ("--study-name", "mine", "tune.study_name"),
        ("--tuner", "builtin", "tune.tuner"),
        ("--min-psnr", "38.5", "gate.min_psnr"),
        ("--model", "owner/other", "model.source"),
    ],
)
def test_option_arrives_in_the_configuration(
    tune: Tune, asked: Asked, working_folder: Path, option: str, value: str, attribute: str
) -> None:
    (working_folder / "words.txt").write_text("a red circle\n" * 40)
    tune("--no-track", option, value)
    found: Any = asked.config
    for name in attribute.split("."):
        found = getattr(found, name)
    assert str(found) == value


def test_results_go_to_the_model_s_folder_unless_told_otherwise(tune: Tune, asked: Asked) -> None:
    tune("--no-track")
    assert asked.output_dir == Path("results/demo")
    tune("--no-track", "--output-dir", "elsewhere")
    assert asked.output_dir == Path("elsewhere")


def test_tracking_listens_unless_it_is_switched_off(tune: Tune, asked: Asked, working_folder: Path) -> None:
    tune()
    assert [type(listener) for listener in asked.listeners][1:] == [TrackingListener]
    tune("--no-track")
    assert len(asked.listeners) == 1


def test_winner_is_printed_on_stdout(tune: Tune) -> None:
    result = tune("--no-track")
    assert result.exit_code == 0
    assert "winner: trial 3, sparsity 0.300" in result.stdout
    assert "checkpoint: out/checkpoint" in result.stdout


def test_the_summary_has_at_most_15_lines_each_figure_and_warning_once(tune: Tune, working_folder: Path) -> None:
    evaluation = make_result()
    evaluation = evaluation.model_copy(update={"gate": evaluation.gate.model_copy(update={"passed": True})})
    trials = tuple(dataclasses.replace(TRIAL, number=number) for number in range(40))
    result = dataclasses.replace(WON, trials=trials, evaluation=evaluation)
    lines = tune(result=result).stdout.splitlines()
    assert lines[0] == "winner: trial 3 of 40, study demo-1, 0:01, checkpoint: out/checkpoint"
    assert lines[-1] == "next: sparsetune review latest --model demo"
    assert len(lines) <= 15
    text = "\n".join(lines)
    for part in ("attention saved", "quality: ", "score ", "gate to deploy: "):
        assert text.count(part) == 1, part
    assert "95%" not in text and "if 1 prompt in 10 fails" not in text
    details = tune("-v", result=result).stdout
    assert details.count("complete") == 40 and "95% interval" in details
    assert tune("--no-track", result=result).stdout.splitlines()[-1].startswith("next: sparsetune generate PROMPT")
    missed = evaluation.gate.model_copy(update={"passed": False})
    result = dataclasses.replace(result, evaluation=evaluation.model_copy(update={"gate": missed}))
    assert "with more --n-trials" in tune(result=result).stdout.splitlines()[-1]


def test_the_summary_is_chinese_where_asked(tune: Tune) -> None:
    result = dataclasses.replace(WON, evaluation=make_result())
    lines = tune("--no-track", "--lang", "zh", result=result).stdout.splitlines()
    chinese = words("zh")
    assert lines[0] == chinese("summary.winner", number=3)
    assert any(line.startswith("统计摘要") for line in lines) and any(line.startswith("质量评估") for line in lines)
    assert any("out/checkpoint" in line for line in lines)
    for line in lines:
        assert not re.search(r"[a-z]{2,} [a-z]{2,} [a-z]{2,}", line), line
    for lost, text in (
        (LOST, chinese("summary.no_winner", trials=1)),
        (dataclasses.replace(LOST, dense_because="attention is 31% of a step"), chinese("summary.no_faster")),
        (dataclasses.replace(WON, left_to="another process"), chinese("summary.left")),
    ):
        assert tune("--no-track", "--lang", "zh", result=lost).stdout == f"{text}\n"


def test_json_is_alone_on_stdout(tune: Tune) -> None:
    assert json.loads(tune("--no-track", "--json").stdout)["best_trial"] == 3


def test_search_without_a_winner_is_status_3_and_names_the_closest(tune: Tune) -> None:
    result = tune("--no-track", result=LOST)
    assert result.exit_code == 3
    assert "none of 1 trials meets the gate; the closest is trial 3, sparsity 0.300, psnr 34.50 dB" in result.stderr


def test_dense_is_recommended_with_the_reason_where_nothing_is_faster(tune: Tune) -> None:
    reason = "attention is 31% of a dense step of 15 ms"
    result = tune("--no-track", result=dataclasses.replace(LOST, dense_because=reason))
    assert result.exit_code == 3
    assert f"no policy is faster than dense at the gate: {reason}; keep the dense model, or tune for" in result.stderr
    assert "no policy is faster than dense" in result.stdout


def test_seconds_and_speed_up_lead_the_table_where_they_were_measured(tune: Tune) -> None:
    timed = dataclasses.replace(WON.trials[0], seconds_sparse=1.78, seconds_dense=2.67, seconds_noise=0.004)
    result = tune("--no-track", "--verbose", result=dataclasses.replace(WON, trials=(timed,), best=timed))
    assert "winner: trial 3, 1.50 times as fast as dense, sparsity 0.300" in result.stdout
    heads = next(line for line in result.stdout.splitlines() if "denoising (s)" in line)
    assert heads.index("denoising (s)") < heads.index("speed-up") < heads.index("sparsity")


def test_search_without_time_for_a_trial_says_so(tune: Tune) -> None:
    result = tune("--no-track", result=dataclasses.replace(LOST, trials=(), closest=None))
    assert result.exit_code == 3
    assert "there was no time for a trial; raise --max-minutes" in result.stderr


def test_interrupted_search_prints_the_best_so_far_and_is_status_130(tune: Tune) -> None:
    result = tune("--no-track", result=dataclasses.replace(WON, interrupted=True))
    assert result.exit_code == 130
    assert "sparsetune: interrupted; 1 trial saved; go on with: sparsetune tune --no-track" in result.stderr
    assert "checkpoint: out/checkpoint" in result.stdout


def test_builtin_tuner_says_what_it_needs(working_folder: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(main, ["tune", "--tuner", "builtin", "--no-track"])
    assert result.exit_code == 1
    assert "--tuner builtin needs SpargeAttn's package and a CUDA GPU" in result.stderr
    assert list(working_folder.iterdir()) == []
