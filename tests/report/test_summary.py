"""The summaries that `--lang zh` prints."""

import re

from sparsetune.evaluation.compare import compare
from sparsetune.report.summary import Summary, comparison_summary, evaluation_summary
from sparsetune.report.words import words
from tests.tracking.conftest import make_result


def text_of(summary: Summary) -> str:
    rows = [part if isinstance(part, str) else [list(part[0]), *map(list, part[1])] for part in summary]
    return "\n".join(map(str, rows))


def test_an_evaluation_s_summary_has_the_statistics_the_score_and_the_gate() -> None:
    result = make_result((36.0, 40.0))
    named = {**result.statistics, "frame_cosine": result.statistics["psnr"], "frame_l1": result.statistics["psnr"]}
    result = result.model_copy(update={"statistics": named})
    found = text_of(evaluation_summary(result, words("zh")))
    assert "统计摘要" in found and "质量评估" in found and f"{result.overall_score}/100" in found
    assert "帧相似度 (Cosine)" in found and "帧 L1 误差" in found and "38.00" in found
    assert "部署门槛" in found and "峰值信噪比 PSNR (dB)" in found


def test_a_summary_is_chinese_but_for_names() -> None:
    result = make_result()
    parts = [*evaluation_summary(result, words("zh")), *comparison_summary(compare(result, result), words("zh"))]
    sentences = [part for part in parts if isinstance(part, str) and part.strip()]
    assert all(re.search(r"[\u4e00-\u9fff]", sentence) for sentence in sentences)


def test_a_comparison_s_rows_fit_their_heads() -> None:
    result = make_result()
    for part in comparison_summary(compare(result, result), words("zh")):
        if not isinstance(part, str):
            heads, rows = part
            assert rows and all(len(row) == len(heads) for row in rows)
