"""report.md."""

import re
from pathlib import Path

import pytest

from sparsetune.evaluation.ladder import attribute
from sparsetune.evaluation.outputs import worst_and_median
from sparsetune.evaluation.report_markdown import CHECKLIST, cell, verdict_text
from sparsetune.evaluation.result import PromptRow
from sparsetune.metrics import Gate
from tests.evaluation.conftest import PROMPTS, Evaluate


def test_the_report_has_every_part_of_the_template(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(output_dir=tmp_path, save_videos=True)
    text = (tmp_path / "report.md").read_text()
    parts = [
        "Configuration",
        "Gain",
        "Objective metrics",
        "Prompts",
        "Sparsity",
        "Stills",
        "Human review",
        "Conclusion",
    ]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == parts
    for name, _ in CHECKLIST:
        assert f"- [ ] {name}" in text
    assert re.search(r"\| psnr \(dB\) ↑ \| \d+\.\d+ ± \d+\.\d+ \|", text)
    assert "40.0% of the block pairs" in text
    assert "Theoretical speed-up of attention: 1.67x" in text
    assert "Measured speed-up of the denoising: not known" in text
    assert "Mean of a whole rendering: 2.00 s dense, 1.00 s sparse" in text


def test_every_link_leads_to_a_file(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(output_dir=tmp_path, save_videos=True)
    links = re.findall(r"\]\(([^)]+)\)", (tmp_path / "report.md").read_text())
    assert len(links) == 9 + 2
    assert all((tmp_path / link).is_file() for link in links)


def test_prompts_cannot_break_the_tables(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(output_dir=tmp_path, prompts=("a | b\nc *d* <e>",))
    text = (tmp_path / "report.md").read_text()
    assert "| 1 | a \\| b c \\*d\\* &lt;e> |" in text


@pytest.mark.parametrize(
    ("gate", "conclusion"),
    [
        (Gate(0.0, 0.0), "Passed on metrics; human review still required."),
        (Gate(0.0, 99.0), "Do not deploy: mean psnr"),
    ],
)
def test_the_conclusion_follows_the_gate(evaluate: Evaluate, tmp_path: Path, gate: Gate, conclusion: str) -> None:
    evaluate(output_dir=tmp_path, gate=gate)
    assert conclusion in (tmp_path / "report.md").read_text()


def test_the_verdict_is_put_into_words(evaluate: Evaluate) -> None:
    result = evaluate().model_copy(update={"overall_score": 85, "verdict": "good"})
    assert (
        verdict_text(result) == "85/100 (pooled psnr 30.95 dB, between 30 and 35). Good: the video keeps its quality."
    )


def row(index: int, psnr: float | None, again: float = 100.0, kernel: float = 100.0) -> PromptRow:
    ladder = {"dense_again": {"psnr": again}, "kernel": {"psnr": kernel}}
    return PromptRow(index=index, prompt=PROMPTS[0], seed=0, psnr=psnr, ladder=ladder if psnr else None)


@pytest.mark.parametrize(
    ("psnr", "chosen"),
    [
        ([30.0, 20.0, 40.0], (1, 0)),
        ([30.0, 20.0], (1,)),
        ([30.0, None, 20.0, 25.0], (2, 3)),
        ([30.0], (0,)),
        ([None], ()),
    ],
)
def test_the_worst_and_the_median_prompt_are_shown(psnr: list[float | None], chosen: tuple[int, ...]) -> None:
    assert worst_and_median([row(index, value) for index, value in enumerate(psnr)]) == chosen


def test_shares_of_the_ladder_follow_the_squared_error() -> None:
    found = attribute([row(0, 20.0, again=40.0, kernel=30.0)])
    assert found is not None
    assert found.mse == pytest.approx({"dense_again": 1e-4, "kernel": 1e-3, "policy": 1e-2})
    assert found.shares == pytest.approx({"dense_again": 0.01, "kernel": 0.09, "policy": 0.9})


def test_shares_are_fractions_even_where_the_kernel_is_worse_than_the_policy() -> None:
    found = attribute([row(0, 30.0, again=100.0, kernel=20.0)])
    assert found is not None
    assert found.shares == pytest.approx({"dense_again": 0.0, "kernel": 1.0, "policy": 0.0})


def test_no_error_has_no_shares() -> None:
    found = attribute([row(0, 100.0)])
    assert found is not None
    assert found.shares is None
    assert attribute([row(0, None)]) is None


def test_nothing_in_a_cell_is_live_markdown() -> None:
    text = "[x](javascript:alert) ![i](http://h/i.png) *b* _e_ ~~s~~ `c` <b> &lt; | \\\nnext"
    assert cell(text) == (
        r"\[x\](javascript:alert) !\[i\](http://h/i.png) \*b\* \_e\_ \~\~s\~\~ \`c\` &lt;b> &amp;lt; \| \\ next"
    )
