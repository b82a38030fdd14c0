"""`tune` and `evaluate` for scripts and notebooks: with progress, and results that show themselves."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from sparsetune.checkpoint import Checkpoint
from sparsetune.cli.console import Log
from sparsetune.cli.evaluation_progress import EvaluationProgress
from sparsetune.cli.progress import ProgressDisplay
from sparsetune.cli.tuning_progress import TuningProgress
from sparsetune.config import Config, resolve
from sparsetune.config.files import find_model, nearest
from sparsetune.config.resolver import config_fields
from sparsetune.errors import ConfigError, ResultError
from sparsetune.evaluation.evaluate import evaluate_config
from sparsetune.evaluation.events import EvaluationListener
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.models.loading import LoadedModel, loaded_model, source_of
from sparsetune.report.build import check_extra, report_beside
from sparsetune.report.figures import figures
from sparsetune.report.pictures import draw
from sparsetune.report.source import Files, Source, from_folder, of_tuning
from sparsetune.report.words import words
from sparsetune.tracking import TrackingListener
from sparsetune.tracking.lookup import resolve_checkpoint
from sparsetune.tuning import tune as run_tuning
from sparsetune.tuning.events import TuningListener, TuningResult
from sparsetune.tuning.record import load_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Evaluation(EvaluationResult):
    """An `EvaluationResult` that notebooks show as a table, with its charts and videos."""

    _videos: Mapping[int, Path] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, result: EvaluationResult, folder: Path | None) -> "Evaluation":
        """Return the same result with these methods; `folder` has its videos."""
        found = cls.model_construct(**{name: getattr(result, name) for name in EvaluationResult.model_fields})
        found._videos = {} if folder is None else Files.of(folder).videos
        return found

    def plot(self, name: str = "sparsity_by_layer_and_step") -> "Figure":
        """Draw one of the report's charts, by default the sparsity by layer and step.

        ResultError where there is no chart of that name: the message lists those that there are.
        """
        return _chart(Source(self.config.short_name, self), name)

    def show(self, prompt: int | str | None = None) -> Any:
        """Show a prompt's side-by-side video: a player in a notebook, else the path of the mp4.

        Args:
            prompt: its number, from 1, or its text; None is the one with the lowest PSNR.

        Raises:
            ResultError: there is no such prompt, or its videos weren't saved.
        """
        rows = {row.index: row for row in self.detailed_results}
        if prompt is None:
            index = min(rows, key=lambda one: rows[one].psnr or 0.0)
        else:
            named = {row.prompt: row.index for row in rows.values()}
            index = prompt - 1 if isinstance(prompt, int) else named.get(prompt, -1)
        if index not in rows:
            raise ResultError(f"prompt must be the text of a prompt or 1 to {len(rows)}, got {prompt!r}")
        if index not in self._videos:
            raise ResultError(f"prompt {index + 1} has no video; evaluate with save_videos=True")
        return _player(self._videos[index])


class Tuning(TuningResult):
    """A `TuningResult` that notebooks show as a table, with its charts and videos."""

    @classmethod
    def of(cls, result: TuningResult, folder: Path, *, has_videos: bool) -> "Tuning":
        """Return the same result with these methods; `folder` is the tuning's."""
        sides = {"before": result.before, "evaluation": result.evaluation}
        shown = {
            name: side and Evaluation.of(side, folder / name if has_videos else None) for name, side in sides.items()
        }
        return cls(**{one.name: getattr(result, one.name) for one in fields(result)} | shown)

    def plot(self, name: str = "pareto_front") -> "Figure":
        """Draw one of the report's charts, by default PSNR over sparsity of all trials.

        ResultError where there is no chart of that name (the message lists those that there are), or no record.
        """
        if self.record_path is None:
            raise ResultError("this tuning has no record: another process of its study writes it")
        folder = self.record_path.parent
        record = load_record(self.record_path)
        return _chart(of_tuning(record, self.study_name, folder / "evaluation", folder / "before"), name)

    def show(self, prompt: int | str | None = None) -> Any:
        """Show a side-by-side video of the winner, as `Evaluation.show`; ResultError where there is no winner."""
        if not isinstance(self.evaluation, Evaluation):
            raise ResultError("this tuning has no winner, and so no videos")
        return self.evaluation.show(prompt)


