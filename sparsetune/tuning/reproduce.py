"""Reproduce a search: its configuration in, and from, the manifest of the checkpoint that it made."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, ValidationError

from sparsetune.attention.backends import choose_backend
from sparsetune.attention.device import device_name, device_of
from sparsetune.checkpoint import Manifest, hash_prompts, load_checkpoint, versions
from sparsetune.config import Config
from sparsetune.config.files import DEMO, configs_folder
from sparsetune.errors import PromptError, TuningError
from sparsetune.files import expand
from sparsetune.models.prompts import load_prompts

logger = logging.getLogger(__name__)

_SECTIONS = ("model", "generation", "tune", "eval", "gate", "backend")
_LOCATIONS = {"tune": ("storage", "study_name"), "eval": ("output_dir",)}
"""Settings that aren't recorded, since they don't affect the search."""


def recorded(config: Config) -> dict[str, JsonValue]:
    """Return all settings that a search's outcome depends on, as JSON values.

    Left out are tracking, cache, engine, the study's storage and name, and the results' folder. Prompt files in the
    packaged configurations' folder are relative to it, all other paths absolute.
    """
    content: dict[str, Any] = config.model_dump(mode="json", include=set(_SECTIONS))
    for section, names in _LOCATIONS.items():
        for name in names:
            del content[section][name]
    for section in ("tune", "eval"):
        content[section]["prompt_file"] = _portable(getattr(config, section).prompt_file)
    if config.model.source != DEMO:
        content["model"]["source"] = _absolute(config.model.source)
    if config.eval.lpips_weights is not None:
        content["eval"]["lpips_weights"] = str(config.eval.lpips_weights.absolute())
    content["eval"]["metric_modules"] = [_absolute(module) for module in config.eval.metric_modules]
    return content


def config_from_manifest(path: Path | str, base: Config) -> Config:
    """Read the configuration of the search that made a checkpoint, to run that search again.

    A warning lists differences in device, kernel and packages, with which the outcome may differ. A checkpoint may be
    anybody's: no module, file or folder that only its manifest names is imported or read.

    Args:
        path: the checkpoint's folder.
        base: the caller's configuration, which determines tracking, cache, engine, storage and name of the study, the
            results' folder, modules of metrics, prompt files other than packaged ones, and a model in a folder. An
            unnamed study is named as the first one with `-rerun`, to have trials of its own.

    Raises:
        CheckpointError: there is no checkpoint.
        TuningError: the manifest has no search or one that this version can't read, its model is a folder that `base`
            doesn't name, or the prompts are others.
    """
    manifest = load_checkpoint(path).manifest
    if not manifest.search:
        raise TuningError(
            f"the manifest of {path} has no search settings (tuner {manifest.tuner}): an older sparsetune wrote it, or "
            "no search did; use a checkpoint of `sparsetune tune`, or give the options themselves"
        )
    config = _config(path, manifest, base)
    _check_prompts("tune", config.tune.prompt_file, config.tune.num_prompts, manifest.prompts_hash)
    _check_prompts("eval", config.eval.prompt_file, config.eval.num_prompts, manifest.eval_prompts_hash)
    _warn_of_differences(config, manifest)
    return config


def _config(path: Path | str, manifest: Manifest, base: Config) -> Config:
    content = {name: dict(value) if isinstance(value, Mapping) else value for name, value in manifest.search.items()}
    try:
        settings: dict[str, Any] = {name: content[name] for name in _SECTIONS}
        for section, names in _LOCATIONS.items():
            settings[section] |= {name: getattr(getattr(base, section), name) for name in names}
        _keep_to_the_given(settings, base)
        if manifest.base_revision is not None and not Path(settings["model"]["source"]).exists():
            settings["model"]["revision"] = manifest.base_revision  # the branch may have moved since
        if settings["tune"]["study_name"] is None:
            settings["tune"]["study_name"] = f"{manifest.tuner_settings.get('study_name', manifest.tuner)}-rerun"
        return Config.model_validate(settings | {"tracking": base.tracking, "cache": base.cache, "engine": base.engine})
    except (KeyError, TypeError, ValidationError) as error:
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        cause = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else f"{type(error).__name__} {error}"
        made_by = manifest.versions.get("sparsetune", "unknown")
        raise TuningError(
            f"the search of {path} must be one that this sparsetune knows, but {cause}; "
            f"repeat it with sparsetune {made_by}, which made it"
        ) from error


def _keep_to_the_given(settings: dict[str, Any], base: Config) -> None:
    """Replace the modules and files that only the manifest names by those of `base`, with a warning."""
    dropped = []
    modules = settings["eval"]["metric_modules"]
    settings["eval"]["metric_modules"] = base.eval.metric_modules
    if unknown := [str(one) for one in modules if str(one) not in map(_absolute, base.eval.metric_modules)]:
        dropped.append(f"the modules {', '.join(unknown)} (give them with --metric-module)")
    for section, option in (("tune", "--prompt-file"), ("eval", "--eval-prompt-file")):
        recorded_file, given = settings[section]["prompt_file"], getattr(base, section).prompt_file
        packaged = (configs_folder() / recorded_file).resolve()
        is_packaged = packaged.is_relative_to(configs_folder().resolve())
        settings[section]["prompt_file"] = packaged if is_packaged else given
        if not is_packaged and packaged != expand(given).resolve():
            dropped.append(f"the prompt file {recorded_file} (give it with {option})")
    if dropped:
        logger.warning("not read, because only the manifest names it: %s", "; ".join(dropped))
    source = str(settings["model"]["source"])
    is_folder = source != DEMO and (expand(source).exists() or source.startswith((".", "~", "/")))
    if is_folder and _absolute(base.model.source) != source:
        raise TuningError(f"the search's model is the folder {source}; if you trust it, give it with --model")


def _check_prompts(kind: str, file: Path, num_prompts: int, expected: str | None) -> None:
    if expected is None:
        return
    try:
        found = hash_prompts(load_prompts(file, num_prompts))
    except PromptError as error:
        raise TuningError(f"the {kind} prompts must be those of the search, but {error}") from error
    if found != expected:
        raise TuningError(
            f"the {kind} prompts must be those of the search, but the first {num_prompts} of {file} are others; give "
            f"those of the search with --{'eval-' if kind == 'eval' else ''}prompt-file"
        )


def _warn_of_differences(config: Config, manifest: Manifest) -> None:
    device, installed = device_of(config.model.device), versions()
    compared = [
        ("device", manifest.device, _device_name(device)),
        ("kernel", manifest.kernel, choose_backend(config.backend, device).name),
        *((name, version, installed.get(name, "none")) for name, version in manifest.versions.items()),
    ]
    differing = [f"{name} was {was} and is {now}" for name, was, now in compared if was is not None and was != now]
    if differing:
        logger.warning("the search is repeated elsewhere, so its outcome may differ: %s", "; ".join(differing))


def _device_name(device: torch.device) -> str:
    there = device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()
    return device_name(device) if there else "none"


def _portable(path: Path) -> str:
    resolved, configs = expand(path).resolve(), configs_folder().resolve()
    return resolved.relative_to(configs).as_posix() if resolved.is_relative_to(configs) else str(resolved)


def _absolute(text: str) -> str:
    """Return the absolute path if `text` is an existing file or folder, otherwise (a hub id, a module) `text`."""
    path = expand(text)
    return str(path.resolve()) if path.exists() else text
