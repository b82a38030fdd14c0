"""The engine that a configuration asks for."""

from sparsetune.config import Config
from sparsetune.engine.engine import Engine
from sparsetune.engine.local import LocalEngine
from sparsetune.engine.workplace import Workplace
from sparsetune.errors import EngineError
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import load_pipeline


def open_engine(config: Config, *, measures_speed: bool = False) -> Engine:
    """Load the model, or start the workers that will.

    Args:
        config: the configuration.
        measures_speed: whether policies compete in measured speed, so that all workers must be alike.

    Raises:
        EngineError: Ray is missing, no cluster answers, it has too little, or its workers don't suit each other.
        ModelError, GenerationError: the model can't be loaded, or can't render what is asked for.
    """
    if config.engine.name == "ray":
        return _ray_engine(config, measures_speed)
    return LocalEngine(Workplace(Renderer(load_pipeline(config.model), config.generation)))


def _ray_engine(config: Config, measures_speed: bool) -> Engine:
    try:
        from sparsetune.engine.ray import open_ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise EngineError(
            "--engine ray must have Ray, but it isn't installed; pip install 'sparsetune[ray]', or use --engine local"
        ) from error
    return open_ray(config, measures_speed=measures_speed)
