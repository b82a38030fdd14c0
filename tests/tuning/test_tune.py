"""A complete search on the demo model, small enough for the default test run."""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sparsetune.api import TunedCheckpoint
from sparsetune.attention import backends
from sparsetune.attention.policy import Policy
from sparsetune.attention.step_cache import StepCache
from sparsetune.bench.step_time import StepTime, StepTimes
from sparsetune.checkpoint import load_checkpoint, save_checkpoint
from sparsetune.checkpoint.export import export
from sparsetune.cli.tune import tuning_text
from sparsetune.config import Config
from sparsetune.errors import ConfigError, ExecutorError, TuningError
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.tasks import TimeStep
from sparsetune.executor import StepDone
from sparsetune.models.generation import Renderer
from sparsetune.models.pipelines import demo_config
from sparsetune.tuning import tune
from sparsetune.tuning.calibration.attention_tap import sample_steps
from sparsetune.tuning.calibration.bounded_policy import DENSE
from sparsetune.tuning.context import open_context
from sparsetune.tuning.events import StudyStarted, TrialPrompt, TrialResult, TuningListener, TuningResult, Validation
from sparsetune.tuning.record import load_record
from sparsetune.tuning.tune import slower_at_the_gate


def config(tmp_path: Path, **overrides) -> Config:
    small = {
        "generation.num_frames": 9,
        "generation.num_inference_steps": 3,
        "tune.n_trials": 2,
        "tune.num_prompts": 1,
        "tune.validation_prompts": 0,
        "tune.calibration_steps": 2,
        "tune.orders": ("raster", "tiles"),
        "tune.caches": ("none",),
        "tune.granularity": "global",
        "tune.max_minutes": None,
        "eval.num_prompts": 1,
        "eval.save_videos": False,
        "gate.min_psnr": 20.0,
        "gate.min_frame_cosine": 0.5,
        "gate.min_psnr_worst": None,
        "tracking.root": tmp_path / "mlruns",
        "cache.dir": tmp_path / "cache",
    }
    given = small | {key.replace("__", "."): value for key, value in overrides.items()}
    return demo_config({key: value for key, value in given.items() if value is not None or small.get(key) is None})


class Recorder(TuningListener):
    def __init__(self) -> None:
        self.names: list[str] = []
        self.started: StudyStarted | None = None

    def on_study_start(self, event: StudyStarted) -> None:
        self.started = event
        self.names.append("start")

    def on_step(self, event: StepDone) -> None:
        if event.phase in ("calibration", "sensitivity"):
            self.names.append(event.phase)

    def on_prompt(self, event: TrialPrompt) -> None:
        self.names.append("prompt")

    def on_validation(self, validation: Validation) -> None:
        self.names.append("validation")

    def on_study_end(self, result: TuningResult) -> None:
        self.names.append("end")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder, TuningResult]:
    folder = tmp_path_factory.mktemp("tune")
    recorder = Recorder()
    settings = config(folder, tune__validation_prompts=1)
    return folder, recorder, tune(settings, output_dir=folder / "results", listeners=(recorder,))


@pytest.fixture
def calibrated(first: tuple[Path, Recorder, TuningResult], tmp_path: Path) -> Path:
    """A folder with the calibration, the sensitivity and the dense baselines that `first` left in its own."""
    for name in ("mlruns/calibrations", "cache"):
        shutil.copytree(first[0] / name, tmp_path / name)
    return tmp_path


def test_the_winner_is_a_checkpoint_that_was_judged_on_eval_prompts(first) -> None:
    folder, _, result = first
    assert result.best is not None and result.evaluation is not None
    saved = load_checkpoint(folder / "results" / "checkpoint")
    assert saved.policy == result.best.policy
    assert saved.manifest.tuner == "optuna"
    assert saved.manifest.metrics["sparsity"] == result.best.sparsity
    assert saved.manifest.tuner_settings["trial"] == result.best.number
    assert result.evaluation.config.prompts_in_tune_set == ()
    assert result.evaluation.config.use_tuned
    assert (folder / "results" / "evaluation" / "cogvideo_accuracy_tuned.json").is_file()


