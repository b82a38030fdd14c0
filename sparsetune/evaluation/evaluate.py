"""Evaluation of a policy: every prompt rendered dense and sparse, measured, written and reported."""

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.attention.policy import Policy, check_fits
from sparsetune.bench.step_time import StepTimes
from sparsetune.checkpoint import Checkpoint, load_checkpoint, summarize
from sparsetune.checkpoint.manifest import hash_prompts
from sparsetune.config import DEFAULT_METRICS
from sparsetune.errors import MetricError, PromptError
from sparsetune.evaluation.aggregate import gate_section, seconds_section, sparsity_section, statistics
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.conditions import config_section, environment_section
from sparsetune.evaluation.events import (
    EvaluationEnded,
    EvaluationListener,
    EvaluationStarted,
    Listeners,
    PromptDone,
    PromptStarted,
)
from sparsetune.evaluation.hand_set import Pair, measure_hand_set, nearest_to_mean
from sparsetune.evaluation.outputs import OutputFolder, worst_and_median
from sparsetune.evaluation.prompt import PromptResult, saves_seconds
from sparsetune.evaluation.report_markdown import report_markdown
from sparsetune.evaluation.result import (
    ConfigSection,
    EvaluationResult,
    HandSetSection,
    LayerSection,
    PromptRow,
    save_result,
)
from sparsetune.evaluation.reuse import reused
from sparsetune.evaluation.tasks import JudgedPrompt, JudgePrompt, ScorePrompt, TimeStep
from sparsetune.evaluation.videos import known_metrics
from sparsetune.executor import (
    Event,
    Executor,
    Incident,
    LocalExecutor,
    ModelSession,
    Side,
    Started,
    StepDone,
    open_executor,
    run_all,
    run_one,
)
from sparsetune.executor.session import DescribeSession
from sparsetune.files import write_text
from sparsetune.metrics import BASE_METRICS, Gate, load_metrics, score_prompts, verdict
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import LoadedModel
from sparsetune.models.prompts import AnyPrompt, as_prompt, load_prompts, texts
from sparsetune.models.runtime import RuntimeDescription
from sparsetune.models.sparsify import warn_of_other_settings

if TYPE_CHECKING:
    from sparsetune.config import Config

_LOG = logging.getLogger(__name__)


def evaluate_config(
    config: "Config",
    checkpoint: Checkpoint | Path | str | None = None,
    output_dir: Path | None = None,
    listeners: Sequence[EvaluationListener] = (),
    *,
    difference: bool = False,
    loaded: LoadedModel | None = None,
    reuse: Sequence[Path] = (),
) -> EvaluationResult:
    """Load the configured model and evaluate a checkpoint, or SpargeAttn's default thresholds.

    Args:
        config: the configuration.
        checkpoint: a checkpoint, or its folder or file; None evaluates the default thresholds.
        output_dir: of all files; None is `eval.output_dir`, or else results/MODEL/eval.
        listeners: notified of every event, in order.
        difference: add a third pane with the amplified difference to side-by-side videos.
        loaded: the model that the configuration describes; None loads it.
        reuse: as of `evaluate`; nothing is reused where there are metric modules, which may have changed.

    Raises:
        ModelError: the model can't be loaded; further errors as `evaluate` raises them.
    """
    load_metrics(config.eval.metric_modules, config.eval.lpips_weights)
    gate = Gate(**config.gate.bounds)
    _metric_names(config.eval.metrics, gate)  # fails before a large model is loaded
    prompts = load_prompts(config.eval.prompt_file, config.eval.num_prompts)
    loaded_checkpoint = load_checkpoint(checkpoint) if isinstance(checkpoint, Path | str) else checkpoint
    if loaded_checkpoint is not None:
        warn_of_other_settings(loaded_checkpoint.manifest, config.generation)
    with open_executor(config, loaded=loaded) as executor:
        found = run_one(executor, DescribeSession(config.backend, loaded_checkpoint)) if loaded_checkpoint else None
        return evaluate(
            executor,
            found.policy if found else None,
            prompts,
            seed=config.eval.seed,
            cache=BaselineCache(config.cache.folder.absolute(), config.cache.max_gb),
            metrics=config.eval.metrics,
            gate=gate,
            backend=config.backend,
            break_even=config.break_even,
            listener=Listeners(listeners),
            output_dir=output_dir or config.eval.output_dir or Path("results") / config.model.name / "eval",
            save_videos=config.eval.save_videos,
            difference=difference,
            checkpoint=str(checkpoint) if isinstance(checkpoint, Path | str) else None,
            tuner=loaded_checkpoint.manifest.tuner if loaded_checkpoint else None,
            ladder=config.eval.ladder,
            yardsticks=config.eval.yardsticks,
            prompt_file=config.eval.prompt_file,
            tune_prompts=_tune_prompts(config, prompts, loaded_checkpoint),
            reuse=() if config.eval.metric_modules else reuse,
            hand_set=[Pair(*pair) for pair in loaded_checkpoint.manifest.hand_set] if loaded_checkpoint else (),
        )


