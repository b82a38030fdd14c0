"""Hand-set pairs beside a tuned policy, and the gain that is shown of them; renderings are simulated."""

import math
from pathlib import Path

import pytest

from sparsetune.attention.policy import Policy
from sparsetune.errors import GenerationError
from sparsetune.evaluation.gain import budget_used, gain_notes, gain_rows, gain_table
from sparsetune.evaluation.hand_set import Pair, measure_hand_set
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.evaluation.result import ConditionSection, PromptRow
from sparsetune.metrics import Gate
from sparsetune.metrics.score import psnr_grade
from tests.evaluation.conftest import POLICY, Evaluate

PAIRS = tuple(Pair(-1.0, 1 - 2.0**-index, 1 - index / 10) for index in range(10, -1, -1))
ROW = PromptRow(index=2, prompt="a", seed=1, psnr=36.0)
GATE = Gate(min_psnr=35.0)


class Renderings:
    """A model of which PSNR falls by `slope` dB per doubling of the dropped attention, and that calibration knows."""

    def __init__(self, at_full: float, slope: float) -> None:
        self.at_full, self.slope, self.policies = at_full, slope, list[Policy]()

    def __call__(self, policy: Policy) -> PromptResult:
        self.policies.append(policy)
        doublings = math.log2(1 - policy.layers[0].heads[0].cdfthreshd)
        psnr = self.at_full - self.slope * doublings
        return PromptResult("a", 1, {"psnr": psnr, "frame_cosine": 0.99}, sparsity=1 + doublings / 10)


@pytest.mark.parametrize(("at_full", "slope"), [(12.0, 6.0), (20.0, 3.0), (5.0, 9.0)])
def test_a_pair_saves_as_much_and_another_meets_the_gate_within_three_renderings(at_full: float, slope: float) -> None:
    render = Renderings(at_full, slope)
    found = measure_hand_set(POLICY, ROW, 0.8, PAIRS, GATE, render)
    assert len(render.policies) == len(found.points) <= 3
    assert found.at_sparsity.sparsity == pytest.approx(0.8)
    assert found.at_sparsity.psnr == pytest.approx(at_full + 2 * slope)
    assert not found.at_sparsity.meets_gate
    best = 1 - (35.0 - at_full) / slope / 10  # where PSNR meets the gate
    assert best - 0.2 < found.at_gate.sparsity < best
    heads = {head for layer in render.policies[0].layers for head in layer.heads}
    assert len(heads) == 1
    assert render.policies[0].keep_text == POLICY.keep_text


def test_a_prompt_that_cannot_be_rendered_gives_no_comparison(caplog: pytest.LogCaptureFixture) -> None:
    def fail(policy: Policy) -> PromptResult:
        raise GenerationError("frames are NaN")

    assert measure_hand_set(POLICY, ROW, 0.8, PAIRS, GATE, fail) is None
    assert "no comparison with hand-set thresholds: frames are NaN" in caplog.text


def test_an_evaluation_keeps_the_pairs_and_shows_them_beside_the_tuned_policy(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    result = evaluate(gate=Gate(0.5, 1.0, 0.0), hand_set=PAIRS, output_dir=tmp_path)
    assert result.hand_set is not None
    row = result.detailed_results[result.hand_set.prompt]
    assert [each.name for each in gain_rows(result)] == ["dense", "at_gate", "tuned", "at_sparsity"]
    dense, _, tuned, pair = gain_rows(result)
    assert (dense.saved, tuned.saved, tuned.psnr) == (0.0, pytest.approx(0.4), row.psnr)
    assert pair.psnr == result.hand_set.points[0].psnr
    assert gain_table(result)[0][3] == f"psnr, prompt {result.hand_set.prompt + 1} (dB)"
    assert gain_notes(result)[0].startswith("saving as much with one hand-set pair changes psnr by ")
    assert "## Gain" in (tmp_path / "report.md").read_text()
    without = result.model_copy(update={"hand_set": None})
    assert [each.name for each in gain_rows(without)] == ["dense", "tuned"]


def test_the_budget_is_the_share_of_the_squared_error_or_of_the_distance_from_one() -> None:
    psnr = ConditionSection(name="mean psnr", unit="dB", measured=38.0, bound=35.0, met=True)
    assert budget_used(psnr) == pytest.approx(0.501, abs=0.001)
    assert budget_used(psnr.model_copy(update={"measured": 35.0})) == 1.0
    cosine = ConditionSection(name="mean frame_cosine", unit="", measured=0.99, bound=0.95, met=True)
    assert budget_used(cosine) == pytest.approx(0.2)


def test_the_grade_of_a_psnr_lies_between_the_bounds_of_its_points() -> None:
    assert [psnr_grade(value) for value in (29.0, 35.0, 35.01, 39.99, 41.0)] == [
        (None, 30.0), (30.0, 35.0), (35.0, 40.0), (35.0, 40.0), (40.0, None)
    ]  # fmt: skip
