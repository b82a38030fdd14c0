"""A dense rendering whose attention calls at sampled denoising steps are passed to a callback."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sparsetune.attention.backends import Backend
from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.ordering import TokenOrder, permutation
from sparsetune.attention.unmask import Refusal, UnmaskedCall, unmasked_call
from sparsetune.bench.latency import device_clock
from sparsetune.errors import TuningError
from sparsetune.models.families import attention_sites
from sparsetune.models.generation import OnStep, Renderer, Rendering
from sparsetune.models.prompts import AnyPrompt

OnAttention = Callable[[int, int, UnmaskedCall], None]
"""Called with the indices of layer and sampled step, and an attention call there; a step may make several."""


def sample_steps(num_steps: int, num_samples: int) -> tuple[int, ...]:
    """Spread `num_samples` denoising steps (at least 1, at most all) evenly over a schedule of `num_steps`.

    The first and the last are included, unless it is a single one: then the middle.
    """
    if num_samples == 1:
        return (num_steps // 2,)
    spread = np.linspace(0, num_steps - 1, min(num_samples, num_steps))
    return tuple(sorted({round(float(step)) for step in spread}))


def attention_layers(renderer: Renderer) -> tuple[tuple[str, int], ...]:
    """Name and number of heads of each self-attention layer, in the order of `OnAttention`'s indices."""
    return tuple((layer.name, layer.num_heads) for layer in attention_sites(renderer.loaded.pipe).layers)


def render_tapped(
    renderer: Renderer,
    prompt: AnyPrompt,
    seed: int,
    on_attention: OnAttention,
    *,
    steps: Sequence[int],
    backend: Backend,
    on_step: OnStep | None = None,
) -> Rendering:
    """Render one prompt dense, and pass every layer's attention calls at the sampled steps to a callback.

    `renderer` is of a pipeline that nothing is installed on; seconds of the result are without those of the callback.
    Raises TuningError where a layer made no call that the kernel can run.
    """
    layers, step_index = attention_layers(renderer), {step: index for index, step in enumerate(steps)}
    layer_index = {name: index for index, (name, _) in enumerate(layers)}
    tapped, seconds = np.zeros((len(layers), len(steps)), bool), 0.0
    refused: set[str] = set()

    def attend(call: AttentionCall) -> Tensor:
        nonlocal seconds
        if call.step is None or call.step in step_index:
            plain = unmasked_call(call, backend)
            if isinstance(plain, Refusal):
                refused.add(plain.reason)
            elif call.step is not None:
                layer, step = layer_index[call.layer.name], step_index[call.step]
                started = device_clock(plain.q.device)
                on_attention(layer, step, plain)
                seconds += device_clock(plain.q.device) - started
                tapped[layer, step] = True
        return call.original()

    interception = Interception(attention_sites(renderer.loaded.pipe), attend)
    try:
        with torch.inference_mode():
            rendering = renderer.render(prompt, seed, on_step)
    finally:
        interception.remove()
    for layer, step in np.argwhere(~tapped):
        reasons = "; ".join(sorted(refused)) or "no attention call was made there"
        raise TuningError(f"cannot calibrate attention layer {layers[layer][0]} at step {steps[step]}: {reasons}")
    return replace(rendering, seconds=rendering.seconds - seconds)


def reordered(call: UnmaskedCall, order: TokenOrder) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a call in a token order, or each head in its own."""
    path = permutation(order, call.layout, call.q.device)
    if path is None:
        return call.q, call.k, call.v
    return path.order_qkv(call.q, call.k, call.v)
