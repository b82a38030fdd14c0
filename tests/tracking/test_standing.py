import pytest

from sparsetune.evaluation.result import EvaluationResult
from sparsetune.tracking.promotion import Condition, champion_condition, gate_condition
from tests.tracking.recorded import PSNRS, result_of


def shifted(by: float) -> tuple[float, ...]:
    return tuple(psnr + by for psnr in PSNRS)


def against(candidate: EvaluationResult, champion: EvaluationResult) -> Condition:
    return champion_condition(candidate, [champion], "demo-sparse version 3")


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


@pytest.mark.parametrize(
    ("psnr", "sparsity", "met"),
    [
        (0.0, 0.25, True),  # the same
        (0.5, 0.25, True),  # better quality at the same sparsity
        (-0.05, 0.25, True),  # worse by less than the tolerance
        (-0.5, 0.25, False),  # worse quality at the same sparsity
        (-2.0, 0.30, True),  # sparser: quality may fall as far as the gate lets it
        (-4.0, 0.30, False),  # sparser, but not within the champion's gate
        (3.0, 0.20, False),  # better quality doesn't make up for less sparsity
    ],
)
def test_at_least_as_good_means_sparser_within_the_gate_or_as_sparse_and_no_worse(
    psnr: float, sparsity: float, met: bool
) -> None:
    condition = against(result_of(shifted(psnr), sparsity), result_of(PSNRS, 0.25))
    assert condition.met is met, condition.says
    assert "demo-sparse version 3 over 6 paired prompts" in condition.says


def test_difference_within_chance_is_none() -> None:
    mixed = (38.0, 35.0, 40.0, 37.0, 42.0, 36.0)  # half of them better, half worse, 0.5 dB worse on average
    assert against(result_of(mixed), result_of(PSNRS)).met


def test_over_few_prompts_the_mean_decides() -> None:
    condition = against(result_of((37.0, 35.5)), result_of((36.0, 37.0)))
    assert not condition.met
    assert "too few for an interval" in condition.says


def test_bound_that_the_champion_meets_must_be_judged_and_met() -> None:
    worst = {"name": "worst prompt's psnr", "unit": "dB", "measured": 36.0, "bound": 30.0, "met": True}
    champion = result_of()
    stricter = changed(champion, gate={"conditions": [*champion.to_dict()["gate"]["conditions"], worst]})
    condition = against(result_of(), stricter)
    assert not condition.met
    assert "its worst prompt's psnr wasn't judged, and the champion's is > 30 dB" in condition.says


def test_measured_speed_stands_in_for_sparsity_on_the_same_gpu_only() -> None:
    def measured(result: EvaluationResult, seconds: float, backend: str) -> EvaluationResult:
        value = result.to_dict()
        value["config"]["backend"] = backend
        for index, row in enumerate(value["detailed_results"]):
            row["seconds_sparse"] = seconds + 0.001 * index
        return EvaluationResult.model_validate(value)

    def faster(backend: str) -> Condition:
        candidate = measured(result_of(PSNRS, 0.2), 10.0, backend)
        return against(candidate, measured(result_of(PSNRS, 0.25), 12.0, backend))

    assert faster("sparge").met
    assert "seconds_sparse" in faster("sparge").says
    assert not faster("reference").met


def test_what_cannot_be_compared_says_why_and_what_to_do() -> None:
    condition = against(result_of(seed=7), result_of())
    assert not condition.met
    assert "not comparable with demo-sparse version 3" in condition.says
    assert "seed" in condition.says and "sparsetune eval --checkpoint models:/...@champion" in condition.says


def test_the_first_comparable_evaluation_of_the_champion_is_taken() -> None:
    assert champion_condition(result_of(seed=7), [result_of(), result_of(seed=7)], "it").met


def test_champion_without_an_evaluation_is_said() -> None:
    assert "it has no evaluation that can be read" in champion_condition(result_of(), [], "it").says
