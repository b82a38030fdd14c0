"""The engine on Ray: each worker an actor that keeps a model. The only part of sparsetune that imports Ray."""

from sparsetune.engine.ray.opening import open_ray

__all__ = ["open_ray"]
