"""The family of a pipeline, and its self-attention modules."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.sites import AttentionSites, LayerSite, TextPlace, TransformerCall, TransformerSite
from sparsetune.errors import ModelError
from sparsetune.models import calls
from sparsetune.models.dense_kernel import dense_kernel
from sparsetune.models.family import Family, LayerRule
from sparsetune.models.family_table import FAMILIES, REFUSED
from sparsetune.models.step_caching import DiffusersCaching

_registered: list[Family] = []

_ATTENTION = re.compile("Attention|Attn")
_NOT_SELF = re.compile(r"attn2|cross|text|txt|caption|context|audio|refiner|embed|pool|vision_model")


def register_family(family: Family) -> None:
    """Have `sparsify` use a family for its transformer class, before any other of that class."""
    _registered.insert(0, family)


ONE_STEP = SimpleNamespace(timesteps=torch.zeros(1), step_index=0)
"""Stands for the scheduler of a transformer whose own isn't known."""


@dataclass(frozen=True)
class LoneTransformer:
    """A transformer without its pipeline; `scheduler` sets its timesteps, and `ONE_STEP` counts all as one step."""

    transformer: nn.Module
    scheduler: Any

    def __post_init__(self) -> None:
        name = type(main_transformer(self)).__name__
        if len({family.name for family in (*_registered, *FAMILIES) if family.transformer_class == name}) > 1:
            raise ModelError(f"pipelines use {name} in different ways; pass the pipeline instead of its transformer")

    @property
    def _execution_device(self) -> torch.device:
        hook = getattr(self.transformer, "_hf_hook", None)  # of offloading
        return torch.device(getattr(hook, "execution_device", None) or next(self.transformer.parameters()).device)


def family_of(pipe: Any) -> Family:
    """Find a pipeline's family, a generic one where it isn't known; ModelError where it is known not to work."""
    transformer = main_transformer(pipe)
    if transformer is None:
        raise ModelError(f"{type(pipe).__name__} has no transformer; sparse attention needs one, a UNet won't do")
    family = family_named(type(pipe).__name__, type(transformer).__name__)
    return replace(family, steps=None) if getattr(pipe, "scheduler", None) is ONE_STEP else family


def family_named(pipeline: str, transformer: str) -> Family:
    """Find a family by the classes of a pipeline and of its transformer, as `family_of`."""
    for family in (*_registered, *FAMILIES):
        if family.transformer_class == transformer and re.fullmatch(family.pipelines, pipeline):
            return family
    if transformer in REFUSED:
        raise ModelError(f"{pipeline} with transformer {transformer} is not supported: {REFUSED[transformer]}")
    return Family(transformer, transformer, (), calls.sequence_call, frame_unit=1, first_frames=0, steps=None)


def is_known(family: Family) -> bool:
    """Whether a family's self-attention and token layout are known, rather than guessed."""
    return bool(family.layers)


def with_layout(family: Family, layout: TokenLayout) -> Family:
    """Return a family whose layers all have one layout of tokens."""
    text: TextPlace | None = None
    if layout.text:
        text = "start" if layout.text.start == 0 else "end"

    def read_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
        return calls.sequence_call(module, arguments)._replace(grid=layout.grid, tail=layout.tail)

    layers = tuple(replace(rule, text=text) for rule in family.layers or (LayerRule(""),))
    return replace(family, layers=layers, read_call=read_call)


def main_transformer(pipe: Any) -> Any:
    """Return the transformer that runs first, without a `torch.compile` wrapper; None where there is none."""
    for name in ("transformer", "transformer_2"):
        module = getattr(pipe, name, None)
        if module is not None:
            return getattr(module, "_orig_mod", module)
    return None


_SCALES = (
    "vae_scale_factor_spatial", "vae_spatial_scale_factor", "vae_spatial_compression_ratio", "vae_scale_factor",
)  # fmt: skip
"""Attributes of diffusers' pipelines with the pixels in a side of a latent pixel."""


