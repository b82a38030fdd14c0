from types import SimpleNamespace

import click
import pytest

from sparsetune.cli.console import coloured_status
from sparsetune.cli.tables import caveat_lines, ladder_lines, metric_text, statistics_table, table_text, value_text
from sparsetune.evaluation.result import PromptRow
from sparsetune.metrics import summarize


def test_columns_are_as_wide_as_their_widest_cell_and_numbers_end_together() -> None:
    assert table_text((("metric", "mean"), [["psnr (dB)", "37.82"], ["ssim", "0.9"]])).splitlines() == [
        "metric      mean",
        "----------------",
        "psnr (dB)  37.82",
        "ssim         0.9",
    ]


def test_colours_and_wide_characters_leave_columns_where_they_are() -> None:
    rows = [["一只熊猫", coloured_status("met"), "1"], ["panda", coloured_status("not met"), "2"]]
    text = table_text((("prompt", "gate", "time"), rows))
    assert "\x1b[32mmet\x1b[0m" in text and "\x1b[31mnot met\x1b[0m" in text
    assert click.unstyle(text).splitlines() == [
        "prompt    gate     time",
        "-----------------------",
        "一只熊猫  met         1",
        "panda     not met     2",
    ]


def test_a_table_is_folded_to_the_terminal_s_width(monkeypatch: pytest.MonkeyPatch) -> None:
    head = ("trial", "cache", "worst psnr (dB)", "times as fast as dense")
    rows = [[str(trial), "taylorseer, max_skips 3, first 0.3", "33.17", "1.66"] for trial in range(3)]
    whole = table_text((head, rows))
    assert len(whole.splitlines()) == 5
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "44")
    lines = table_text((head, rows)).splitlines()
    assert max(map(len, lines)) <= 44
    assert sum("33.17" in line for line in lines) == 3  # numbers stay whole


def test_a_run_s_id_stays_whole_and_columns_that_don_t_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    table = (("run", "name", "psnr (dB)", "gate"), [["68517eba", "tune demo-39f45426", "36.48", "not met"]])
    monkeypatch.setenv("COLUMNS", "34")
    assert table_text(table).splitlines() == [
        "                        psnr",
        "run      name           (dB) gate",
        "-" * 34,
        "68517eba tune          36.48 not",
        "         demo-39f45426       met",
    ]
    monkeypatch.setenv("COLUMNS", "26")
    assert table_text(table).splitlines() == [
        "             psnr",
        "run          (dB)  gate",
        "-" * 26,
        "68517eba    36.48  not met",
        "in a wider terminal also: name",
    ]


def test_decimals_follow_the_unit() -> None:
    assert value_text(37.8249, "dB") == "37.82"
    assert value_text(0.98543219, "") == "0.985432"
    assert metric_text("psnr", 37.8249) == "psnr 37.82 dB"


def test_metric_that_is_not_registered_here_has_no_unit() -> None:
    assert metric_text("made_elsewhere", 0.25) == "made_elsewhere 0.250000"


def test_statistics_have_mean_std_min_max_and_interval() -> None:
    head, rows = statistics_table({"psnr": summarize([30.0, 40.0])})
    assert head[:5] == ("metric", "mean", "std", "min", "max")
    assert rows[0][:5] == ["psnr (dB)", "35.00", "7.07", "30.00", "40.00"]


def test_all_figures_of_a_row_have_as_many_decimals() -> None:
    _, rows = statistics_table({"vmaf": summarize([97.12, 98.33])})
    assert rows[0][1:5] == ["97.72", "0.86", "97.12", "98.33"]


def test_the_ladder_says_whose_error_it_is() -> None:
    ladder = {"dense_again": {"psnr": 100.0}, "kernel": {"psnr": 40.0}}
    row = PromptRow(index=0, prompt="a red circle", seed=1, psnr=30.0, ladder=ladder)
    result = SimpleNamespace(detailed_results=(row,))
    assert ladder_lines(result) == [
        "error sources: noise 100.00 dB (0.0%), kernel at sparsity 0 40.00 dB (10.0%), policy 30.00 dB (90.0%)"
    ]


def test_intervals_over_few_prompts_come_with_a_reservation() -> None:
    assert caveat_lines(1) == ["note: 1 prompt has no interval; use at least 2"]
    assert "5 prompts include none of those with probability 0.59" in caveat_lines(5)[0]
    assert caveat_lines(29) == caveat_lines(0) == []