def test_the_winner_s_checkpoint_has_a_dial(first) -> None:
    folder = first[0]
    saved = TunedCheckpoint.of(load_checkpoint(folder / "results" / "checkpoint"))
    changed = saved.with_sparsity(0.25)
    assert changed.prediction.sparsity == pytest.approx(0.25, abs=0.02) and changed.policy != saved.policy
    moved = load_checkpoint(save_checkpoint(changed, folder / "moved"))
    assert (moved.policy, moved.dial) == (changed.policy, saved.dial)
    save_checkpoint(replace(changed, dial=None), folder / "moved")
    assert load_checkpoint(folder / "moved").dial is None


def test_the_defaults_are_judged_beside_the_winner(first) -> None:
    folder, _, result = first
    assert result.before is not None and result.comparison is not None
    assert not result.before.config.use_tuned
    assert result.comparison.after.sparsity == result.evaluation.sparsity.overall
    assert result.comparison.before.sparsity == result.before.sparsity.overall
    assert (folder / "results" / "before" / "cogvideo_accuracy_default.json").is_file()


def test_listeners_are_told_in_order(first) -> None:
    _, recorder, result = first
    assert recorder.started.n_trials == 2
    assert recorder.names[:4] == ["start"] + ["calibration"] * 3
    assert recorder.names[4:13] == ["sensitivity"] * 9  # three steps, each alone, in three steps
    assert recorder.names[-1] == "end"
    assert recorder.names.count("prompt") == 2
    assert [trial.number for trial in result.trials] == [0, 1]


def test_calibration_left_the_dense_baselines_in_the_cache(first) -> None:
    folder, _, _ = first
    assert len(BaselineCache(folder / "cache", 1.0).ls()) == 3  # one tune, one validation and one eval prompt


def test_the_winner_was_rendered_on_the_validation_prompt(first) -> None:
    folder, recorder, result = first
    assert [one.num_prompts for one in result.validations] == [1] * len(result.validations)
    assert result.best.number in [one.number for one in result.validations]
    recorded = load_record(folder / "results" / "tuning.json")
    assert [(one.number, one.psnr, one.feasible) for one in recorded.validations] == [
        (one.number, one.psnr, one.feasible) for one in result.validations
    ]
    assert recorded.seconds_by_phase["validation"] > 0.0
    assert recorder.names.count("validation") == len(result.validations)


def test_the_same_command_goes_on_and_calibrates_only_once(first) -> None:
    folder, _, _ = first
    recorder = Recorder()
    result = tune(config(folder, tune__n_trials=3), output_dir=folder / "again", listeners=(recorder,))
    assert recorder.started.num_done == 2
    earlier = [(trial.number, trial.sparsity, trial.feasible) for trial in recorder.started.study.earlier()][:2]
    assert earlier == [(trial.number, trial.sparsity, trial.feasible) for trial in result.trials[:2]]
    assert "calibration" not in recorder.names and "sensitivity" not in recorder.names
    assert [trial.number for trial in result.trials] == [0, 1, 2]


def test_a_gate_that_nothing_meets_gives_the_closest_and_no_checkpoint(first) -> None:
    folder, _, _ = first
    result = tune(config(folder, gate__min_psnr=99.9), output_dir=folder / "strict")
    assert result.best is None and result.checkpoint_path is None
    assert result.closest is not None
    complete = [trial for trial in result.trials if trial.state == "complete" and trial.sparsity]
    assert result.closest.psnr == max(trial.psnr for trial in complete)
    assert not (folder / "strict" / "checkpoint").exists()