def evaluate(
    renderer: Renderer | Executor,
    policy: Policy | None,
    prompts: Sequence[AnyPrompt],
    *,
    cache: BaselineCache,
    seed: int = 42,
    metrics: Sequence[str] = DEFAULT_METRICS,
    gate: Gate | None = None,
    backend: str = "auto",
    break_even: Path | None = None,
    listener: EvaluationListener | None = None,
    output_dir: Path | None = None,
    save_videos: bool = False,
    difference: bool = False,
    tuned: bool | None = None,
    checkpoint: str | None = None,
    tuner: str | None = None,
    ladder: bool = False,
    yardsticks: Sequence[str] = (),
    prompt_file: Path | None = None,
    tune_prompts: Sequence[AnyPrompt] = (),
    hand_set: Sequence[Pair] = (),
    reuse: Sequence[Path] = (),
) -> EvaluationResult:
    """Evaluate a policy: render every prompt dense (or read it from the cache) and sparse with the same seed.

    Prompts whose frames are NaN or black are failed prompts in the result, without numbers.

    Args:
        renderer: a model with no policy installed, or an executor, whose workers have it.
        policy: None is SpargeAttn's default thresholds.
        prompts: texts, or `Prompt`s with an image, seed or negative prompt.
        cache: of dense videos.
        seed: of all renderings.
        metrics: names; `BASE_METRICS`, the gate's and a user's own (`own_names()`) are always computed.
        gate: None is the default gate.
        backend: `auto`, `sparge`, `flex`, `reference` or `dense`.
        break_even: table of `sparsetune bench`: layers whose sparsity wouldn't pay off run dense.
        listener: notified of every event.
        output_dir: of result, report, stills and videos; None writes nothing.
        save_videos: write dense, sparse and side-by-side videos.
        difference: add a third pane with the amplified difference to side-by-side videos.
        tuned: whether the result counts as tuned; None means when a policy is given.
        checkpoint: the policy's source, for the result.
        tuner: of the policy, for the result.
        ladder: also measure noise and kernel rounding: two more renderings per prompt.
        yardsticks: harmless changes to measure beside the policy: one more rendering each; see `EvalConfig.yardsticks`.
        prompt_file: the prompts' source, for the result.
        tune_prompts: prompts that the policy may have been tuned on; the result flags an overlap.
        hand_set: pairs of thresholds to compare the policy with, of one simthreshd1 and in order of sparsity: three
            more renderings of one prompt at most.
        reuse: folders of evaluations; one of the same policy, prompts, settings and versions is copied to `output_dir`
            and returned, and the listener isn't notified.

    Raises:
        PromptError, CheckpointError: there are no prompts, or the policy is for another model.
        MetricError: a metric is unknown or returned no finite number.
        GenerationError, ExecutorError: out of memory, or no worker is left.
        CacheError, BackendError, VideoError, SparsetuneError: the cache, kernel, encoder or folder can't be used.
    """
    started = time.perf_counter()
    if not prompts:
        raise PromptError("an evaluation needs at least one prompt")
    gate, listener = gate or Gate(), listener or EvaluationListener()
    names = _metric_names(metrics, gate)
    tuned = policy is not None if tuned is None else tuned
    table = None if break_even is None else break_even.absolute()  # workers have other working directories
    with _as_executor(renderer) as executor:
        described = run_one(executor, DescribeSession(backend, break_even=table))
        runtime, policy = described.runtime, policy or described.policy
        check_fits(policy, runtime.layers)
        outputs = OutputFolder.of(output_dir, runtime, tuned)
        config = config_section(
            runtime, policy, prompts, seed, tuned, checkpoint=checkpoint, tuner=tuner, break_even=break_even,
            metrics=names, prompt_file=prompt_file, tune_prompts=tune_prompts, yardsticks=tuple(yardsticks),
        )  # fmt: skip
        if outputs is not None and reuse:
            same = reused(
                reuse, outputs, config, gate, runtime.device_name, ladder=ladder, hand_set=bool(hand_set),
                save_videos=save_videos,
            )  # fmt: skip
            if same is not None:
                return same
        tasks = [
            JudgePrompt(
                index, prompt, policy, backend, break_even=table, seed=seed, cache=cache, metrics=names,
                outputs=outputs, save_videos=save_videos, difference=difference, ladder=ladder,
                yardsticks=tuple(yardsticks),
            )
            for index, prompt in enumerate(prompts)
        ]  # fmt: skip
        # First, since it also warms the kernels up; null where they compute every pair, so that seconds say nothing.
        timed = saves_seconds(runtime.kernel, policy)
        step = run_one(executor, TimeStep(prompts[0], seed, backend)) if timed else None
        return _Run(executor, runtime, tasks, config, gate, listener, started, step, tuple(hand_set)).result()