def token_side(pipe: Any) -> int:
    """Return the number of pixels in a side of a token."""
    scale = next(int(getattr(pipe, name)) for name in _SCALES if hasattr(pipe, name))
    return scale * calls.patch_of(main_transformer(pipe))[-1] * family_of(pipe).packing


def attention_sites(pipe: Any, family: Family | None = None) -> AttentionSites:
    """Find a pipeline's self-attention modules; ModelError where its family doesn't work, or no module matches."""
    family = family or family_of(pipe)
    transformers = tuple(
        transformer_site(family, name, getattr(module, "_orig_mod", module))
        for name in family.transformers
        if (module := getattr(pipe, name, None)) is not None
    )
    if not any(transformer.layers for transformer in transformers):
        raise ModelError(
            f"found no self-attention modules in {type(pipe).__name__}; use a model as diffusers builds it"
        )
    return AttentionSites(
        transformers,
        _Steps(pipe, family.steps or calls.timesteps),
        lambda: _step_index(pipe.scheduler),
        DiffusersCaching(
            [getattr(pipe, transformer.name) for transformer in transformers],
            partial(calls.latents_of, family.read_call),
            lambda step: calls.noise_share(pipe.scheduler, step),
        ),
        counts_steps=family.steps is None and hasattr(pipe.scheduler, "step_index"),
    )


def _step_index(scheduler: Any) -> int | None:
    """Return a scheduler's count of steps; None where it keeps none."""
    if not hasattr(scheduler, "step_index"):
        return None
    begin = getattr(scheduler, "begin_index", None) or 0  # of a generation that starts in the middle
    return begin if scheduler.step_index is None else int(scheduler.step_index)


class _Steps:
    """The timestep argument of each denoising step; copied from the GPU once a generation."""

    def __init__(self, pipe: Any, read: Callable[[Any], Sequence[float]]) -> None:
        self._pipe = pipe
        self._read = read
        self._timesteps: torch.Tensor | None = None
        self._values: Sequence[float] = ()

    def __call__(self) -> Sequence[float]:
        scheduler = self._pipe.scheduler
        if scheduler.timesteps is None:
            return ()
        if self._timesteps is not scheduler.timesteps:
            self._timesteps, self._values = scheduler.timesteps, self._read(scheduler)
        return self._values


def transformer_site(family: Family, name: str, module: nn.Module) -> TransformerSite:
    layers = []
    for path, layer in module.named_modules():
        rule = _rule_of(family, path, layer)
        if rule is not None and (shape := _heads_of(layer)) is not None:
            layers.append(LayerSite(f"{name}.{path}", layer, *shape, rule.text, dense_kernel(layer)))
    arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    return TransformerSite(name, module, tuple(layers), family.read_call, arguments)


def _rule_of(family: Family, path: str, layer: nn.Module) -> LayerRule | None:
    """Return the rule for a module; None where it isn't self-attention of the video, as far as its name says."""
    if family.layers and family.layers[0].path:
        return next((rule for rule in family.layers if re.fullmatch(rule.path, path)), None)
    named = _ATTENTION.search(type(layer).__name__) is not None and _NOT_SELF.search(path.lower()) is None
    if not named or getattr(layer, "is_cross_attention", False):
        return None
    return family.layers[0] if family.layers else LayerRule("")


def _heads_of(layer: nn.Module) -> tuple[int, int] | None:
    """Return the number of heads and their width; None for a module that has none."""
    held = vars(layer)
    heads = next((held[name] for name in ("heads", "num_heads", "num_attention_heads") if name in held), None)
    if not isinstance(heads, int):
        return None
    if "inner_dim" in held:
        return heads, held["inner_dim"] // heads
    query: Any = getattr(layer, "to_q", None) or getattr(layer, "to_query", None)
    width = held.get("head_dim") or (None if query is None else query.out_features // heads)
    return None if width is None else (heads, width)
