"""A complete evaluation, with a renderer without a model."""

import errno
import inspect
import json
import logging
import os
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import numpy as np
import pytest

from sparsetune import metrics
from sparsetune.attention import backends
from sparsetune.bench.step_time import StepTime, StepTimes
from sparsetune.decoding import read_video
from sparsetune.errors import GenerationError, MetricError, OutOfMemoryError, PromptError, SparsetuneError
from sparsetune.evaluation import evaluate as run
from sparsetune.evaluation.events import Listeners
from sparsetune.evaluation.result import SCHEMA_PATH, load_result
from sparsetune.evaluation.tasks import TimeStep
from sparsetune.evaluation.yardsticks import place_text, placed
from sparsetune.metrics import Gate
from sparsetune.models.variants import VARIANTS
from tests.evaluation.conftest import POLICY, PROMPTS, Evaluate, FakeRenderer, Recorder


def test_the_result_has_the_known_sections(evaluate: Evaluate) -> None:
    value = evaluate().to_dict()
    assert set(value) == {
        "schema_version",
        "config",
        "statistics",
        "detailed_results",
        "overall_score",
        "verdict",
        "gate",
        "sparsity",
        "seconds",
        "hand_set",
        "thresholds",
        "environment",
    }
    assert {"model_name", "use_tuned", "num_prompts", "seed"} <= set(value["config"])
    assert set(value["statistics"]) == set(metrics.BASE_METRICS)
    for spread in value["statistics"].values():
        assert {"mean", "std", "min", "max"} <= set(spread)
    assert [row["prompt"] for row in value["detailed_results"]] == list(PROMPTS)


