"""The start of an engine on Ray: what can be checked is checked before a model is loaded."""

from sparsetune.config import Config
from sparsetune.engine.ray.cluster import Cluster
from sparsetune.engine.ray.engine import RayEngine
from sparsetune.engine.remote import absolute
from sparsetune.engine.staffing import plan


def open_ray(config: Config, *, measures_speed: bool = False) -> RayEngine:
    """Connect to Ray, or start one, and hire the workers that the configuration asks for.

    Raises:
        EngineError: no Ray answers, it has too little, or its workers don't suit each other or this process.
        ModelError: the model can't be loaded.
    """
    settings = config.engine
    cluster = Cluster(settings.ray_address, settings.start_seconds)
    try:
        staffing = plan(settings, config.model.device, cluster.nodes)
        here = absolute(config)
        model = here.model.model_copy(update={"device": "cuda" if staffing.gpus else "cpu"})
        placed = here.model_copy(update={"model": model})
        engine = RayEngine(cluster, placed, staffing, measures_speed=measures_speed)
    except BaseException:
        cluster.close()
        raise
    try:
        engine.start(settings.start_seconds)
    except BaseException:
        engine.close()
        raise
    return engine
