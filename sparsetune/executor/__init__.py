"""Executors: where tasks run, in this process or on workers that each keep a model."""

from sparsetune.config import Config
from sparsetune.errors import ExecutorError
from sparsetune.executor.base import Executor, Task, TaskFuture, run_all, run_one
from sparsetune.executor.events import PHASES, Emit, Event, Incident, Phase, Side, Started, StepDone, Worker
from sparsetune.executor.local import LocalExecutor
from sparsetune.executor.session import ModelSession
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import LoadedModel, load_pipeline

__all__ = [
    "PHASES",
    "Emit",
    "Event",
    "Executor",
    "Incident",
    "LocalExecutor",
    "ModelSession",
    "Phase",
    "Side",
    "Started",
    "StepDone",
    "Task",
    "TaskFuture",
    "Worker",
    "open_executor",
    "run_all",
    "run_one",
]


def open_executor(config: Config, *, measures_speed: bool = False, loaded: LoadedModel | None = None) -> Executor:
    """Load the model in this process unless it is `loaded`, or start the workers that load it.

    `measures_speed`: policies are ranked by measured speed, so that all workers must be alike.

    Raises:
        ExecutorError: Ray is missing, no cluster answers, it has too few resources, its workers don't match, or the
            model is loaded here.
        ModelError, GenerationError: the model can't be loaded, or can't render what is asked for.
    """
    if config.engine.name != "ray":
        return LocalExecutor(ModelSession(Renderer(loaded or load_pipeline(config.model), config.generation)))
    if loaded is not None:
        raise ExecutorError(
            "a pipeline in memory can't be sent to Ray's workers; use engine local, or name the model for them to load"
        )
    try:
        from sparsetune.executor.ray_executor import RayExecutor
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ExecutorError(
            "--engine ray needs Ray, which isn't installed; pip install 'sparsetune[ray]', or use --engine local"
        ) from error
    return RayExecutor(config, measures_speed=measures_speed)
