"""`tune` and `evaluate` from Python: their keywords, what they return, and progress in a notebook."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from rich.console import Console

import sparsetune
from sparsetune.cli.console import Log
from sparsetune.cli.progress import ProgressDisplay
from sparsetune.errors import ConfigError, ExecutorError, ModelError, ResultError, SparsetuneError
from sparsetune.models.demo import WEIGHTS
from sparsetune.notebook import Tuning
from sparsetune.tuning import TuningListener
from sparsetune.tuning.record import load_record

SMALL: dict[str, Any] = {"num_frames": 9, "num_inference_steps": 3, "num_prompts": 1, "tracking__enabled": False}
SEARCH = {
    "n_trials": 2, "calibration_steps": 2, "orders": ("raster",), "caches": "none", "granularity": "global",
    "eval__num_prompts": 1, "min_psnr": 20.0, "min_psnr_worst": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> Any:
    return DiffusionPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)


@pytest.fixture(scope="module")
def tuning(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    """A tuning of a pipeline that its user loaded."""
    folder = tmp_path_factory.mktemp("tuning")
    return sparsetune.tune(pipe, output_dir=folder, progress=False, cache__dir=folder / "cache", **SMALL, **SEARCH)


def test_a_loaded_pipeline_is_tuned_and_evaluated_and_left_as_it_was(pipe: Any, tuning: Tuning, tmp_path: Path) -> None:
    assert tuning.best is not None and tuning.evaluation is not None and tuning.checkpoint_path is not None
    forwards = {name: module.forward for name, module in pipe.transformer.named_modules()}
    result = sparsetune.evaluate(
        pipe, tuning.checkpoint_path, output_dir=tmp_path, progress=False, save_videos=False, **SMALL
    )
    assert result.statistics["psnr"] == tuning.evaluation.statistics["psnr"]
    assert {name: module.forward for name, module in pipe.transformer.named_modules()} == forwards
    assert "disable" not in getattr(pipe, "_progress_bar_config", {})
    with pytest.raises(ResultError, match="prompt 1 has no video; evaluate with save_videos=True"):
        result.show(1)


def test_weights_in_memory_identify_a_pipeline(pipe: Any, tuning: Tuning) -> None:
    from sparsetune.models.loading import loaded_model

    manifest = sparsetune.load_checkpoint(str(tuning.checkpoint_path)).manifest
    assert (manifest.base_model, manifest.base_source) == ("demo", "demo")
    assert loaded_model(pipe, "demo", "demo").identity.fingerprint == manifest.base_fingerprint
    changed = DiffusionPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)
    next(changed.transformer.parameters()).data.mul_(1.01)
    assert loaded_model(changed, "demo", "demo").identity.fingerprint != manifest.base_fingerprint
    changed.vae.to("meta")
    with pytest.raises(ModelError, match="vae has weights that aren't in memory"):
        loaded_model(changed, "demo", "demo")


def test_results_are_short_texts_and_tables(tuning: Tuning) -> None:
    record = load_record(tuning.record_path) if tuning.record_path else None
    for value in (tuning, tuning.evaluation, tuning.before, tuning.best, tuning.comparison, record):
        assert 40 < len(repr(value)) < 500, type(value)
    assert "gate: passed" in repr(tuning) and "psnr: " in str(tuning.evaluation)
    for shown in (tuning, tuning.evaluation):
        assert shown is not None
        assert "<th>sparsity</th>" in shown._repr_html_() and "<th>gate</th><td>passed</td>" in shown._repr_html_()


def test_results_draw_the_report_s_charts(tuning: Tuning) -> None:
    assert tuning.plot()._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    assert tuning.evaluation is not None
    assert tuning.evaluation.plot().axes[0].get_title(loc="left") == "Sparsity by layer and denoising step"
    with pytest.raises(ResultError, match=r"there is no chart x; use one of frame_psnr, .*pareto_front"):
        tuning.plot("x")


def test_a_prompt_s_video_is_shown_by_number_or_text(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.evaluation is not None
    path = tuning.show(1)
    assert path.name == "prompt_0_compare.mp4" and path.is_file()
    assert tuning.show() == tuning.show(tuning.evaluation.detailed_results[0].prompt) == path
    with pytest.raises(ResultError, match="prompt must be the text of a prompt or 1 to 1, got 2"):
        tuning.show(2)
    display = SimpleNamespace(Video=lambda path, embed: ("player", path, embed))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=object, display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    assert tuning.show(1) == ("player", str(path), True)


WRONG: list[tuple[Callable[[], object], type[SparsetuneError], str]] = [
    (lambda: sparsetune.tune(3), ConfigError, "model must be a name, a folder, a Config or a pipeline, got int"),
    (lambda: sparsetune.tune("dmo"), ModelError, "unknown model dmo; did you mean demo?"),
    (lambda: sparsetune.tune(n_trails=3), ConfigError, "unknown setting n_trails; did you mean n_trials?"),
    (lambda: sparsetune.tune(n_trials="many"), ConfigError, "tune.n_trials must be a valid integer"),
    (lambda: sparsetune.tune(name="x"), ConfigError, "several sections; use model__name or engine__name"),
    (lambda: sparsetune.tune(sparsetune.resolve("demo"), n_trials=3), ConfigError, "n_trials can't be given beside"),
    (lambda: sparsetune.tune(output_dir=3), ConfigError, "output_dir must be a path, got int"),
    (lambda: sparsetune.tune(listeners=[print]), ConfigError, "list of TuningListeners, got builtin_function"),
    (lambda: sparsetune.evaluate(listeners=[TuningListener()]), ConfigError, "list of EvaluationListeners, got Tuning"),
    (lambda: sparsetune.evaluate("demo", 4), ConfigError, "checkpoint must be a path, URI, run id or Checkpoint"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_a_wrong_argument_fails_at_once_with_a_sentence(
    call: Callable[[], object], error: type[SparsetuneError], message: str
) -> None:
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_settings_of_loading_and_ray_don_t_fit_a_loaded_pipeline(pipe: Any) -> None:
    with pytest.raises(ConfigError, match="is how a model is loaded, but this pipeline is loaded"):
        sparsetune.tune(pipe, dtype="float16")
    with pytest.raises(ExecutorError, match="a pipeline in memory can't be sent to Ray's workers"):
        sparsetune.evaluate(pipe, engine__name="ray", progress=False, **SMALL)


def test_a_notebook_s_progress_is_one_output_that_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def display(page: str, display_id: bool) -> SimpleNamespace:
        drawn.append(page)
        return SimpleNamespace(update=drawn.append)

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=str, display=display))
    console = Console(file=io.StringIO(), force_jupyter=True, width=100)
    shown = ProgressDisplay(Log("text"), "eval demo", {"evaluation": ""}, console)
    shown.start()
    shown.on_progress("evaluation", 3.0, 12.0)
    shown.refresh()
    assert "eval demo" in drawn[-1] and "25%" in drawn[-1] and drawn[-1].startswith("<pre>")
    shown.close()
    assert "eval demo" not in drawn[-1]
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
