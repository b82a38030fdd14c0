"""Pipelines with random weights, built from a model's published configuration without a download."""

import importlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sparsetune.config.files import nearest
from sparsetune.errors import ModelError

Size = Literal["full", "tiny"]

_LIBRARIES = ("diffusers", "transformers")
_FOLDER = Path(__file__).parent / "blueprints"


@dataclass(frozen=True)
class Blueprint:
    """What a model is built of.

    Args:
        name: as `--model` takes it.
        hub_id: the model on the hub.
        facts_from: where the configuration is from.
        pipeline: the pipeline's class in diffusers.
        options: the pipeline's own settings.
        tokens: frames and pixels in a side of a latent (`temporal`, `spatial`), and the `text` tokens of the joint
            attention at most.
        components: for each of its parts, `class`, the published `config`, and what `tiny` changes in it.
    """

    name: str
    hub_id: str
    facts_from: str
    pipeline: str
    options: dict[str, Any]
    components: dict[str, dict[str, Any]]
    tokens: dict[str, int]

    def config(self, component: str, size: Size = "full") -> dict[str, Any]:
        """Return a component's configuration; what it doesn't name is its class's default."""
        part = self.components[component]
        return dict(part["config"]) | (part.get("tiny", {}) if size == "tiny" else {})


def blueprints() -> tuple[str, ...]:
    """Return the names of all models that can be built."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


@cache
def blueprint(name: str) -> Blueprint:
    """Read a model's blueprint by its name, or by its id on the hub.

    Raises:
        ModelError: there is none; the nearest name is told.
    """
    for known in blueprints():
        found = Blueprint(name=known, **json.loads((_FOLDER / f"{known}.json").read_text(encoding="utf-8")))
        if name in (known, found.hub_id):
            return found
    hint = nearest(name, dict.fromkeys(blueprints()))
    raise ModelError(
        f"a model with random weights must be one of {', '.join(blueprints())}, but is {name!r}; "
        + (f"did you mean {hint}?" if hint else "choose one of them")
    )


def build_pipeline(plan: Blueprint, size: Size, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Build a pipeline with random weights.

    Text and image encoders have one narrow layer and a vocabulary of hashed words at any size: they only have to give
    embeddings of the right width. Transformer and VAE are those of the size that was asked for.

    Args:
        plan: the model.
        size: `full` as published, or `tiny`: a few layers and channels.
        dtype: of the weights.
        seed: of the weights; the same seed gives the same pipeline.
    """
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {name: build_component(plan, name, size, dtype) for name in plan.components}
    pipeline: Any = getattr(diffusers, plan.pipeline)
    return pipeline(**parts, **plan.options)


def build_component(plan: Blueprint, name: str, size: Size, dtype: torch.dtype = torch.float32) -> Any:
    """Build one part of a pipeline with random weights; on the meta device where that is torch's default."""
    kind, config = plan.components[name]["class"], plan.config(name, size)
    found = _find(kind)
    if not issubclass(found, nn.Module):
        return found.from_config(config) if hasattr(found, "from_config") else found(**config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a full transformer in float32 wouldn't fit where it does in bfloat16
    try:
        module = _module(found, config)
    finally:
        torch.set_default_dtype(before)
    return _settled(module)


def _module(found: Any, config: dict[str, Any]) -> nn.Module:
    from sparsetune.models.stand_ins import encoder

    if hasattr(found, "load_config"):  # diffusers; transformers' from_config is another thing
        built: nn.Module = found.from_config(config)
        return built
    return encoder(found, config) if hasattr(found, "config_class") else found(**config)


def _find(kind: str) -> type:
    """Find a class: one of ours, one in a module that is named, or diffusers' before transformers'."""
    from sparsetune.models import stand_ins

    module, _, name = kind.rpartition(".")
    with torch.device("cpu"):  # importing makes a module's own constants, which outlive a build on the meta device
        places = [importlib.import_module(module)] if module else [stand_ins, *map(importlib.import_module, _LIBRARIES)]
        found: type = next(getattr(place, name) for place in places if hasattr(place, name))
    return found


def _settled(module: nn.Module) -> nn.Module:
    """Make a module ready to infer as loading would: in evaluation mode, some of its parts in float32.

    Parameters that start at zero get some values: a model that is nothing at all shows no difference.
    """
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    for name, parameter in module.named_parameters():
        if any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.float()
        if parameter.device.type != "meta" and parameter.dim() > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return module.eval()
