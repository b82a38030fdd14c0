"""One denoising step of a model, captured so that it can be run repeatedly."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.sites import AttentionSites, TransformerSite
from sparsetune.attention.unmask import Refusal, unmasked_call
from sparsetune.errors import ModelError
from sparsetune.models.families import attention_sites
from sparsetune.models.generation import Renderer
from sparsetune.models.prompts import AnyPrompt

_STEPS = 2
"""Steps of the captured rendering, which is stopped at the second."""


@dataclass(frozen=True)
class CallShape:
    """The shape of attention calls: (batch, heads, tokens, head_dim), their dtype, and where the tokens lie."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: TokenLayout


@dataclass(frozen=True)
class Step:
    """The transformer calls of one denoising step, with the pipeline's arguments; two where guidance isn't batched."""

    sites: AttentionSites
    calls: tuple[tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]], ...]

    @property
    def num_layers(self) -> int:
        """Number of self-attention layers of the transformers that the step calls."""
        called = {id(module) for module, _, _ in self.calls}
        return sum(len(site.layers) for site in self.sites.transformers if id(site.module) in called)

    def run(self) -> None:
        with torch.inference_mode():
            for module, args, kwargs in self.calls:
                module(*args, **kwargs)

    def shapes(self) -> dict[CallShape, int]:
        """Run the step and count the attention calls of each shape that can run sparse."""
        found: dict[CallShape, int] = {}

        def attend(call: AttentionCall) -> Tensor:
            plain = unmasked_call(call)
            if not isinstance(plain, Refusal):
                batch, heads, tokens, head_dim = plain.q.shape
                key = CallShape((batch, heads, tokens, head_dim), plain.q.dtype, plain.layout)
                found[key] = found.get(key, 0) + 1
            return call.original()

        interception = Interception(self.sites, attend)
        try:
            self.run()
        finally:
            interception.remove()
        return found


def capture_step(renderer: Renderer, prompt: AnyPrompt, seed: int = 0) -> Step:
    """Capture the transformer calls of a prompt's first denoising step; the rendering stops there."""
    loaded = renderer.loaded
    sites = attention_sites(loaded.pipe)
    settings = renderer.settings.model_copy(update={"num_inference_steps": _STEPS, "sigmas": ()})
    calls: list[tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]] = []
    timesteps: list[float] = []

    def pre_hook(site: TransformerSite, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(zip(site.arguments, args, strict=False)) | kwargs
        timesteps.append(float(site.read_call(module, arguments).timestep))
        if timesteps[-1] != timesteps[0]:
            raise _StopRendering
        calls.append((module, args, kwargs))

    hooks = [
        site.module.register_forward_pre_hook(functools.partial(pre_hook, site), with_kwargs=True)
        for site in sites.transformers
    ]
    try:
        Renderer(loaded, settings).render(prompt, seed)
    except _StopRendering:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise ModelError(f"cannot time {type(loaded.pipe).__name__}: it didn't call its transformer; use another model")
    return Step(sites, tuple(calls))


class _StopRendering(Exception):
    pass