@pytest.mark.parametrize("name", ["report.md", "cogvideo_accuracy_tuned.json"])
def test_a_users_own_file_of_the_same_name_is_not_replaced(evaluate: Evaluate, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("# My thesis\n")
    with pytest.raises(SparsetuneError, match=rf"{name} was not written by sparsetune, so it is not replaced"):
        evaluate(output_dir=tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["# My thesis\n"]


def test_statistics_are_those_of_the_prompts(evaluate: Evaluate) -> None:
    result = evaluate()
    values = [row.psnr for row in result.detailed_results]
    spread = result.statistics["psnr"]
    assert spread.mean == pytest.approx(np.mean([value for value in values if value]))
    assert spread.ci95_low <= spread.mean <= spread.ci95_high
    assert result.overall_score == metrics.score(
        result.statistics["frame_cosine"].mean, spread.mean, result.statistics["frame_l1"].mean
    )


def test_every_prompt_has_the_same_seed(evaluate: Evaluate) -> None:
    result = evaluate(seed=7)
    assert [row.seed for row in result.detailed_results] == [7, 7, 7]
    assert result.config.seed == 7


def test_sparsity_is_pooled_and_speed_is_measured(evaluate: Evaluate) -> None:
    part = evaluate().sparsity
    assert part.overall == pytest.approx(0.4)
    assert part.theoretical_speedup == pytest.approx(1 / 0.6)
    assert (part.seconds_dense, part.seconds_sparse, part.measured_speedup) == (2.0, 1.0, None)
    assert len(part.by_layer) == 2
    assert len(part.by_step) == 4
    assert part.num_calls["sparse"] == 24


def test_where_the_kernel_skips_work_dense_and_sparse_denoising_is_timed(
    evaluate: Evaluate, renderer: FakeRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four dense steps take 1.56, 1.64 and 1.64 s, a sparse denoising 0.8 s; attention is 0.6 of a dense step."""
    monkeypatch.setattr(backends, "_SKIP_WORK", {"reference"})
    rows = [StepTime(name, ms, ms, ms, None) for name, ms in (("dense", 100.0), ("without", 40.0), ("after", 100.0))]
    monkeypatch.setattr(TimeStep, "run", lambda *_: StepTimes(rows[0], (), None, rows[1], rows[2], {}, 2))
    for _ in range(2):  # the second time the dense videos are cached: they are timed all the same
        result = evaluate()
        seconds = result.seconds
        assert seconds is not None and seconds.is_faster
        assert (seconds.dense, seconds.sparse) == (pytest.approx(4.84 / 3), pytest.approx(0.8))
        assert seconds.speedup == result.sparsity.measured_speedup == pytest.approx(4.84 / 2.4)
        assert seconds.ci95_low <= seconds.speedup <= seconds.ci95_high
        assert seconds.noise == pytest.approx(np.std([1.56, 1.64, 1.64], ddof=1) / np.sqrt(3) / (4.84 / 3))
        assert (seconds.attention_share, seconds.ceiling) == (pytest.approx(0.6), pytest.approx(2.5))
    # Each evaluation installs the policy anew: its kernels are warmed up once, before dense steps are timed.
    assert renderer.timed == 2 * ["sparse", "dense", "dense", "dense"]


def test_without_such_a_kernel_nothing_is_timed(evaluate: Evaluate, renderer: FakeRenderer) -> None:
    assert evaluate().seconds is None
    assert renderer.timed == []


def test_files_lie_where_the_guide_says(evaluate: Evaluate, tmp_path: Path) -> None:
    recorder = Recorder()
    evaluate(output_dir=tmp_path / "out", save_videos=True, tuned=False, listener=recorder)
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    videos = {f"videos/prompt_{i}_{kind}.mp4" for i in range(3) for kind in ("dense", "sparse", "compare")}
    stills = {name for name in files if name.startswith("stills/")}
    assert files == {"cogvideo_accuracy_default.json", "report.md"} | videos | stills
    assert len(stills) == 2
    (ended,) = recorder.named("on_end")
    assert {path.relative_to(tmp_path / "out").as_posix() for path in ended.artifacts} == videos | stills


def test_videos_can_be_played(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(output_dir=tmp_path, save_videos=True, difference=True)
    dense = read_video(tmp_path / "videos" / "prompt_0_dense.mp4")
    assert dense.frames.shape == (5, 16, 24, 3)
    assert dense.fps == 8
    compare = read_video(tmp_path / "videos" / "prompt_0_compare.mp4")
    assert compare.frames.shape[2] > 3 * 24


def test_without_save_videos_there_are_none(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(output_dir=tmp_path)
    assert (tmp_path / "cogvideo_accuracy_tuned.json").is_file()
    assert not (tmp_path / "videos").exists()


def test_the_json_is_valid_and_is_read_back_whole(evaluate: Evaluate, tmp_path: Path) -> None:
    result = evaluate(output_dir=tmp_path, ladder=True, metrics=("ssim", "ms_ssim"))
    value = json.loads((tmp_path / "cogvideo_accuracy_tuned.json").read_text())
    jsonschema.Draft202012Validator(json.loads(SCHEMA_PATH.read_text())).validate(value)
    assert load_result(tmp_path) == result


def test_dense_videos_are_rendered_once_for_any_number_of_evaluations(
    evaluate: Evaluate, renderer: FakeRenderer
) -> None:
    first, second = evaluate(), evaluate()
    assert [kind for kind, _ in renderer.rendered].count("dense") == 3
    assert [row.dense_cached for row in second.detailed_results] == [True] * 3
    assert first.statistics == second.statistics


def test_a_failed_prompt_is_shown_fails_the_gate_and_is_no_number(
    evaluate: Evaluate, renderer: FakeRenderer, tmp_path: Path
) -> None:
    renderer.failing["sparse", PROMPTS[1]] = GenerationError("frames must be finite, but the model gave NaN")
    result = evaluate(gate=Gate(0.0, 0.0), output_dir=tmp_path, save_videos=True)
    assert [row.index for row in result.failed] == [1]
    assert result.detailed_results[1].metrics == {}
    assert result.overall_score is not None
    assert not result.gate.passed
    assert "1 of 3 prompts failed" in result.gate.failures[0]
    assert "gave NaN" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "videos" / "prompt_1_sparse.mp4").exists()


def test_when_all_prompts_fail_there_is_no_score(evaluate: Evaluate, renderer: FakeRenderer, tmp_path: Path) -> None:
    for prompt in PROMPTS:
        renderer.failing["sparse", prompt] = GenerationError("all are black")
    result = evaluate(output_dir=tmp_path)
    assert (result.overall_score, result.verdict, result.gate.passed, result.statistics) == (None, "failed", False, {})
    assert result.sparsity.overall is None
    jsonschema.validate(result.to_dict(), json.loads(SCHEMA_PATH.read_text()))


def test_out_of_memory_ends_it_and_listeners_hear_of_it(
    evaluate: Evaluate, renderer: FakeRenderer, tmp_path: Path
) -> None:
    error = OutOfMemoryError("the video must fit into memory, but it ran out; try --vae-tiling")
    renderer.failing["sparse", PROMPTS[1]] = error
    recorder = Recorder()
    with pytest.raises(OutOfMemoryError, match="try --vae-tiling"):
        evaluate(output_dir=tmp_path, listener=recorder)
    assert recorder.named("on_failure") == [error]
    assert not recorder.named("on_end")
    assert not list(tmp_path.glob("*.json"))
    assert renderer.handle is not None
    assert renderer.handle.removed


def test_events_come_in_order(evaluate: Evaluate) -> None:
    recorder = Recorder()
    result = evaluate(listener=Listeners([recorder]), prompts=PROMPTS[:2])
    names = [name for name, _ in recorder.events if name != "on_step"]
    assert names == ["on_start", *(["on_prompt_start", "on_prompt"] * 2), "on_end"]
    (started,), (ended,) = recorder.named("on_start"), recorder.named("on_end")
    assert (started.prompts, started.num_steps, started.renderings) == (PROMPTS[:2], 4, ("dense", "sparse"))
    assert len(recorder.named("on_step")) == 2 * 2 * 4
    assert ended.result is result
    assert (ended.result_path, ended.artifacts) == (None, ())
    assert [event.result.metrics["psnr"] for event in recorder.named("on_prompt")] == [
        row.psnr for row in result.detailed_results
    ]


def test_the_ladder_renders_two_more_and_blames_the_policy(
    evaluate: Evaluate, renderer: FakeRenderer, tmp_path: Path
) -> None:
    recorder = Recorder()
    result = evaluate(ladder=True, listener=recorder, output_dir=tmp_path)
    assert [kind for kind, _ in renderer.rendered[:4]] == ["dense", "sparse", "dense", "kernel"]
    ladder = result.detailed_results[0].ladder
    assert ladder is not None
    assert ladder["dense_again"]["psnr"] == 100.0
    assert result.detailed_results[0].psnr is not None
    assert ladder["kernel"]["psnr"] > result.detailed_results[0].psnr
    assert {event.side for event in recorder.named("on_step")} == {"dense", "sparse", "dense_again", "kernel"}
    assert "## Error sources" in (tmp_path / "report.md").read_text()
    assert renderer.handle is not None
    assert renderer.handle.policy == POLICY


def test_yardsticks_place_the_policy(evaluate: Evaluate, tmp_path: Path) -> None:
    """The fake's dense video is the same for any number of steps, and noise for another seed."""
    recorder = Recorder()
    result = evaluate(yardsticks=("seed", "steps=9"), listener=recorder, output_dir=tmp_path)
    assert result.config.yardsticks == ("seed", "steps=9")
    for row in result.detailed_results:
        assert row.yardsticks["steps=9"].dense["psnr"] == 100.0
        assert row.yardsticks["steps=9"].sparse["psnr"] == row.psnr
        assert row.psnr is not None and row.yardsticks["seed"].dense["psnr"] < row.psnr
    assert {event.num_steps for event in recorder.named("on_step") if event.side == "yardstick"} == {4, 9}
    found = placed(result)
    assert [one.name for one in found] == ["steps=9", "policy", "seed"]
    policy, seed = (f"{one.metrics['psnr']:.2f} dB" for one in found[1:])
    text = f"the policy changes the dense video ({policy}) less than another seed ({seed})"
    text += " and more than 9 steps (100.00 dB)"
    assert place_text(found) == text
    report = (tmp_path / "report.md").read_text()
    assert f"T{text[1:]}." in report and "| 9 steps | 100.00 |" in report
    assert placed(evaluate()) == ()


def test_a_yardstick_that_cannot_be_rendered_costs_no_numbers(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: object) -> NoReturn:
        raise GenerationError("needs all weights in memory")

    monkeypatch.setitem(VARIANTS, "fp8", failing)
    row = evaluate(yardsticks=("fp8",)).detailed_results[0]
    assert row.psnr is not None and row.yardsticks == {}
    assert row.unavailable["yardstick fp8"] == "needs all weights in memory"


def test_a_ladder_that_cannot_be_climbed_costs_no_numbers(
    evaluate: Evaluate, renderer: FakeRenderer, caplog: pytest.LogCaptureFixture
) -> None:
    renderer.failing["kernel", PROMPTS[0]] = GenerationError("all are black")
    with caplog.at_level(logging.WARNING):
        result = evaluate(ladder=True)
    assert result.detailed_results[0].ladder is None
    assert result.detailed_results[0].psnr is not None
    assert "no attribution ladder for 'a red circle': all are black" in caplog.text


def test_a_users_metric_is_in_the_result(evaluate: Evaluate, tmp_path: Path) -> None:
    @metrics.metric(higher_is_better=False, unit="levels", name="brightness_shift_of_this_test")
    def brightness_shift(dense: Any, sparse: Any) -> float:
        return abs(float(dense.mean()) - float(sparse.mean())) / 255

    result = evaluate(output_dir=tmp_path)
    assert "brightness_shift_of_this_test" in result.statistics
    assert "brightness_shift_of_this_test" in result.to_dict()["detailed_results"][0]
    assert "brightness_shift_of_this_test" in (tmp_path / "report.md").read_text()
    assert load_result(tmp_path).statistics == result.statistics
    spread = result.statistics["brightness_shift_of_this_test"]
    assert (spread.unit, spread.higher_is_better) == ("levels", False)


def test_the_default_metrics_are_all_that_need_no_download() -> None:
    default = inspect.signature(run.evaluate).parameters["metrics"].default
    assert set(default) == set(metrics.names()) - {"lpips"}


def test_a_metric_that_cannot_be_taken_is_said_and_fails_nothing(evaluate: Evaluate, tmp_path: Path) -> None:
    result = evaluate(metrics=("ms_ssim", "vmaf", "ssim"), output_dir=tmp_path)
    assert set(result.statistics) == {*metrics.BASE_METRICS, "ssim"}
    assert set(result.detailed_results[0].unavailable) == {"ms_ssim", "vmaf"}
    assert "vmaf could not be computed: vmaf needs frames of at least 32x32" in (tmp_path / "report.md").read_text()


def test_stills_and_videos_of_an_earlier_evaluation_go(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(output_dir=tmp_path, save_videos=True)
    mine = tmp_path / "videos" / "prompt_0_mine.mp4"
    mine.write_bytes(b"")
    evaluate(output_dir=tmp_path, save_videos=True, prompts=PROMPTS[:1])
    names = {path.name for path in (tmp_path / "videos").iterdir()}
    assert names == {"prompt_0_dense.mp4", "prompt_0_sparse.mp4", "prompt_0_compare.mp4", mine.name}
    assert len(list((tmp_path / "stills").iterdir())) == 1
    evaluate(output_dir=tmp_path, prompts=PROMPTS[:1])
    assert {path.name for path in (tmp_path / "videos").iterdir()} == names


def test_a_full_disk_leaves_the_earlier_result_whole(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(output_dir=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as patch,
        pytest.raises(SparsetuneError, match=r"cannot write .*No space left"),
    ):
        patch.setattr("os.fsync", full)
        evaluate(output_dir=tmp_path, seed=7)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before
    assert not list(tmp_path.rglob(".*"))


def test_a_metric_called_as_a_field_is_refused(evaluate: Evaluate) -> None:
    metrics.metric(higher_is_better=False, name="sparsity_active")(lambda dense, sparse: 0.0)
    with pytest.raises(MetricError, match="metric name 'sparsity_active' is a field of the result"):
        evaluate()


def test_an_unknown_metric_is_refused_before_anything_is_rendered(evaluate: Evaluate, renderer: FakeRenderer) -> None:
    with pytest.raises(MetricError, match="unknown metric 'psnrr'; choose from psnr"):
        evaluate(metrics=("psnrr",))
    assert renderer.rendered == []


def test_metrics_that_the_gate_needs_are_computed(evaluate: Evaluate) -> None:
    result = evaluate(gate=Gate(min_psnr_frame=10.0))
    assert "psnr_frame_min" in result.statistics


def test_no_prompts_are_refused(evaluate: Evaluate) -> None:
    with pytest.raises(PromptError, match="at least one prompt"):
        evaluate(prompts=())


def test_an_unwritable_folder_is_found_before_anything_is_rendered(
    evaluate: Evaluate, renderer: FakeRenderer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SparsetuneError, match="cannot write"):
        evaluate(output_dir=tmp_path / "file" / "out")
    assert renderer.rendered == []


def test_an_overlap_with_the_tune_set_is_said(evaluate: Evaluate, tmp_path: Path) -> None:
    result = evaluate(tune_prompts=(PROMPTS[2], "another"), output_dir=tmp_path)
    assert result.config.prompts_in_tune_set == (PROMPTS[2],)
    assert "1 of 3 prompts are also in the tune set" in (tmp_path / "report.md").read_text()


def test_the_default_thresholds_were_not_tuned_on_anything(evaluate: Evaluate) -> None:
    result = evaluate(None, tune_prompts=PROMPTS)
    assert (result.config.use_tuned, result.config.prompts_in_tune_set) == (False, ())


def test_why_that_kernel_and_by_which_table_is_in_the_result(evaluate: Evaluate) -> None:
    result = evaluate(break_even=Path("results/break-even.json"))
    assert result.environment.backend_reason.startswith("auto; not sparge: the model is on cpu")
    assert result.config.break_even == "results/break-even.json"
    assert evaluate().config.break_even is None


def test_the_ladder_s_rungs_run_every_layer_on_the_kernel(evaluate: Evaluate, renderer: FakeRenderer) -> None:
    seen = []
    render = renderer.render

    def watched(*args, **kwargs):
        seen.append((renderer.handle.kind, renderer.handle.break_even))
        return render(*args, **kwargs)

    renderer.render = watched
    table = Path("break-even.json")
    evaluate(prompts=("a red circle",), ladder=True, break_even=table)
    assert seen == [("dense", None), ("sparse", table.absolute()), ("dense", None), ("kernel", None)]
