"""The engine that a configuration asks for."""

from sparsetune.config import Config
from sparsetune.errors import ExecutorError
from sparsetune.executor.base import Executor
from sparsetune.executor.local import LocalExecutor
from sparsetune.executor.session import ModelSession
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import load_pipeline


def open_executor(config: Config, *, measures_speed: bool = False) -> Executor:
    """Load the model, or start the workers that will.

    Args:
        config: the configuration.
        measures_speed: whether policies compete in measured speed, so that all workers must be alike.

    Raises:
        ExecutorError: Ray is missing, no cluster answers, it has too little, or its workers don't suit each other.
        ModelError, GenerationError: the model can't be loaded, or can't render what is asked for.
    """
    if config.engine.name == "ray":
        return _ray_engine(config, measures_speed)
    return LocalExecutor(ModelSession(Renderer(load_pipeline(config.model), config.generation)))


def _ray_engine(config: Config, measures_speed: bool) -> Executor:
    try:
        from sparsetune.executor.ray_executor import open_ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ExecutorError(
            "--engine ray must have Ray, but it isn't installed; pip install 'sparsetune[ray]', or use --engine local"
        ) from error
    return open_ray(config, measures_speed=measures_speed)
