"""Typed configuration: its pydantic models and the resolver."""

from sparsetune.config.models import (
    DEFAULT_METRICS,
    CacheConfig,
    Config,
    EngineConfig,
    EvalConfig,
    GateConfig,
    GenerationConfig,
    ModelConfig,
    TrackingConfig,
    TuneConfig,
)
from sparsetune.config.resolver import explicit_keys, resolve

__all__ = [
    "DEFAULT_METRICS",
    "CacheConfig",
    "Config",
    "EngineConfig",
    "EvalConfig",
    "GateConfig",
    "GenerationConfig",
    "ModelConfig",
    "TrackingConfig",
    "TuneConfig",
    "explicit_keys",
    "resolve",
]