def tune(
    model: Any = "demo",
    *,
    output_dir: Path | str | None = None,
    listeners: Sequence[TuningListener] = (),
    progress: bool = True,
    **settings: Any,
) -> Tuning:
    """Tune a model as `sparsetune tune` does, and record the runs in MLflow.

        result = tune("demo", n_trials=3, eval__num_prompts=2)
        result.plot()

    Args:
        model: a model as `--model` takes it, a configuration, or a diffusers pipeline that you loaded and placed. A
            pipeline is left without a policy; one that isn't packaged renders as `GenerationConfig` says, so give its
            num_frames, height, width and num_inference_steps.
        output_dir: gets the checkpoint and evaluations; None is results/MODEL.
        listeners: notified of every event, in order.
        progress: show it: live in terminals and notebooks, else in lines on stderr.
        settings: any settings by their names, e.g. n_trials=3; where several sections have one (`tune`'s own comes
            first), with the section: eval__num_prompts=2.

    Returns:
        All trials and the winner, as `sparsetune.tuning.tune.tune`; notebooks show a table.

    Raises:
        ConfigError: a setting is unknown (the nearest is named) or has a wrong type or value.
        PromptError, ModelError, BackendError, ExecutorError, TuningError, GenerationError: see their messages.
    """
    config, pipe = _config(model, "tune", settings)
    folder = _folder(output_dir) or config.model.results_folder
    _check_listeners(listeners, TuningListener)
    with contextlib.ExitStack() as stack:
        loaded = None if pipe is None else stack.enter_context(_loaded(pipe, config))
        shown: list[TuningListener] = []
        if progress:
            tuning = TuningProgress(Log("text"))
            stack.callback(tuning.display.close)
            shown.append(tuning)
        tracking = _tracking(config, listeners)
        result = run_tuning(config, output_dir=folder, listeners=(*shown, *listeners, *tracking), loaded=loaded)
    if config.tracking.report and result.record_path is not None:
        report_beside(lambda: from_folder(folder), folder)
    return Tuning.of(result, folder, has_videos=config.eval.save_videos)


def evaluate(
    model: Any = "demo",
    checkpoint: Checkpoint | Path | str | None = None,
    *,
    output_dir: Path | str | None = None,
    listeners: Sequence[EvaluationListener] = (),
    progress: bool = True,
    difference: bool = False,
    **settings: Any,
) -> Evaluation:
    """Evaluate a checkpoint, or SpargeAttn's default thresholds, as `sparsetune eval` does; recorded in MLflow.

        result = evaluate("demo", "results/demo/checkpoint", num_prompts=2)
        result.show(1)

    Args:
        model: as `tune` takes it.
        checkpoint: a checkpoint, or anything that `load_checkpoint` takes; None evaluates the default thresholds.
        output_dir: of all files; None is `eval.output_dir`, or else results/MODEL/eval.
        listeners: notified of every event, in order.
        progress: as of `tune`.
        difference: add a third pane with the amplified difference to side-by-side videos.
        settings: as of `tune`; `eval`'s own come first.

    Raises:
        ConfigError: as `tune` raises it.
        ModelError, CheckpointError: the model or checkpoint can't be loaded, or they don't fit.
        PromptError, MetricError, GenerationError, ExecutorError, BackendError, VideoError: see their messages.
    """
    config, pipe = _config(model, "eval", settings)
    folder = _folder(output_dir) or config.eval.output_dir or config.model.results_folder / "eval"
    _check_listeners(listeners, EvaluationListener)
    if not isinstance(checkpoint, Checkpoint | Path | str | None):
        raise ConfigError(f"checkpoint must be a path, URI, run id or Checkpoint, got {type(checkpoint).__name__}")
    if isinstance(checkpoint, str | Path):
        checkpoint = resolve_checkpoint(checkpoint, config)
    with contextlib.ExitStack() as stack:
        loaded = None if pipe is None else stack.enter_context(_loaded(pipe, config))
        shown: list[EvaluationListener] = []
        if progress:
            display = ProgressDisplay(Log("text"), f"eval {config.model.name}")
            stack.callback(display.close)
            shown.append(EvaluationProgress(display))
        followers = (*shown, *listeners, *_tracking(config, listeners))
        result = evaluate_config(config, checkpoint, folder, followers, difference=difference, loaded=loaded)
    if config.tracking.report:
        report_beside(lambda: Source(folder.name, result, files=Files.of(folder)), folder)
    return Evaluation.of(result, folder if config.eval.save_videos else None)


