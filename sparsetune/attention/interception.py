"""The one interception that serves every model.

While a self-attention module's forward runs, a `TorchFunctionMode` sees each `scaled_dot_product_attention` call
below it, whatever processor makes that call. Nothing of a model's own code is copied or replaced.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from sparsetune.attention.schedule import step_of
from sparsetune.attention.sites import AttentionSites, LayerSite, TransformerCall, TransformerSite
from sparsetune.errors import ModelError

Forward = Callable[..., Any]


@dataclass(frozen=True)
class AttentionCall:
    """One `scaled_dot_product_attention` call of a self-attention layer, as its module made it.

    Args:
        layer: whose call it is.
        transformer: the transformer call around it; None when the attention ran outside of one.
        step: the denoising step, from 0; None when the timestep isn't one of the scheduler's.
        num_steps: denoising steps of the generation.
        q, k, v: (batch, heads, tokens, head_dim).
        mask: the call's attention mask.
        is_causal, dropout: as the call has them.
        scale: the softmax scale, never None.
        original: runs the call as it was made and returns its output.
    """

    layer: LayerSite
    transformer: TransformerCall | None
    step: int | None
    num_steps: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    is_causal: bool
    dropout: float
    scale: float
    original: Callable[[], Tensor] = field(repr=False)


Attend = Callable[[AttentionCall], Tensor]
"""Gives a call's output; `call.original()` is the dense one."""


class Interception:
    """Sends every self-attention call of a pipeline to `attend`, until `remove`.

    Raises:
        ModelError: the pipeline's attention is intercepted already.
    """

    def __init__(self, sites: AttentionSites, attend: Attend) -> None:
        _check_free(sites)
        self._sites = sites
        self._attend = attend
        self._active = True
        self._running: dict[str, tuple[TransformerCall, int | None, int]] = {}
        self._replaced: list[tuple[nn.Module, Forward | None, Forward]] = []
        self._hooks: list[RemovableHandle] = []
        for transformer in sites.transformers:
            self._hooks.extend(self._watch(transformer))
            for layer in transformer.layers:
                self._replace_forward(transformer, layer)

    def remove(self) -> None:
        """Restore the pipeline's modules exactly; does nothing the second time."""
        self._active = False  # a forward that someone wrapped around ours since can't be taken out: it passes through
        for module, own_forward, ours in self._replaced:
            if module.__dict__.get("forward") is not ours:
                continue
            if own_forward is None:
                del module.forward
            else:
                module.forward = own_forward
        for hook in self._hooks:
            hook.remove()
        self._replaced.clear()
        self._hooks.clear()

    def _watch(self, transformer: TransformerSite) -> tuple[RemovableHandle, RemovableHandle]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            timesteps = self._sites.timesteps()
            call = transformer.read_call(module, args, kwargs)
            self._running[transformer.name] = (call, step_of(call.timestep, timesteps), len(timesteps))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._running.pop(transformer.name, None)

        module = transformer.module
        return (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),
        )

    def _replace_forward(self, transformer: TransformerSite, layer: LayerSite) -> None:
        original: Forward = layer.module.forward
        own_forward = layer.module.__dict__.get("forward")

        def send(func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            running = self._running.get(transformer.name, (None, None, 0))
            return self._attend(_read_call(layer, running, func, args, kwargs))

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return original(*args, **kwargs)
            with _AttentionMode(send):
                return original(*args, **kwargs)

        forward.sparsetune_interception = self  # type: ignore[attr-defined]
        layer.module.forward = forward
        self._replaced.append((layer.module, own_forward, forward))


class _AttentionMode(TorchFunctionMode):
    def __init__(self, send: Callable[[Forward, tuple[Any, ...], dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self._send = send

    def __torch_function__(
        self, func: Forward, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._send(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _read_call(
    layer: LayerSite,
    running: tuple[TransformerCall | None, int | None, int],
    func: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> AttentionCall:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    scale = given.get("scale")
    transformer, step, num_steps = running
    return AttentionCall(
        layer=layer,
        transformer=transformer,
        step=step,
        num_steps=num_steps,
        q=given["query"],
        k=given["key"],
        v=given["value"],
        mask=given.get("attn_mask"),
        is_causal=given.get("is_causal", False),
        dropout=given.get("dropout_p", 0.0),
        scale=scale if scale is not None else given["query"].shape[-1] ** -0.5,
        original=lambda: func(*args, **kwargs),
    )


def _check_free(sites: AttentionSites) -> None:
    for layer in sites.layers:
        if hasattr(layer.module.__dict__.get("forward"), "sparsetune_interception"):
            raise ModelError(
                f"a pipeline can be made sparse once, but {layer.name} is sparse already; remove() it first"
            )


def refusal(call: AttentionCall) -> str | None:
    """Say why a call can't run sparse on any backend, or None where it can."""
    if call.transformer is None:
        return "the attention ran outside of its transformer"
    if call.step is None:
        return "the timestep isn't in the scheduler's list"
    if call.mask is not None and not _is_all_true(call.mask):
        return "the call has an attention mask"
    if call.is_causal:
        return "the call is causal"
    if call.dropout:
        return "the call has dropout"
    if call.k.shape[1] != call.q.shape[1]:
        return "key heads are shared between query heads"
    tokens = call.transformer.layout.num_tokens
    if (call.q.shape[-2], call.k.shape[-2]) != (tokens, tokens):
        return f"{call.q.shape[-2]} x {call.k.shape[-2]} tokens where the transformer's input has {tokens}"
    return None


def _is_all_true(mask: Tensor) -> bool:
    return bool((mask if mask.dtype == torch.bool else mask == 0).all())
