"""A dense rendering whose attention calls are looked at, layer by layer, at sampled denoising steps."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sparsetune.attention.backends import Backend
from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.ordering import TokenOrder, permutation
from sparsetune.attention.unmask import Refusal, UnmaskedCall, unmasked_call
from sparsetune.errors import TuningError
from sparsetune.models.families import attention_sites
from sparsetune.models.generation import Renderer, Rendering
from sparsetune.models.prompts import AnyPrompt

OnStep = Callable[[int, int], None]

Look = Callable[[int, int, UnmaskedCall], None]
"""Given the places of layer and sampled step, and a call of theirs; a step may make several."""


def sample_steps(num_steps: int, num_samples: int) -> tuple[int, ...]:
    """Spread `num_samples` denoising steps evenly over the schedule, the first and the last included.

    Args:
        num_steps: steps of the generation.
        num_samples: how many to sample, at least 1; all of them where it is not less than `num_steps`.
    """
    if num_samples == 1:
        return (num_steps // 2,)
    spread = np.linspace(0, num_steps - 1, min(num_samples, num_steps))
    return tuple(sorted({round(float(step)) for step in spread}))


def layers_of(renderer: Renderer) -> tuple[tuple[str, int], ...]:
    """Name and number of heads of each self-attention layer, as a look's places count them."""
    return tuple((layer.name, layer.num_heads) for layer in attention_sites(renderer.loaded.pipe).layers)


def render_watched(
    renderer: Renderer,
    prompt: AnyPrompt,
    seed: int,
    look: Look,
    *,
    steps: Sequence[int],
    backend: Backend,
    on_step: OnStep | None = None,
) -> Rendering:
    """Render one prompt dense, and look at every layer at the sampled steps.

    Args:
        renderer: of a pipeline that nothing is installed on.
        prompt: the text.
        seed: of the rendering.
        look: at each call; what it takes isn't the rendering's time.
        steps: denoising steps to look at.
        backend: the kernel that the calls are to run on: what it refuses.
        on_step: called after each denoising step.

    Returns:
        The dense video, which is the same as without a look; its seconds are those of the rendering alone.

    Raises:
        TuningError: a layer made no call that its kernel can run; the message says why.
        GenerationError: the rendering failed.
    """
    probe = _Probe(layers_of(renderer), tuple(steps), backend, look)
    interception = Interception(attention_sites(renderer.loaded.pipe), probe.attend)
    try:
        with torch.inference_mode():
            rendering = renderer.render(prompt, seed, on_step)
    finally:
        interception.remove()
    probe.check_seen()
    return replace(rendering, seconds=rendering.seconds - probe.seconds)


def in_order(plain: UnmaskedCall, order: TokenOrder) -> tuple[Tensor, Tensor, Tensor]:
    """Put q, k and v of a call in a token order, or each head in its own."""
    path = permutation(order, plain.layout, plain.q.device)
    if path is None:
        return plain.q, plain.k, plain.v
    return path.order(plain.q), path.order(plain.k), path.order(plain.v)


class _Probe:
    """Has attention calls looked at as they pass, and lets every one run dense."""

    def __init__(
        self, layers: tuple[tuple[str, int], ...], steps: tuple[int, ...], backend: Backend, look: Look
    ) -> None:
        self.seconds = 0.0
        self._layers, self._steps, self._backend, self._look = layers, steps, backend, look
        self._seen = np.zeros((len(layers), len(steps)), bool)
        self._layer_index = {name: index for index, (name, _) in enumerate(layers)}
        self._step_index = {step: index for index, step in enumerate(steps)}
        self._refused: set[str] = set()

    def attend(self, call: AttentionCall) -> Tensor:
        if call.step is None or call.step in self._step_index:
            plain = unmasked_call(call, self._backend)
            if isinstance(plain, Refusal):
                self._refused.add(plain.reason)
            elif call.step is not None:
                self._time(self._layer_index[call.layer.name], self._step_index[call.step], plain)
        return call.original()

    def _time(self, layer: int, step: int, plain: UnmaskedCall) -> None:
        if plain.q.is_cuda:
            torch.cuda.synchronize(plain.q.device)  # else the wait for earlier work would count as ours
        started = time.perf_counter()
        self._look(layer, step, plain)
        self._seen[layer, step] = True
        self.seconds += time.perf_counter() - started

    def check_seen(self) -> None:
        if self._seen.all():
            return
        layer, step = (int(index) for index in np.argwhere(~self._seen)[0])
        reasons = "; ".join(sorted(self._refused)) or "no attention call was made there"
        raise TuningError(
            f"every self-attention layer must be measurable, but {self._layers[layer][0]} at step "
            f"{self._steps[step]} was not: {reasons}"
        )
