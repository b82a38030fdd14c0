"""The verdict."""

import pytest

from sparsetune.evaluation.compare import Comparison
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.report.page import comparison
from sparsetune.report.source import Source
from sparsetune.report.tables import comparison_rows, prompt_table, trial_table
from sparsetune.report.verdict import conditions, sentence, tiles, tone
from sparsetune.report.words import words
from tests.report.synthetic import record_of, result_of, source_of


def changed(**changes: object) -> EvaluationResult:
    return result_of().model_copy(update=changes)


def test_score_and_gate_stand_in_one_sentence() -> None:
    assert sentence(source_of(), words("en")) == (
        "Good (85/100): at 25.0% sparsity, the videos keep their quality; the gate to deploy is met."
    )
    for part in ("良好", "85/100", "25.0%", "视频质量保持良好", "部署门槛已达到"):
        assert part in sentence(source_of(), words("zh"))


def test_of_a_cache_alone_the_blocks_that_ran_are_said() -> None:
    sparsity = result_of().sparsity.model_copy(update={"overall": 0.0, "blocks_run": 0.32})
    source = Source("x", changed(sparsity=sparsity))
    assert "(85/100): with 32% of the blocks run, the videos" in sentence(source, words("en"))
    assert "计算了 32% 的 transformer 块" in sentence(source, words("zh"))


def test_a_gate_that_failed_is_said_and_shown() -> None:
    result = result_of()
    condition = result.gate.conditions[0].model_copy(update={"measured": 30.0, "met": False})
    gate = result.gate.model_copy(update={"passed": False, "conditions": (condition,)})
    source = Source("x", result.model_copy(update={"gate": gate}))
    assert sentence(source, words("en")).endswith("the gate to deploy is not met.")
    assert tone(source) == "bad"
    shown = [(tile.text, tile.tone) for tile in conditions(source.evaluation, words("en"))]  # type: ignore[arg-type]
    assert shown == [("30.00 dB ≤ 35 dB", "bad"), ("1 of 3 failed", "bad")]


def test_nothing_rendered_has_no_score() -> None:
    sparsity = result_of().sparsity.model_copy(update={"overall": None})
    source = Source("x", changed(overall_score=None, verdict="failed", sparsity=sparsity, statistics={}))
    assert sentence(source, words("en")).startswith("Failed: none of the 1 prompts rendered")
    assert [tile.text for tile in tiles(source.evaluation, words("en"))][:1] == ["–"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("closest", "words_of_it"), [(None, "none of 12 trials met the gate to deploy."), (3, "trial 3 came closest")]
)
def test_a_search_without_a_winner_says_what_came_closest(closest: int | None, words_of_it: str) -> None:
    record = record_of().model_copy(update={"best": None, "closest": closest})
    assert words_of_it in sentence(Source("x", None, tuning=record), words("en"))


def test_before_and_after_stand_side_by_side() -> None:
    compared = comparison(source_of())
    assert isinstance(compared, Comparison)
    rows = comparison_rows(compared, words("en"))
    assert rows[0] == ("Score", "85/100", "85/100")
    assert len(rows) == 7


def test_results_that_do_not_compare_give_the_reason() -> None:
    other = changed(config=result_of().config.model_copy(update={"seed": 1}))
    assert "differ in seed" in str(comparison(Source("x", other, before=result_of(variant=1))))


def test_tables_have_a_cell_for_every_head() -> None:
    for table in (prompt_table(result_of(6), words("en")), trial_table(record_of(20), words("en"))):
        assert {len(row.cells) for row in table.rows} == {len(table.heads)}


def test_the_winner_leads_the_trials() -> None:
    record = record_of(20)
    assert trial_table(record, words("en")).rows[0].key == record.best
