"""Comparison of two results."""

import json
from pathlib import Path

import numpy as np
import pytest

from sparsetune.errors import GenerationError, ResultError
from sparsetune.evaluation.compare import Change, compare
from sparsetune.evaluation.result import EvaluationResult, PromptRow
from sparsetune.metrics import registry
from tests.evaluation.conftest import AMPLITUDES, PROMPTS, Evaluate, FakeRenderer


@pytest.fixture
def before(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> EvaluationResult:
    with monkeypatch.context() as patched:
        patched.setitem(AMPLITUDES, "sparse", 30)
        return evaluate(None)


@pytest.fixture
def after(evaluate: Evaluate) -> EvaluationResult:
    return evaluate()


def changed(result: EvaluationResult, **config: object) -> EvaluationResult:
    return result.model_copy(update={"config": result.config.model_copy(update=config)})


def with_rows(result: EvaluationResult, rows: tuple[PromptRow, ...]) -> EvaluationResult:
    return result.model_copy(update={"detailed_results": rows})


def test_differences_are_those_of_the_paired_prompts(before: EvaluationResult, after: EvaluationResult) -> None:
    found = compare(before, after)
    psnr = next(change for change in found.changes if change.name == "psnr")
    pairs = zip(before.detailed_results, after.detailed_results, strict=True)
    differences = [(other.psnr or 0) - (one.psnr or 0) for one, other in pairs]
    assert psnr.difference.mean == pytest.approx(np.mean(differences))
    assert psnr.difference.ci95_low <= np.mean(differences) <= psnr.difference.ci95_high
    assert (psnr.difference.better, psnr.difference.worse, psnr.difference.equal) == (3, 0, 0)
    assert (found.num_pairs, found.num_unpaired, found.forced) == (3, 0, ())


def test_lower_is_better_where_it_is(before: EvaluationResult, after: EvaluationResult) -> None:
    l1 = next(change for change in compare(before, after).changes if change.name == "frame_l1")
    assert l1.higher_is_better is False
    assert l1.difference.mean < 0
    assert (l1.difference.better, l1.difference.worse) == (3, 0)


def test_prompts_are_paired_by_text_not_by_place(before: EvaluationResult, after: EvaluationResult) -> None:
    turned = with_rows(after, tuple(reversed(after.detailed_results)))
    assert compare(before, turned).changes[0].difference.mean == compare(before, after).changes[0].difference.mean


def test_a_prompt_listed_twice_is_paired_twice(after: EvaluationResult) -> None:
    twice = with_rows(after, (after.detailed_results[0],) * 2)
    assert compare(twice, twice).num_pairs == 2


@pytest.mark.parametrize(
    ("config", "differences"),
    [
        ({"height": 480}, r"height \(480 and 16\)"),
        ({"num_inference_steps": 50}, r"num_inference_steps \(50 and 4\)"),
        ({"seed": 1}, r"seed \(1 and 42\)"),
        ({"prompts_hash": "x"}, r"prompts_hash \('x' and"),
        ({"short_name": "other"}, r"short_name \('other' and 'fake'\)"),
        ({"guidance_scale": 6.0, "num_frames": 9}, r"num_frames \(9 and 5\); guidance_scale \(6.0 and 2.5\)"),
    ],
)
def test_what_is_not_comparable_is_refused_with_every_difference(
    before: EvaluationResult, after: EvaluationResult, config: dict[str, object], differences: str
) -> None:
    with pytest.raises(ResultError, match=f"not comparable, they differ in {differences}"):
        compare(changed(before, **config), after)


def test_force_compares_all_the_same_and_says_so(before: EvaluationResult, after: EvaluationResult) -> None:
    found = compare(changed(before, height=480), after, force=True)
    assert found.forced == ("height (480 and 16)",)
    assert "**Not comparable, compared with --force:** height (480 and 16)" in found.to_markdown()


def test_nothing_in_common_cannot_be_forced(evaluate: Evaluate, after: EvaluationResult) -> None:
    with pytest.raises(ResultError, match="share no prompt and seed that rendered in both"):
        compare(evaluate(prompts=("another",)), after, force=True)


def test_failed_prompts_are_left_out_and_counted(
    evaluate: Evaluate, renderer: FakeRenderer, before: EvaluationResult
) -> None:
    renderer.failing["sparse", PROMPTS[0]] = GenerationError("all are black")
    found = compare(before, evaluate())
    assert (found.num_pairs, found.num_unpaired, found.after.num_failed) == (2, 2, 1)


def test_another_device_or_version_is_said(before: EvaluationResult, after: EvaluationResult) -> None:
    environment = before.environment.model_copy(update={"versions": before.environment.versions | {"torch": "1.0"}})
    notes = compare(changed(before.model_copy(update={"environment": environment}), device="cuda X"), after).notes
    assert any(note.startswith("device ('cuda X' and") for note in notes)
    assert any(note.startswith("versions differ: torch 1.0 and") for note in notes)


def test_json_and_markdown_hold_the_same_figures(before: EvaluationResult, after: EvaluationResult) -> None:
    found = compare(before, after)
    value = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert value["before"]["use_tuned"] is False
    assert value["after"]["score"] == after.overall_score
    text = found.to_markdown()
    assert f"{value['changes']['psnr']['difference']['mean']:+.2f}" in text
    assert "| Score |" in text
    assert "| sparsity | 0.4000 | 0.4000 | +0.0000 |" in text


def test_one_pair_is_not_called_significant(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    after = evaluate(prompts=PROMPTS[:1])
    monkeypatch.setitem(AMPLITUDES, "sparse", 30)
    text = compare(evaluate(prompts=PROMPTS[:1]), after).to_markdown()
    assert " \\* |" not in text and "1 prompt has no interval; use at least 2" in text


def test_few_pairs_are_said_to_miss_rare_failures(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    before = evaluate()
    monkeypatch.setitem(AMPLITUDES, "sparse", 30)
    found = compare(before, evaluate())
    assert "3 prompts include none of those with probability 0.73" in found.to_markdown()


def test_significance_is_corrected_for_the_number_of_rows(after: EvaluationResult) -> None:
    def with_psnr(*changes: float) -> EvaluationResult:
        rows = zip(after.detailed_results, changes, strict=True)
        return with_rows(after, tuple(row.model_copy(update={"psnr": 35.0 + change}) for row, change in rows))

    def psnr_change(*changes: float) -> Change:
        found = compare(with_psnr(0.0, 0.0, 0.0), with_psnr(*changes))
        return next(change for change in found.changes if change.name == "psnr")

    once = psnr_change(1.0, 1.4, 0.8)  # p = .026, one of at least four rows
    assert once.difference.significant and not once.significant
    assert once.p_corrected is not None and once.p_corrected > 0.1
    sure = psnr_change(1.0, 1.01, 0.99)
    assert sure.significant
    assert sure.difference.worst == pytest.approx(0.99)


def test_a_users_metric_keeps_unit_and_direction_where_nobody_registers_it(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
        registry.metric(higher_is_better=False, unit="levels", name="mine")(lambda dense, sparse: float(sparse.std()))
        evaluate(None, output_dir=tmp_path / "before")
        evaluate(output_dir=tmp_path / "after")
    found = compare(tmp_path / "before", tmp_path / "after")
    (change,) = (change for change in found.changes if change.name == "mine")
    assert (change.unit, change.higher_is_better) == ("levels", False)
    assert found.notes == ()


def test_folders_are_compared(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(None, output_dir=tmp_path / "before")
    evaluate(output_dir=tmp_path / "after")
    assert compare(tmp_path / "before", tmp_path / "after").num_pairs == 3
