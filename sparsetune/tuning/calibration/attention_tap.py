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
    tap = _AttentionTap(attention_layers(renderer), tuple(steps), backend, on_attention)
    interception = Interception(attention_sites(renderer.loaded.pipe), tap.attend)
    try:
        with torch.inference_mode():
            rendering = renderer.render(prompt, seed, on_step)
    finally:
        interception.remove()
    tap.check_complete()
    return replace(rendering, seconds=rendering.seconds - tap.seconds)


def reordered(call: UnmaskedCall, order: TokenOrder) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a call in a token order, or each head in its own."""
    path = permutation(order, call.layout, call.q.device)
    if path is None:
        return call.q, call.k, call.v
    return path.order(call.q), path.order(call.k), path.order(call.v)


class _AttentionTap:
    def __init__(
        self, layers: tuple[tuple[str, int], ...], steps: tuple[int, ...], backend: Backend, on_attention: OnAttention
    ) -> None:
        self.seconds = 0.0
        self._layers, self._steps, self._backend, self._on_attention = layers, steps, backend, on_attention
        self._tapped = np.zeros((len(layers), len(steps)), bool)
        self._layer_index = {name: index for index, (name, _) in enumerate(layers)}
        self._step_index = {step: index for index, step in enumerate(steps)}
        self._refused: set[str] = set()

    def attend(self, call: AttentionCall) -> Tensor:
        if call.step is None or call.step in self._step_index:
            plain = unmasked_call(call, self._backend)
            if isinstance(plain, Refusal):
                self._refused.add(plain.reason)
            elif call.step is not None:
                layer, step = self._layer_index[call.layer.name], self._step_index[call.step]
                started = device_clock(plain.q.device)
                self._on_attention(layer, step, plain)
                self.seconds += device_clock(plain.q.device) - started
                self._tapped[layer, step] = True
        return call.original()

    def check_complete(self) -> None:
        if self._tapped.all():
            return
        layer, step = (int(index) for index in np.argwhere(~self._tapped)[0])
        reasons = "; ".join(sorted(self._refused)) or "no attention call was made there"
        raise TuningError(
            f"cannot calibrate attention layer {self._layers[layer][0]} at step {self._steps[step]}: {reasons}"
        )