def test_the_margin_is_asked_of_trials_and_not_of_the_winner(first) -> None:
    folder, _, result = first
    assert result.evaluation.gate.conditions[1].bound == 20.0
    strict = tune(config(folder, tune__margin_db=79.9), output_dir=folder / "margin")
    assert strict.best is None


@pytest.mark.parametrize("granularity", ["served", pytest.param("uniform", marks=pytest.mark.slow)])
def test_what_serving_engines_take_is_searched_and_what_thresholds_for_each_head_gain_is_told(
    first, tmp_path: Path, granularity: str
) -> None:
    shutil.copytree(first[0] / "cache", tmp_path / "cache")
    served = dict.fromkeys(("tune.orders", "tune.caches")) | {"tune.probe_prompts": 0}
    settings = config(tmp_path, **{"tune.granularity": granularity, "tune.schedule": granularity == "served"} | served)
    result = tune(settings, output_dir=tmp_path / "results")
    best, gain = result.best, result.per_head
    assert best is not None and gain is not None
    sparse = {head for layer in best.policy.layers for head in layer.heads if head.is_sparse}
    assert len(sparse) == 1 and sparse.pop().topk is not None
    assert best.policy.order_names == ("raster",) and not best.policy.keep_text and not best.policy.select_partial
    assert best.params.keys() >= ({"dense_last", "dense_fraction"} if granularity == "served" else {"l1"})
    assert "steepness" not in best.params
    assert gain.sparsity == pytest.approx(best.sparsity, abs=0.05) and gain.per_head_sparsity > gain.sparsity
    assert load_record(result.record_path).per_head.per_head_sparsity == gain.per_head_sparsity
    assert f"instead of {gain.sparsity:.3f}" in tuning_text(result)
    if granularity == "uniform":
        exported = export(load_checkpoint(result.checkpoint_path), "sglang")
        assert exported.lost == () and 0.0 < json.loads(exported.text)["attention_backend_config"]["topk"] < 1.0


def test_builtin_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"needs SpargeAttn's package and a CUDA GPU, but .*not installed"):
        tune(config(tmp_path, tune__tuner="builtin"), output_dir=tmp_path)


def test_builtin_stays_in_this_process(tmp_path: Path) -> None:
    with pytest.raises(
        ExecutorError, match="must have the model in this process, but --engine is ray; use --engine local"
    ):
        open_context(config(tmp_path, tune__tuner="builtin", engine__name="ray"), tmp_path)


def test_no_time_is_no_trial_and_nothing_is_lost(tmp_path: Path) -> None:
    result = tune(config(tmp_path, tune__max_minutes=1e-6), output_dir=tmp_path / "results")
    assert result.trials == () and result.best is None


def test_the_dense_backend_cant_be_tuned(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="must have a backend that can run sparse, but backend is dense"):
        tune(config(tmp_path, backend="dense"), output_dir=tmp_path)


@pytest.mark.parametrize(
    ("num_steps", "samples", "steps"),
    [(10, 1, (5,)), (10, 2, (0, 9)), (10, 4, (0, 3, 6, 9)), (3, 6, (0, 1, 2)), (50, 6, (0, 10, 20, 29, 39, 49))],
)
def test_sampled_steps_spread_over_the_schedule(num_steps: int, samples: int, steps: tuple[int, ...]) -> None:
    assert sample_steps(num_steps, samples) == steps


def timed_step(sparse_ms: float) -> StepTimes:
    """Dense attention of each of 8 layers takes 10 ms, sparse `sparse_ms` at sparsity 0 and half at 1; the rest 20."""

    def row(name: str, ms: float, sparsity: float = 0.0) -> StepTime:
        return StepTime(name, ms, ms, ms, None, sparsity)

    sparse = tuple(row("sparse", 20.0 + 8 * sparse_ms * (1 - s / 2), s) for s in (0.3, 0.6, 0.8))
    return StepTimes(row("dense", 100.0), sparse, sparse[0], row("without", 20.0), row("after", 100.0), {}, 8)


