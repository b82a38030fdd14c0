"""Criteria of a promotion."""

import math

import pytest

from sparsetune.config.models import PromotionConfig
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.tracking.criteria import Condition, bounds_of, gate_condition, no_worse_conditions, speed_condition
from tests.tracking.recorded import PSNRS, result_of

MARGINS = PromotionConfig()


def shifted(*by: float) -> tuple[float, ...]:
    """The PSNRs of six prompts, all changed by one value or each by its own."""
    return tuple(psnr + change for psnr, change in zip(PSNRS, by * 6 if len(by) == 1 else by, strict=True))


def conditions(candidate: EvaluationResult, champion: EvaluationResult, **margins: float) -> tuple[Condition, ...]:
    chosen = MARGINS.model_copy(update=margins)
    return no_worse_conditions(candidate, [champion], "the champion", "demo-sparse version 3", chosen)


def against(candidate: EvaluationResult, champion: EvaluationResult, **margins: float) -> Condition:
    return conditions(candidate, champion, **margins)[0]


def changed(result: EvaluationResult, **sections: dict[str, object]) -> EvaluationResult:
    value = result.to_dict()
    for name, section in sections.items():
        value[name] |= section
    return EvaluationResult.model_validate(value)


def test_gate_that_holds_on_unseen_prompts_is_met_with_its_figures() -> None:
    condition = gate_condition(result_of())
    assert condition.met
    assert condition.says == "mean psnr 38.5 > 35 dB; 6 prompts"


def test_gate_that_does_not_hold_says_by_what() -> None:
    condition = gate_condition(result_of(shifted(-5)))
    assert not condition.met
    assert "mean psnr 33.5 <= 35 dB" in condition.says


def test_gate_on_prompts_that_were_tuned_on_counts_for_nothing() -> None:
    condition = gate_condition(result_of(prompts_in_tune_set=["a red circle, number 0"]))
    assert not condition.met
    assert "1 of the prompts were tuned on" in condition.says


def test_default_thresholds_are_no_candidate() -> None:
    assert not gate_condition(result_of(use_tuned=False)).met


def test_identical_pairs_that_means_leave_out_are_counted() -> None:
    assert "means leave out 2 identical" in gate_condition(changed(result_of(), gate={"num_identical": 2})).says


@pytest.mark.parametrize(
    ("psnr", "sparsity", "met"),
    [
        (0.0, 0.25, True),  # the same
        (0.5, 0.25, True),  # better quality at the same sparsity
        (-0.4, 0.25, True),  # worse by less than the margin
        (-0.6, 0.25, False),  # worse by more
        (-0.6, 0.30, False),  # saving more doesn't make up for quality
        (0.0, 0.30, True),  # sparser at the same quality
        (3.0, 0.20, False),  # better quality doesn't make up for less sparsity
    ],
)
def test_a_candidate_must_lose_neither_quality_nor_sparsity(psnr: float, sparsity: float, met: bool) -> None:
    condition = against(result_of(shifted(psnr), sparsity), result_of(PSNRS, 0.25))
    assert condition.met is met, condition.says
    assert "against demo-sparse version 3 over 6 paired prompts" in condition.says


def test_a_small_loss_on_every_prompt_passes_and_a_large_one_on_a_single_prompt_does_not() -> None:
    assert against(result_of(shifted(-0.11)), result_of()).met
    condition = against(result_of(shifted(-30.0, 0.2, 0.2, 0.2, 0.2, 0.2)), result_of(), margin_db=50.0)
    assert not condition.met and "a prompt loses 30.00 dB" in condition.says


def test_one_lucky_prompt_does_not_make_up_for_the_others() -> None:
    assert not against(result_of(shifted(-0.8, -0.8, -0.8, -0.8, -0.8, 59.0)), result_of()).met


def test_differences_above_50_db_are_none() -> None:
    champion, candidate = result_of((100.0, *PSNRS[1:])), result_of((55.0, *PSNRS[1:]))
    assert against(candidate, champion).met


def test_too_few_prompts_are_a_condition_that_is_not_met_with_the_number_that_is_needed() -> None:
    noisy = result_of(shifted(1.0, -1.0, 1.0, -1.0, 1.0, -1.0))
    quality, enough = conditions(noisy, result_of())
    assert not quality.met and "it isn't shown that its psnr is no lower" in quality.says
    assert not enough.met and enough.name == "enough prompts to compare with the champion"
    assert "can't tell from 6; they can detect a mean loss of 1.31 dB; for the margin of 0.5 dB about 32" in enough.says
    assert "evaluate both with --num-prompts 32" in enough.says
    assert all(one.met for one in conditions(noisy, result_of(), margin_db=1.0))


def test_a_single_prompt_cannot_tell() -> None:
    quality, enough = conditions(result_of((39.0,)), result_of((38.0,)))
    assert not quality.met and "unknown below 2 prompts" in quality.says and "over 1 paired prompt:" in quality.says
    assert not enough.met and "--num-prompts 27" in enough.says


def test_a_loss_that_is_shown_needs_no_more_prompts() -> None:
    quality, enough = conditions(result_of(shifted(-2.0)), result_of())
    assert "its psnr is lower" in quality.says and enough.met


def test_bound_that_the_champion_meets_must_be_judged_and_met() -> None:
    worst = {"name": "worst prompt's psnr", "unit": "dB", "measured": 36.0, "bound": 30.0, "met": True}
    champion = result_of()
    stricter = changed(champion, gate={"conditions": [*champion.to_dict()["gate"]["conditions"], worst]})
    condition = against(result_of(), stricter)
    assert not condition.met
    assert "its worst prompt's psnr wasn't judged, and the earlier one's is > 30 dB" in condition.says
    assert bounds_of(stricter) == "mean psnr > 35 dB; worst prompt's psnr > 30 dB" != bounds_of(champion)


