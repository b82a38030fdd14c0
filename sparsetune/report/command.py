"""The command that reproduces the reported numbers."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsetune.config import GenerationConfig, resolve
from sparsetune.config.files import configs_folder, flatten
from sparsetune.config.resolver import config_fields
from sparsetune.errors import ConfigError
from sparsetune.evaluation.result import ConditionSection, EvaluationResult
from sparsetune.metrics.gate import POOLED
from sparsetune.tuning.record import TuningRecord
from sparsetune.tuning.reproduce import recorded

_BOUNDS = {
    "mean frame_cosine": "gate.min_frame_cosine",
    "mean psnr": "gate.min_psnr",
    "worst prompt's psnr": "gate.min_psnr_worst",
    "worst frame's psnr": "gate.min_psnr_frame",
}


def tune_command(record: TuningRecord) -> str:
    given = {name: value for name, value in flatten(record.config).items() if name in config_fields()}
    return _command("tune", given, str(given.get("model.source", "demo")))


def eval_command(result: EvaluationResult) -> str:
    """The command of an evaluation, likewise; a policy in memory can't be named by one."""
    config = result.config
    given: dict[str, Any] = {f"generation.{name}": getattr(config, name) for name in GenerationConfig.model_fields}
    given |= {
        "model.revision": config.model.revision,
        "model.random_weights": config.model.random_weights,
        "model.dtype": config.dtype,
        "model.vae_tiling": config.vae_tiling,
        "model.lora": config.model.lora,
        "model.lora_scale": 1.0 if config.model.lora_scale is None else config.model.lora_scale,
        "model.flow_shift": config.model.flow_shift,
        "model.compile": config.compile,
        "eval.num_prompts": config.num_prompts,
        "eval.seed": config.seed,
        "eval.metrics": list(config.metrics),
        "eval.ladder": any(row.ladder for row in result.detailed_results),
        "eval.yardsticks": list(config.yardsticks),
        "backend": config.backend,
        "break_even": config.break_even,
    }
    if config.prompt_file is not None:
        given["eval.prompt_file"] = config.prompt_file
    given |= _bounds(result.gate.conditions)
    options = ("--checkpoint", config.tuned_path) if config.tuned_path is not None else ()
    return _command("eval", given, config.model.source, options)


def _bounds(conditions: Sequence[ConditionSection]) -> dict[str, Any]:
    given: dict[str, Any] = {"gate.min_psnr_worst": None, "gate.min_psnr_frame": None}
    given |= {_BOUNDS[one.name]: one.bound for one in conditions if one.name in _BOUNDS}
    others = [one for one in conditions if one.name not in (*_BOUNDS, POOLED)]
    for key, is_maximum in (("gate.min_metrics", False), ("gate.max_metrics", True)):
        given[key] = [
            f"{one.name.removeprefix('mean ')}={one.bound:g}" for one in others if one.is_maximum == is_maximum
        ]
    return given


def _command(verb: str, given: Mapping[str, Any], source: str, options: tuple[str, ...] = ()) -> str:
    random_weights = str(given.get("model.random_weights", "no"))
    defaults = _defaults(source, random_weights)
    parts = ["sparsetune", verb, "--model", source, *options]
    if random_weights != "no":  # decides the defaults of others
        parts += ["--set", f"model.random_weights={random_weights}"]
    for key, value in given.items():
        if key not in ("model.name", "model.source") and not _equal(value, defaults.get(key), key):
            text = str(configs_folder() / str(value)) if key.endswith("prompt_file") else _text(value)
            parts += ["--set", f"{key}={text}"]
    return shlex.join(parts)


def _defaults(source: str, random_weights: str) -> dict[str, Any]:
    """Settings with only the model given; empty where it is no longer known."""
    try:
        config = resolve(environ={}, flags={"model.source": source, "model.random_weights": random_weights})
    except ConfigError:
        return {}
    return flatten(recorded(config)) | {"break_even": config.break_even and str(config.break_even)}


def _equal(value: Any, default: Any, key: str) -> bool:
    if key.endswith("prompt_file") and isinstance(default, str):
        # the path of a packaged file is recorded relative to the packaged configurations
        return str(value) == default or Path(str(value)).as_posix().endswith(f"configs/{default}")
    if key == "eval.metrics":  # their order doesn't matter
        return set(value) == set(default or ())
    return bool((list(value) if isinstance(value, tuple) else value) == default)


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(str(one) for one in value)
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