def _as_executor(renderer: Renderer | Executor) -> contextlib.AbstractContextManager[Executor]:
    return contextlib.nullcontext(renderer) if isinstance(renderer, Executor) else LocalExecutor(ModelSession(renderer))


JUDGED_STEPS = 3 * (2 * TimeStep.repeats + 1)
"""Denoising steps that are timed before an evaluation, most to warm up: dense twice, and without attention."""


@dataclass(frozen=True)
class _Run:
    executor: Executor
    runtime: RuntimeDescription
    tasks: Sequence[JudgePrompt]
    config: ConfigSection
    gate: Gate
    listener: EvaluationListener
    started: float
    step: StepTimes | None
    hand_set: tuple[Pair, ...] = ()

    def result(self) -> EvaluationResult:
        first = self.tasks[0]
        ladder: tuple[Side, ...] = ("dense_again", "kernel") if first.ladder else ()
        yardsticks: list[Side] = ["yardstick" for _ in first.yardsticks]
        started = EvaluationStarted(
            config=self.config.model_dump(mode="json"),
            prompts=texts([task.prompt for task in self.tasks]),
            num_steps=self.runtime.settings.num_inference_steps,
            renderings=("dense", "sparse", *ladder, *yardsticks),
            metrics=first.metrics,
            output_dir=first.outputs.folder if first.outputs else None,
        )
        try:
            self.listener.on_start(started)
            judged = self._judged()
            result = self._assembled(judged)
            ended = _write(first.outputs, result, judged)
        except BaseException as error:
            self.executor.cancel_all()
            self.listener.on_failure(error)
            raise
        self.listener.on_end(ended)
        return result

    def _judged(self) -> list[JudgedPrompt]:
        judged: dict[int, JudgedPrompt] = {}
        for index, future in run_all(self.executor, self.tasks, self._notify):
            prompt = future.result()
            outputs = self.tasks[index].outputs
            videos = outputs.keep_videos(index, prompt.videos) if outputs is not None else {}
            judged[index] = replace(prompt, videos=videos)
            self.listener.on_prompt(PromptDone(index, len(self.tasks), prompt.result, videos, future.worker))
        return [judged[index] for index in range(len(self.tasks))]

    def _notify(self, index: int, event: Event) -> None:
        what = event.what
        if isinstance(what, Incident):
            self.listener.on_incident(what)
        elif isinstance(what, Started):
            given = as_prompt(self.tasks[index].prompt)
            seed = self.tasks[index].seed if given.seed is None else given.seed
            self.listener.on_prompt_start(PromptStarted(index, len(self.tasks), given.text, seed, event.worker))
        elif isinstance(what, StepDone):
            self.listener.on_step(replace(what, index=index, num_renderings=len(self.tasks), worker=event.worker))

    def _assembled(self, judged: Sequence[JudgedPrompt]) -> EvaluationResult:
        rows = tuple(prompt.row for prompt in judged)
        summary = statistics(rows)
        measured = [row.metrics for row in rows if row.error is None]
        points = score_prompts(measured) if measured else None
        results = [prompt.result for prompt in judged]
        timed = seconds_section(results, self.step)
        sparsity, hand_set = sparsity_section(results, timed), self._hand_set(rows, results)
        seconds = (time.perf_counter() - self.started, sum(prompt.seconds for prompt in judged))
        return EvaluationResult(
            config=self.config,
            statistics=summary,
            detailed_results=rows,
            overall_score=points,
            verdict="failed" if points is None else verdict(points),
            gate=gate_section(self.gate, rows),
            sparsity=sparsity,
            seconds=timed,
            hand_set=hand_set,
            thresholds=tuple(LayerSection(**asdict(layer)) for layer in summarize(self.tasks[0].policy)),
            environment=environment_section(self.runtime, self.executor, *seconds),
        )

    def _hand_set(self, rows: Sequence[PromptRow], results: Sequence[PromptResult]) -> HandSetSection | None:
        row, stats = nearest_to_mean(rows), [result.stats for result in results if result.stats is not None]
        if row is None or not stats or not self.hand_set:
            return None
        task = self.tasks[row.index]
        saved = 1.0 - stats[0].merged(stats[1:]).attention_computed

        def render(policy: Policy) -> PromptResult:
            scored = ScorePrompt(task.prompt, policy, task.backend, task.seed, task.cache, task.metrics)
            return run_one(self.executor, scored)

        return measure_hand_set(task.policy, row, saved, self.hand_set, self.gate, render)