def timed(
    result: EvaluationResult,
    speedup: float,
    backend: str = "sparge",
    low: float | None = None,
    spread: float = 0.002,
) -> EvaluationResult:
    """The result with seconds whose speed-ups differ by prompt by `spread`, up and down in turn."""
    value = result.to_dict()
    value["config"]["backend"] = backend
    value["seconds"] = {
        "dense": 3.0 * speedup, "sparse": 3.0, "speedup": speedup, "ci95_low": low or speedup - 0.02,
        "ci95_high": speedup + 0.02, "noise": 0.005, "attention_share": 0.6, "ceiling": 2.5,
    }  # fmt: skip
    for row in value["detailed_results"]:
        row["denoising_sparse"] = 3.0
        row["denoising_dense"] = 3.0 * speedup * math.exp(spread * (-1) ** row["index"])
    return EvaluationResult.model_validate(value)


def test_where_both_were_timed_with_one_kernel_speed_counts_whatever_the_sparsity() -> None:
    slower, faster = timed(result_of(PSNRS, 0.25), 1.4), timed(result_of(PSNRS, 0.2), 1.5)
    condition = against(faster, slower)
    assert condition.met
    assert "speed +7.1%, at least +7.1%, margin 2%" in condition.says
    assert against(slower, faster).says.startswith("its speed-up is lower: ")
    assert not against(timed(result_of(PSNRS, 0.2), 1.5, "flex"), slower).met


def test_equal_speeds_that_vary_cannot_be_told_from_few_prompts() -> None:
    champion = timed(result_of(), 1.5, spread=0.0)
    quality, enough = conditions(timed(result_of(), 1.5, spread=0.1), champion)
    assert not quality.met and "it isn't shown that its speed-up is no lower" in quality.says
    assert not enough.met and "for the margin of 2% of the speed about" in enough.says
    assert against(timed(result_of(), 1.49), champion).met


@pytest.mark.parametrize("number", [1, 2, 3])
def test_equal_speeds_over_so_few_pairs_do_not_pass_by_chance(number: int) -> None:
    few = result_of(PSNRS[:number])
    assert not against(timed(few, 1.5, spread=0.03), timed(few, 1.5, spread=-0.03)).met


def test_seconds_by_prompt_that_are_missing_are_asked_for() -> None:
    old = changed(timed(result_of(), 1.5))
    rows = [row.model_copy(update={"denoising_dense": None}) for row in old.detailed_results]
    condition = against(timed(result_of(), 1.5), old.model_copy(update={"detailed_results": tuple(rows)}))
    assert not condition.met and "seconds by prompt are missing, evaluate both again" in condition.says


def cached(result: EvaluationResult, speedup: float) -> EvaluationResult:
    """The result with a step cache, on a CPU, where only policies with a cache are timed."""
    policy = result.config.policy.model_copy(update={"cache": "mag 0.1, max_skips 1"})
    config = result.config.model_copy(update={"policy": policy})
    return timed(result.model_copy(update={"config": config}), speedup, backend="reference")


def on_cpu(result: EvaluationResult) -> EvaluationResult:
    return result.model_copy(update={"config": result.config.model_copy(update={"backend": "reference"})})


def test_beside_a_cache_a_policy_without_one_is_as_fast_as_dense_on_a_cpu() -> None:
    plain = on_cpu(result_of())
    condition = against(cached(result_of(), 1.5), plain)
    assert condition.met
    assert "speed +50.0%" in condition.says
    assert "its speed-up is lower" in against(plain, cached(result_of(), 1.5)).says


def test_a_policy_must_be_measured_to_be_faster_than_dense() -> None:
    assert speed_condition(timed(result_of(), 1.5)).met
    assert "1.50 times as fast" in speed_condition(timed(result_of(), 1.5)).says
    slower = speed_condition(timed(result_of(), 0.35))
    assert not slower.met and "0.35 times as fast, slower than dense" in slower.says
    unclear = speed_condition(timed(result_of(), 1.01, low=0.99))
    assert not unclear.met and "no difference beyond the noise" in unclear.says
    assert "no seconds were measured" in speed_condition(result_of()).says


def test_one_prompt_cannot_show_that_a_policy_is_faster_than_dense() -> None:
    result = timed(result_of(PSNRS[:1]), 1.5)
    assert result.seconds is not None
    single = result.seconds.model_copy(update={"ci95_low": None, "ci95_high": None})
    condition = speed_condition(result.model_copy(update={"seconds": single}))
    assert not condition.met and "no 95% interval for one prompt" in condition.says


def test_what_cannot_be_compared_says_why_and_what_to_do() -> None:
    condition = against(result_of(seed=7), result_of())
    assert not condition.met
    assert "not comparable with demo-sparse version 3" in condition.says
    assert "seed" in condition.says and "sparsetune eval --checkpoint models:/NAME/VERSION" in condition.says


def test_the_first_comparable_evaluation_is_taken() -> None:
    found = no_worse_conditions(result_of(seed=7), [result_of(), result_of(seed=7)], "the champion", "it", MARGINS)
    assert found[0].met


def test_a_version_without_an_evaluation_is_said() -> None:
    (condition,) = no_worse_conditions(result_of(), [], "the champion", "it", MARGINS)
    assert "it has no evaluation that can be read" in condition.says
