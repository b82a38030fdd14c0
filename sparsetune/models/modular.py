"""diffusers' modular pipelines: their inputs and outputs under the names that other pipelines have."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsetune.errors import GenerationError, ModelError

INDEX = "modular_model_index.json"


def is_modular(pipe: Any) -> bool:
    return hasattr(pipe, "load_components")


def load_modular(folder: str, dtype: torch.dtype) -> Any:
    """Load a modular pipeline with all its components, in a manager of its own, which can offload them.

    Components that are in the folder are loaded from there, whatever its index names.
    """
    from diffusers import ComponentsManager, ModularPipeline

    manager = ComponentsManager()  # type: ignore[no-untyped-call]
    pipe: Any = ModularPipeline.from_pretrained(folder, components_manager=manager)  # type: ignore[no-untyped-call]
    inside = {
        name: folder
        for name, spec in pipe._component_specs.items()
        if spec.subfolder and (Path(folder) / spec.subfolder).is_dir()
    }
    pipe.load_components(pretrained_model_name_or_path=inside, dtype=dtype)
    missing = [name for name in pipe.pretrained_component_names if getattr(pipe, name, None) is None]
    if missing:
        raise ModelError(f"{folder} lacks components of its pipeline: {', '.join(missing)}; check its {INDEX}")
    return pipe


def has_index(source: str) -> bool:
    """Whether a folder holds a modular pipeline, and no other."""
    folder = Path(source)
    return (folder / INDEX).is_file() and not (folder / "model_index.json").is_file()


def download(source: str, revision: str | None) -> str | None:
    """Download a hub repository of a modular pipeline and return its folder; None where it has no such index."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        hf_hub_download(source, INDEX, revision=revision)
    except (OSError, ValueError):
        return None
    return snapshot_download(source, revision=revision)


def hide_progress(pipe: Any) -> None:
    """Print no progress bars; those of a modular pipeline are in blocks of its blocks."""
    pipe.set_progress_bar_config(disable=True)
    blocks = [pipe._blocks] if is_modular(pipe) else []  # `pipe.blocks` is a copy
    while blocks:
        block = blocks.pop()
        blocks += getattr(block, "sub_blocks", {}).values()
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)


def enable_offload(pipe: Any, device: torch.device) -> None:
    """Keep components on the CPU while they aren't needed."""
    manager = getattr(pipe, "_components_manager", None)
    if manager is None:
        raise ModelError("--offload model needs a modular pipeline with a components manager; use --offload none")
    manager.enable_auto_cpu_offload(device=device)


def parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a pipeline's call."""
    if not is_modular(pipe):
        return inspect.signature(pipe.__call__).parameters
    return {
        one.name: inspect.Parameter(
            one.name, inspect.Parameter.KEYWORD_ONLY, default=inspect.Parameter.empty if one.required else one.default
        )
        for one in pipe.blocks.inputs
        if one.name is not None
    }


def rendered(output: Any) -> Any:
    """Return the first video of a pipeline's output, or its images."""
    if hasattr(output, "frames"):
        return output.frames[0]
    if hasattr(output, "images"):
        return output.images[:1]
    values = output.values  # a modular pipeline's state
    if (videos := values.get("videos")) is not None:
        return videos[0]
    if (images := values.get("images")) is not None:
        return images[:1]
    raise GenerationError("the modular pipeline returned neither images nor videos; use one with a decoding block")