def _write(outputs: OutputFolder | None, result: EvaluationResult, judged: Sequence[JudgedPrompt]) -> EvaluationEnded:
    prompts = tuple(prompt.result for prompt in judged)
    if outputs is None:
        return EvaluationEnded(result, prompts)
    worst = {one.row.index: (one.row, one.worst_frame) for one in judged if one.worst_frame is not None}
    stills = {index: outputs.write_still(*worst[index]) for index in worst_and_median(result.detailed_results)}
    videos = {prompt.row.index: outputs.keep_videos(prompt.row.index, prompt.videos) for prompt in judged}
    videos = {index: kinds for index, kinds in videos.items() if kinds}
    write_text(outputs.report_path, report_markdown(result, outputs.folder, videos, stills))
    save_result(result, outputs.result_path)
    files = (*(path for kinds in videos.values() for path in kinds.values()), *stills.values())
    outputs.remove_stale(files)
    return EvaluationEnded(result, prompts, outputs.result_path, outputs.report_path, files)


def _metric_names(metrics: Sequence[str], gate: Gate) -> tuple[str, ...]:
    names = known_metrics(metrics, gate)
    for name in names:
        if (name in PromptRow.model_fields or hasattr(PromptRow, name)) and name not in BASE_METRICS:
            raise MetricError(f"metric name {name!r} is a field of the result; rename the metric")
    return names


def _tune_prompts(
    config: "Config", prompts: Sequence[AnyPrompt], checkpoint: Checkpoint | None
) -> tuple[AnyPrompt, ...]:
    """Prompts that the policy may have been tuned on: these if the checkpoint has their hash, else the tune file's."""
    if checkpoint is None:
        return ()
    if checkpoint.manifest.prompts_hash == hash_prompts(prompts):
        return tuple(prompts)
    try:
        return load_prompts(config.tune.prompt_file)
    except PromptError as error:
        _LOG.warning("cannot check whether the policy was tuned on these prompts: %s", error)
        return ()
