"""The engine that a configuration asks for."""

from sparsetune.config import Config
from sparsetune.engine.engine import Engine
from sparsetune.engine.local import LocalEngine
from sparsetune.engine.workplace import Workplace
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import load_pipeline


def open_engine(config: Config) -> Engine:
    """Load the model, or start the workers that will.

    Raises:
        ModelError, GenerationError: the model can't be loaded, or can't render what is asked for.
    """
    return LocalEngine(Workplace(Renderer(load_pipeline(config.model), config.generation)))
