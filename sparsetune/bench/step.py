"""One denoising step of a model, ready to be run again and again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
"""Steps that the pipeline is asked for; it is stopped at the second."""


@dataclass(frozen=True)
class CallShape:
    """The shape of attention calls: (batch, heads, tokens, head_dim), their dtype, and where the tokens lie."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: TokenLayout


@dataclass(frozen=True)
class Step:
    """The transformer calls of one denoising step, with the arguments that the pipeline gave.

    Args:
        sites: the pipeline's self-attention.
        calls: each transformer's module with its arguments; two where guidance isn't batched.
    """

    sites: AttentionSites
    calls: tuple[tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]], ...]

    def run(self) -> None:
        """Run the step; its output is dropped."""
        with torch.inference_mode():
            for module, args, kwargs in self.calls:
                module(*args, **kwargs)

    def run_with(self, attend: Callable[[AttentionCall], Tensor]) -> None:
        """Run the step with every self-attention call sent to `attend`."""
        interception = Interception(self.sites, attend)
        try:
            self.run()
        finally:
            interception.remove()

    def shapes(self) -> dict[CallShape, int]:
        """Run the step and count its attention calls by shape; calls that can't run sparse are left out."""
        found: dict[CallShape, int] = {}

        def attend(call: AttentionCall) -> Tensor:
            plain = unmasked_call(call)
            if not isinstance(plain, Refusal):
                batch, heads, tokens, head_dim = plain.q.shape
                key = CallShape((batch, heads, tokens, head_dim), plain.q.dtype, plain.layout)
                found[key] = found.get(key, 0) + 1
            return call.original()

        self.run_with(attend)
        return found


def capture_step(renderer: Renderer, prompt: AnyPrompt, seed: int = 0) -> Step:
    """Start to render a prompt, keep what the first step calls the transformer with, and stop there.

    Raises:
        ModelError: no transformer was called.
        GenerationError: rendering failed, e.g. out of memory.
    """
    loaded = renderer.loaded
    sites = attention_sites(loaded.pipe)
    settings = renderer.settings.model_copy(update={"num_inference_steps": _STEPS})
    capture = _Capture()
    hooks = [site.module.register_forward_pre_hook(capture.hook(site), with_kwargs=True) for site in sites.transformers]
    try:
        Renderer(loaded, settings).render(prompt, seed)
    except _StepDone:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if not capture.calls:
        raise ModelError(
            f"{type(loaded.pipe).__name__} must call its transformer to be measured, but didn't; "
            "use a model of a supported family"
        )
    return Step(sites, tuple(capture.calls))


class _StepDone(Exception):
    pass


@dataclass
class _Capture:
    calls: list[tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]] = field(default_factory=list)
    timestep: float | None = None

    def hook(self, site: TransformerSite) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(site.arguments, args, strict=False)) | kwargs
            timestep = float(site.read_call(module, given).timestep)
            if self.timestep is not None and timestep != self.timestep:
                raise _StepDone
            self.timestep = timestep
            self.calls.append((module, args, kwargs))

        return before