@pytest.fixture
def slower_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that a step's times promise to be worth it, and that is slower than dense when it renders."""
    monkeypatch.setattr(backends, "_SKIP_WORK", {"reference"})
    monkeypatch.setattr(TimeStep, "run", lambda *_: timed_step(10.0))
    monkeypatch.setattr(Renderer, "step_seconds", lambda *_, **__: 1e-3)  # a dense step, on any machine


def test_where_no_sparsity_can_be_faster_the_tuning_says_so_before_it_renders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_SKIP_WORK", {"reference"})
    monkeypatch.setattr(TimeStep, "run", lambda *_: timed_step(40.0))
    recorder = Recorder()
    result = tune(config(tmp_path), output_dir=tmp_path / "results", listeners=(recorder,))
    assert recorder.names == ["start", "end"]
    assert recorder.started is not None and recorder.started.goal == "speed"
    assert result.best is None and result.trials == ()
    assert result.dense_because == (
        "attention is 80% of a dense step of 100 ms, which limits the speed-up to 5.00x; even at sparsity 0.9 the "
        "reference kernel takes 22 ms a layer, dense attention 10 ms: these sequences are too short"
    )
    record = load_record(tmp_path / "results" / "tuning.json")
    assert record.dense_because == result.dense_because
    assert record.step is not None and record.step.pairs == pytest.approx(0.02)


def test_a_step_that_is_as_fast_without_attention_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launching the kernels of a short step takes longer than running them."""
    measured = timed_step(40.0)
    monkeypatch.setattr(backends, "_SKIP_WORK", {"reference"})
    monkeypatch.setattr(TimeStep, "run", lambda *_: dataclasses.replace(measured, dense=measured.without))
    result = tune(config(tmp_path), output_dir=tmp_path / "results")
    assert result.best is None
    assert result.dense_because is not None and result.dense_because.startswith("attention is 0% of a dense step of 20")
    assert "takes 22 ms a layer, dense attention 0 ms" in result.dense_because


@pytest.mark.slow
def test_a_policy_that_is_measured_slower_than_dense_is_no_winner(calibrated: Path, slower_kernel: None) -> None:
    """Whatever a step's times promised."""
    result = tune(config(calibrated, tune__n_trials=3), output_dir=calibrated / "results")
    assert result.best is None and not (calibrated / "results" / "checkpoint").exists()
    assert any(trial.feasible for trial in result.trials)
    for trial in result.trials:
        assert trial.seconds_dense and trial.seconds_sparse and trial.speedup is not None and trial.speedup < 1
    assert all(trial.predicted_seconds for trial in result.trials)
    assert result.insight is not None and result.insight.seconds_error is not None
    assert result.dense_because is not None and "times as fast as dense at sparsity" in result.dense_because
    assert (
        "which limits the speed-up to 5.00x, and reference is faster than dense from sparsity" in result.dense_because
    )


