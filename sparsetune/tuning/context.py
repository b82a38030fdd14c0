"""The context of a tuning: configuration, executor, prompts, gate and listeners."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsetune.attention.backends import Backend, choose_backend, skips_work
from sparsetune.attention.policy import Policy
from sparsetune.attention.step_cache import CACHE_KINDS, CacheKind
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.checkpoint import hash_prompts
from sparsetune.config import Config
from sparsetune.config.models import Goal, TrialVideos
from sparsetune.errors import ExecutorError, TuningError
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.evaluation.tasks import ScorePrompt
from sparsetune.executor import Executor, LocalExecutor, open_executor, run_one
from sparsetune.executor.session import DescribeSession
from sparsetune.metrics import Gate, load_metrics
from sparsetune.models.generation import Frames, Renderer
from sparsetune.models.loading import LoadedModel
from sparsetune.models.prompts import AnyPrompt, load_prompts, texts
from sparsetune.models.runtime import RuntimeDescription
from sparsetune.tuning.calibration.curves import Arrangement, grid
from sparsetune.tuning.calibration.step_caches import FindCaches
from sparsetune.tuning.events import StudyStarted, StudyState, TuningListener, notify
from sparsetune.urls import without_credentials


class TimeIsUp(Exception):
    """`tune.max_minutes` ended."""


@dataclass(frozen=True)
class TuningContext:
    config: Config
    executor: Executor
    runtime: RuntimeDescription  # of the executor's workers
    prompts: tuple[AnyPrompt, ...]  # tune prompts
    eval_prompts: tuple[AnyPrompt, ...]
    cache: BaselineCache
    gate: Gate  # for the winner on the eval prompts
    listeners: tuple[TuningListener, ...]
    output_dir: Path
    started: float  # `time.perf_counter()` at the start
    validation_prompts: tuple[AnyPrompt, ...] = ()
    supported_caches: tuple[CacheKind, ...] = ()  # by the model

    @property
    def renderer(self) -> Renderer:
        """The model of this process; ExecutorError if only other processes have it."""
        if not isinstance(self.executor, LocalExecutor):
            raise ExecutorError(
                f"--tuner {self.config.tune.tuner} must have the model in this process, but Ray's workers have it; "
                "use --engine local"
            )
        return self.executor.session.renderer

    @property
    def backend(self) -> Backend:
        return choose_backend(self.config.backend, self.renderer.loaded.device)

    @property
    def goal(self) -> Goal:
        """The objective; `auto` is speed where the kernel skips work or caches are searched."""
        objective = self.config.tune.objective
        if objective != "auto":
            return objective
        return "speed" if skips_work(self.runtime.kernel) or self.cache_kinds else "sparsity"

    @property
    def cache_kinds(self) -> tuple[CacheKind, ...]:
        """The step caches to search."""
        caches = self.config.tune.caches
        if not self.config.tune.searches_caches:
            return ()
        if caches == ("auto",):
            return self.supported_caches
        return tuple(kind for kind in CACHE_KINDS if kind in caches)

    @property
    def search_gate(self) -> Gate:
        """The gate of trials: stricter by the margin, since the winner is evaluated on other prompts."""
        return self.gate.with_margin(self.config.tune.margin_db)

    @property
    def trial_videos(self) -> TrialVideos:
        """Videos of trials to encode; `none` too where nothing is recorded."""
        return self.config.tracking.trial_videos if self.config.tracking.enabled else "none"

    @property
    def keep_text(self) -> tuple[bool, ...]:
        return {"always": (True,), "never": (False,), "search": (True, False)}[self.config.tune.keep_text]

    @property
    def arrangements(self) -> tuple[Arrangement, ...]:
        return tuple(Arrangement(order, keep) for keep in self.keep_text for order in self.config.tune.orders)

    @property
    def points(self) -> tuple[HeadThresholds, ...]:
        return grid(self.config.tune.rules)

    @property
    def probe_prompts(self) -> tuple[AnyPrompt, ...]:
        """Prompts for measuring sensitivity; none if the search treats all steps and layers alike."""
        tune = self.config.tune
        wanted = tune.schedule or (tune.space == "budget" and tune.granularity not in ("global", "uniform"))
        return self.prompts[: tune.probe_prompts] if wanted else ()

    def start(self, study_name: str, storage: str, n_trials: int, study: StudyState | None = None) -> None:
        """Notify the listeners that a study begins or is resumed; None is one that isn't shared."""
        study = study or StudyState()
        config = self.config.model_dump(mode="json")
        for section, key in (("tune", "storage"), ("tracking", "uri"), ("engine", "ray_address")):
            config[section][key] = without_credentials(config[section][key] or "") or None
        event = StudyStarted(
            study_name=study_name,
            storage=without_credentials(storage),
            config=config,
            n_trials=n_trials,
            num_done=study.num_done(),
            prompts=texts(self.prompts),
            num_steps=self.config.generation.num_inference_steps,
            output_dir=self.output_dir,
            num_eval_prompts=len(self.eval_prompts),
            num_validation_prompts=len(self.validation_prompts),
            goal=self.goal,
            study=study,
        )
        notify(self.listeners, lambda listener: listener.on_study_start(event))

    def score(
        self, prompt: AnyPrompt, policy: Policy, metrics: tuple[str, ...], *, with_video: bool = False
    ) -> ScorePrompt:
        return ScorePrompt(prompt, policy, self.config.backend, self.config.tune.seed, self.cache, metrics, with_video)

    def has_time(self) -> bool:
        return self.seconds_left != 0.0

    def keep_dense(self, prompt: AnyPrompt, frames: Frames, seconds: float) -> None:
        self.cache.get_or_render(baseline_key(self.renderer, prompt, self.config.tune.seed), lambda: (frames, seconds))

    @property
    def seconds_left(self) -> float | None:
        """Seconds until `tune.max_minutes` are over; None without that bound."""
        if self.config.tune.max_minutes is None:
            return None
        return max(0.0, self.config.tune.max_minutes * 60.0 - (time.perf_counter() - self.started))


