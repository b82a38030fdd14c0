"""Variants of a loaded model that nobody calls a loss: another dense kernel, another data type, FP8 weights."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsetune.errors import GenerationError
from sparsetune.models.families import attention_sites
from sparsetune.models.loading import LoadedModel

_CASTED = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)  # of what diffusers' layerwise casting casts


@contextlib.contextmanager
def _other_kernel(loaded: LoadedModel) -> Iterator[None]:
    """Run attention in another of PyTorch's kernels than the default, which is flash or cuDNN; on a CPU flash."""
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if loaded.device.type == "cuda" else SDPBackend.MATH):
        yield


@contextlib.contextmanager
def _other_dtype(loaded: LoadedModel) -> Iterator[None]:
    """Compute the transformers' matrix products in bfloat16, or in float16 where that is the model's own type."""
    dtype = torch.float16 if loaded.dtype == torch.bfloat16 else torch.bfloat16
    entered = contextlib.ExitStack()

    def enter(*_call: Any) -> None:
        entered.enter_context(torch.autocast(loaded.device.type, dtype=dtype))

    def leave(*_call: Any) -> None:
        entered.close()

    hooks = []
    for module in _transformers(loaded):
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _fp8_weights(loaded: LoadedModel) -> Iterator[None]:
    """Round the weights to float8_e4m3fn, those that diffusers' `enable_layerwise_casting` stores so.

    That can't be undone, so copies are kept in CPU memory.

    Raises:
        GenerationError: the weights aren't in memory.
    """
    weights = [weight for module in _transformers(loaded) for weight in _casted_weights(module)]
    if any(weight.is_meta for weight in weights):
        raise GenerationError("FP8 weights need all weights in memory; leave out --offload sequential")
    saved = [weight.detach().to("cpu", copy=True) for weight in weights]
    try:
        for weight in weights:
            weight.data.copy_(weight.data.to(torch.float8_e4m3fn))
        yield
    finally:
        for weight, before in zip(weights, saved, strict=True):
            weight.data.copy_(before)


VARIANTS: Final[dict[str, Callable[[LoadedModel], contextlib.AbstractContextManager[None]]]] = {
    "kernel": _other_kernel,
    "dtype": _other_dtype,
    "fp8": _fp8_weights,
}
"""Context managers that change a loaded model's numerics, and restore them exactly."""


def _transformers(loaded: LoadedModel) -> list[Any]:
    return [site.module for site in attention_sites(loaded.pipe).transformers]


def _casted_weights(transformer: Any) -> list[nn.Parameter]:
    own = (*(transformer._skip_layerwise_casting_patterns or ()), *(transformer._keep_in_fp32_modules or ()))
    skipped = re.compile("|".join((*DEFAULT_SKIP_MODULES_PATTERN, *own)))
    return [
        weight
        for name, module in transformer.named_modules()
        if isinstance(module, _CASTED) and not skipped.search(name)
        for weight in module.parameters(recurse=False)
    ]