@pytest.mark.slow
def test_what_a_step_costs_is_the_study_s_so_that_a_later_run_means_the_same_policies(
    calibrated: Path, slower_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tune(config(calibrated, tune__n_trials=3), output_dir=calibrated / "results")
    shutil.rmtree(calibrated / "mlruns" / "calibrations" / "steps")
    monkeypatch.setattr(TimeStep, "run", lambda *_: timed_step(3.0))  # as if measured on another day
    again = tune(config(calibrated, tune__n_trials=3), output_dir=calibrated / "results")
    assert again.step == first.step
    assert [trial.policy for trial in again.trials] == [trial.policy for trial in first.trials]


@pytest.mark.slow
def test_the_one_policy_of_calibrate_is_no_winner_where_it_is_slower_than_dense(
    calibrated: Path, slower_kernel: None
) -> None:
    result = tune(config(calibrated, tune__tuner="calibrate"), output_dir=calibrated / "results")
    assert result.best is None and len(result.trials) == 1
    assert result.dense_because is not None and "the fastest, trial 0, is 0." in result.dense_because


def test_a_model_whose_calls_all_fall_back_is_refused_by_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_SKIP_WORK", {"reference"})
    dense = dataclasses.replace(timed_step(10.0), fallbacks={"fewer than 128 tokens": 24})
    rows = tuple(dataclasses.replace(row, sparsity=0.0) for row in dense.sparse)
    monkeypatch.setattr(TimeStep, "run", lambda *_: dataclasses.replace(dense, sparse=rows))
    with pytest.raises(TuningError, match="none of its attention calls can run sparse: fewer than 128 tokens"):
        tune(config(tmp_path), output_dir=tmp_path / "results")


def test_caches_that_are_not_shown_to_be_faster_are_told_with_the_noise() -> None:
    """Two prompts timed while the machine did other work; their videos meet the gate."""
    cached = dataclasses.replace(
        Policy.uniform([("layer", 1)], DENSE["cdf"]), cache=StepCache("taylorseer", max_skips=1)
    )
    timed = TrialResult(
        3, {}, "complete", None, cached, (), 0.0, 40.0, 39.0, 0.99, True, 1.0, seconds_sparse=2.0, seconds_dense=3.0,
        seconds_noise=0.4, blocks_run=0.6,
    )  # fmt: skip
    assert not timed.is_faster
    assert slower_at_the_gate(None, (timed,), None) == (
        "the fastest, trial 3, is 1.50 times as fast as dense, within twice the timing's noise of 40%; if other work "
        "ran here, run it again without"
    )
    assert slower_at_the_gate(None, (dataclasses.replace(timed, feasible=False),), None) is None


@pytest.mark.slow
def test_caches_are_searched_by_seconds_on_a_cpu_and_nothing_is_calibrated(tmp_path: Path) -> None:
    recorder = Recorder()
    settings = config(
        tmp_path, tune__n_trials=4, tune__caches=("taylorseer", "mag"), generation__num_inference_steps=8,
        gate__min_psnr=10.0, tune__margin_db=0.0,
    )  # fmt: skip
    result = tune(settings, output_dir=tmp_path / "results", listeners=(recorder,))
    assert result.calibration_path is None
    assert "calibration" not in recorder.names
    assert recorder.started is not None and recorder.started.goal == "speed"
    assert all(trial.policy.is_dense and trial.blocks_run < 1.0 for trial in result.trials)
    assert all(trial.seconds_dense is not None for trial in result.trials)
    best, evaluation = result.best, result.evaluation
    assert best is not None and evaluation is not None and result.checkpoint_path is not None
    assert load_checkpoint(result.checkpoint_path).policy == best.policy
    assert evaluation.config.policy.cache == str(best.policy.cache)
    assert evaluation.seconds is not None
    assert evaluation.sparsity.overall == 0.0
    assert evaluation.sparsity.blocks_run == evaluation.sparsity.attention_computed == pytest.approx(best.blocks_run)
    record = load_record(tmp_path / "results" / "tuning.json")
    assert [trial.blocks_run for trial in record.trials] == [trial.blocks_run for trial in result.trials]
    again = tune(settings, output_dir=tmp_path / "results")
    assert [trial.policy for trial in again.trials] == [trial.policy for trial in result.trials]


@pytest.mark.parametrize(
    ("caches", "others", "message"),
    [
        (("auto", "mag"), {}, "must be none, auto, or names of caches"),
        (("mag",), {"tune__tuner": "calibrate"}, "only --tuner optuna searches caches"),
        (("mag",), {"tune__objective": "sparsity"}, "caches save seconds, not block pairs"),
        (("pab",), {}, "pab"),
    ],
)
def test_caches_that_make_no_sense_are_refused(tmp_path: Path, caches, others, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, tune__caches=caches, **others)
