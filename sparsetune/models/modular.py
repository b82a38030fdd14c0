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


def load_modular(source: str, revision: str | None, dtype: torch.dtype) -> Any:
    """Load a modular pipeline with all its components, in a manager of its own, which can offload them."""
    from diffusers import ComponentsManager, ModularPipeline

    manager = ComponentsManager()  # type: ignore[no-untyped-call]
    pipe: Any = ModularPipeline.from_pretrained(  # type: ignore[no-untyped-call]
        source, components_manager=manager, revision=revision
    )
    pipe.load_components(dtype=dtype)
    missing = [name for name in pipe.pretrained_component_names if getattr(pipe, name, None) is None]
    if missing:
        raise ModelError(f"{source} lacks components of its pipeline: {', '.join(missing)}; check its {INDEX}")
    return pipe


def has_index(source: str) -> bool:
    """Whether a folder holds a modular pipeline, and no other."""
    folder = Path(source)
    return (folder / INDEX).is_file() and not (folder / "model_index.json").is_file()


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