def _config(model: Any, section: str, settings: Mapping[str, Any]) -> tuple[Config, Any]:
    """Resolve the configuration of a call, with the pipeline where `model` is one."""
    if isinstance(model, Config):
        if settings:
            raise ConfigError(f"{next(iter(settings))} can't be given beside a Config; give it to `resolve`")
        return model, None
    flags = {_key(name, section): value for name, value in settings.items()}
    pipe = None
    if isinstance(model, str | Path):
        flags = {"model.source": find_model(str(model))} | flags
    elif hasattr(model, "components") and hasattr(model, "config"):
        if loading := [key for key in flags if key.startswith("model.") and key != "model.name"]:
            raise ConfigError(f"{loading[0]} is how a model is loaded, but this pipeline is loaded; leave it out")
        pipe, flags = model, {"model.source": source_of(model)} | flags
    else:
        raise ConfigError(f"model must be a name, a folder, a Config or a pipeline, got {type(model).__name__}")
    try:
        return resolve(flags=flags), pipe
    except ConfigError as error:
        raise ConfigError(str(error).replace(" (given as an option)", "")) from error


def _key(name: str, section: str) -> str:
    """Return a setting's dotted key, e.g. tune.n_trials for n_trials and eval.seed for eval__seed."""
    known = config_fields()
    key = name.replace("__", ".")
    own = [one for one in (key, f"{section}.{name}") if one in known]
    others = [one for one in known if one.rpartition(".")[2] == name]
    if own:
        return own[0]
    if len(others) > 1:
        raise ConfigError(f"{name} is a setting of several sections; use {' or '.join(others)}".replace(".", "__"))
    if not others:
        bare = {one.rpartition(".")[2]: one for one in known} | {one.replace(".", "__"): one for one in known}
        hint = nearest(name, bare)
        advice = f"did you mean {hint}?" if hint else "docs/settings.md lists them"
        raise ConfigError(f"unknown setting {name}; {advice}")
    return others[0]


def _folder(path: Any) -> Path | None:
    if not isinstance(path, str | Path | None):
        raise ConfigError(f"output_dir must be a path, got {type(path).__name__}")
    return None if path is None else Path(path).expanduser()


def _check_listeners(listeners: Any, kind: type) -> None:
    for listener in listeners if isinstance(listeners, list | tuple) else (listeners,):
        if not isinstance(listener, kind):
            raise ConfigError(f"listeners must be a list of {kind.__name__}s, got {type(listener).__name__}")


def _tracking(config: Config, listeners: Sequence[object]) -> tuple[TrackingListener, ...]:
    wanted = config.tracking.enabled and not any(isinstance(one, TrackingListener) for one in listeners)
    return (TrackingListener(config),) if wanted else ()


@contextlib.contextmanager
def _loaded(pipe: Any, config: Config) -> Iterator[LoadedModel]:
    """Describe a user's pipeline, and silence its own progress bar meanwhile."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield loaded_model(pipe, config.model.name, config.model.source)
    finally:
        pipe.set_progress_bar_config(**before)


def _chart(source: Source, name: str) -> "Figure":
    check_extra()
    found = {chart.name: chart for chart in figures(source, words("en"))}
    if name not in found:
        raise ResultError(f"there is no chart {name}; use one of {', '.join(found)}")
    return draw(found[name])


def _player(path: Path) -> Any:
    """Return a video as a notebook's player where there is one, else its path."""
    if "IPython" not in sys.modules or sys.modules["IPython"].get_ipython() is None:
        return path
    from IPython.display import Video  # type: ignore[import-not-found, unused-ignore]

    return Video(str(path), embed=True)