_LAYOUT = 5
"""Increment when the format or meaning of stored trials changes; older studies can't be resumed."""


def signature(context: TuningContext) -> dict[str, Any]:
    """Return all settings that the trials of a study must share, as JSON values."""
    config = context.config
    shared = ("space", "granularity", "schedule", "probe_prompts")
    return (
        calibration_signature(context)
        | {"layout": _LAYOUT}
        | {name: getattr(config.tune, name) for name in shared}
        | {"objective": context.goal}
        | {"gate": asdict(context.search_gate)}
        | ({"compile": True} if context.runtime.compiled else {})
        | ({"caches": list(context.cache_kinds)} if context.cache_kinds else {})
        | ({"seconds": "of the denoising"} if context.goal == "speed" else {})
    )


def calibration_signature(context: TuningContext) -> dict[str, Any]:
    """Return all settings that the calibrated curves depend on, as JSON values."""
    config, runtime = context.config, context.runtime
    return {
        "model": runtime.identity.fingerprint,
        "layers": [[name, heads] for name, heads in runtime.layers],
        "generation": config.generation.model_dump(mode="json"),
        "scheduler": runtime.scheduler,
        "dtype": runtime.dtype,
        "device": runtime.device,
        "kernel": runtime.kernel,
        "blocks": asdict(runtime.blocks),
        "prompts": hash_prompts(context.prompts),
        "seed": config.tune.seed,
        "arrangements": [list(arrangement) for arrangement in context.arrangements],
        "grid": [asdict(point) for point in context.points],
        "calibration_steps": config.tune.calibration_steps,
        "select_partial": config.tune.select_partial,
    }


def digest(value: Mapping[str, Any]) -> str:
    """Hash JSON values to 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def open_context(
    config: Config, output_dir: Path, listeners: Sequence[TuningListener] = (), loaded: LoadedModel | None = None
) -> TuningContext:
    """Check a configuration and load the model unless it is; the caller has to close the context's executor."""
    if config.backend == "dense":
        raise TuningError("tuning must have a backend that can run sparse, but backend is dense; use --backend auto")
    if config.tune.tuner == "builtin" and config.engine.name != "local":
        raise ExecutorError(
            "--tuner builtin must have the model in this process, but --engine is ray; use --engine local, and "
            "--parallel-tune for the GPUs of this host"
        )
    load_metrics(config.eval.metric_modules, config.eval.lpips_weights)
    num_prompts = config.tune.num_prompts
    prompts = load_prompts(config.tune.prompt_file, num_prompts, further=config.tune.validation_prompts)
    eval_prompts = load_prompts(config.eval.prompt_file, config.eval.num_prompts)
    cache, gate = BaselineCache(config.cache.folder.absolute(), config.cache.max_gb), Gate(**config.gate.bounds)
    for_speed = config.tune.objective == "speed" or (
        config.tune.objective == "auto"
        and (config.backend not in ("reference", "dense") or config.tune.searches_caches)
    )
    executor = open_executor(config, measures_speed=for_speed, loaded=loaded)
    try:
        runtime = run_one(executor, DescribeSession(config.backend)).runtime
        caches = run_one(executor, FindCaches()) if config.tune.searches_caches else ()
    except BaseException:
        executor.close()
        raise
    return TuningContext(
        config=config,
        executor=executor,
        runtime=runtime,
        prompts=prompts[:num_prompts],
        validation_prompts=prompts[num_prompts:] if config.tune.tuner == "optuna" else (),
        eval_prompts=eval_prompts,
        cache=cache,
        gate=gate,
        listeners=tuple(listeners),
        output_dir=output_dir,
        started=time.perf_counter(),
        supported_caches=caches,
    )
