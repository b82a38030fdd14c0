"""Model cards, and which results belong to a checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint import Checkpoint, Manifest, load_checkpoint, save_checkpoint
from sparsetune.errors import ReportError
from sparsetune.evaluation.conditions import policy_digest
from sparsetune.evaluation.result import EvaluationResult, save_result
from sparsetune.report.card import model_card, source_of, videos_of
from sparsetune.report.source import Source
from sparsetune.tuning.record import save_record
from tests.report.synthetic import HOSTILE, record_of, result_of, write_videos

POLICY = Policy.uniform([("transformer.transformer_blocks.0.attn1", 2)])
MANIFEST = Manifest(
    tuner="optuna", base_model="tiny", base_source="maker/tiny-video", base_revision="abc123", device="NVIDIA H100",
    num_frames=81, height=480, width=832, num_inference_steps=30, guidance_scale=5.0, kernel="sparge",
    versions={"torch": "2.9", "sparsetune": "0.1"}, metrics={"psnr": 37.25, "sparsity": 0.4},
    tuner_settings={"study_name": "demo-12345678", "trial": 0},
)  # fmt: skip
CHECKPOINT = Checkpoint(POLICY, MANIFEST)


def judged(policy: Policy = POLICY) -> EvaluationResult:
    value = result_of().to_dict()
    value["config"]["policy"]["digest"] = policy_digest(policy)
    value["config"]["use_tuned"] = True
    value["seconds"] = {
        "dense": 90.0, "sparse": 60.0, "speedup": 1.5, "ci95_low": 1.42, "ci95_high": 1.58, "noise": 0.01,
        "attention_share": 0.6, "ceiling": 2.5,
    }  # fmt: skip
    return EvaluationResult.model_validate(value)


def parts(card: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Metadata, and sections by heading."""
    _, metadata, text = card.split("---\n", 2)
    sections = {part.partition("\n")[0]: part.partition("\n")[2] for part in text.split("\n## ")[1:]}
    return yaml.safe_load(metadata), sections


def test_the_card_tells_how_to_load_what_was_measured_and_what_it_was_tuned_for() -> None:
    result = judged()
    metadata, sections = parts(model_card(CHECKPOINT, "owner/tiny-sparse", Source("x", result)))
    assert metadata == {
        "library_name": "sparsetune", "base_model": "maker/tiny-video", "tags": ["sparse-attention", "spargeattn"],
    }  # fmt: skip
    code = sections["Use"].split("```python\n")[1].partition("```")[0]
    assert 'with sparsify(pipe, "hf://owner/tiny-sparse"):' in code
    compile(code, "card", "exec")
    psnr = result.statistics["psnr"]
    assert f"{psnr.ci95_low:.2f} to {psnr.ci95_high:.2f}" in sections["Objective metrics"]
    assert "1.50 times as fast (95% interval 1.42 to 1.58" in sections["Objective metrics"]
    assert "Passed on metrics; human review still required." in sections["Conclusion"]
    assert "met: mean psnr 38.00 (must be above 35 dB)" in sections["Conclusion"]
    for row in ("| GPU | NVIDIA H100 |", "| Revision | abc123 |", "| Video | 81 frames of 832 x 480 |", "torch 2.9"):
        assert row in sections["Tuned for"]


def test_without_results_the_card_has_the_searchs_figures() -> None:
    metadata, sections = parts(model_card(CHECKPOINT, "owner/name", license="apache-2.0"))
    assert metadata["license"] == "apache-2.0"
    assert "| psnr | 37.25 |" in sections["Measured on the tune prompts"]
    bare = Checkpoint(POLICY, Manifest(tuner="unknown"))
    assert list(parts(model_card(bare, "owner/name"))[1]) == ["Use", "Tuned for"]


def test_a_folder_is_no_base_model_of_the_hub(working_folder: Path) -> None:
    for source in ("/models/secret/wan", "models/wan"):
        Path("models/wan").mkdir(parents=True, exist_ok=True)
        manifest = MANIFEST.model_copy(update={"base_source": source})
        card = model_card(Checkpoint(POLICY, manifest), "owner/name")
        assert "base_model" not in parts(card)[0] and source not in card
        assert "| Base model | tiny |" in card


def test_results_beside_a_checkpoint_are_its_own_or_none(tmp_path: Path) -> None:
    path = save_checkpoint(CHECKPOINT, tmp_path / "checkpoint")
    assert source_of(CHECKPOINT, path, None) is None
    record = record_of(after=judged())
    save_record(record, tmp_path / "tuning.json")
    mine = MANIFEST.model_copy(update={"tuner_settings": {"study_name": record.study_name, "trial": record.best}})
    found = source_of(Checkpoint(POLICY, mine), path, None)
    assert found is not None and found.evaluation == record.evaluation
    others = MANIFEST.model_copy(update={"tuner_settings": {"study_name": "another", "trial": record.best}})
    assert source_of(Checkpoint(POLICY, others), path, None) is None
    with pytest.raises(ReportError, match="has no evaluation of this checkpoint; run `sparsetune eval --checkpoint"):
        source_of(Checkpoint(POLICY, others), path, tmp_path)


def test_a_given_evaluation_must_be_of_the_policy(tmp_path: Path) -> None:
    path = save_checkpoint(CHECKPOINT, tmp_path / "checkpoint")
    loaded = load_checkpoint(path)
    (tmp_path / "after").mkdir()
    save_result(judged(loaded.policy), tmp_path / "after" / "demo_accuracy_tuned.json")
    found = source_of(loaded, path, tmp_path / "after")
    assert found is not None and found.evaluation == judged(loaded.policy)
    other = replace(loaded, policy=replace(POLICY, order="hilbert"))
    with pytest.raises(ReportError, match="has no evaluation of this checkpoint"):
        source_of(other, path, tmp_path / "after")


def test_the_videos_of_the_worst_and_the_median_prompt_are_shown(tmp_path: Path) -> None:
    value = judged().to_dict()
    for row, psnr in zip(value["detailed_results"], (31.0, 39.0, None), strict=True):
        if psnr:
            row["psnr"] = psnr
    result = EvaluationResult.model_validate(value)
    source = Source("x", result, files=write_videos(tmp_path, 3))
    videos = videos_of(source)
    assert list(videos) == ["prompt_0_compare.mp4", "prompt_1_compare.mp4"]
    text = parts(model_card(CHECKPOINT, "owner/name", source))[1]["Videos"]
    assert "(videos/prompt_0_compare.mp4)" in text
    assert HOSTILE not in text and "</script><script>" not in text
