"""Calibration: dense renderings of a few prompts, with every self-attention layer measured on the way."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sparsetune.attention.backends import Backend
from sparsetune.attention.interception import AttentionCall, Interception, refusal
from sparsetune.attention.ordering import permutation
from sparsetune.attention.sparsify import kept_blocks
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.errors import TuningError
from sparsetune.models.families import attention_sites
from sparsetune.models.generation import Renderer, Rendering
from sparsetune.tuning.curves import Curves
from sparsetune.tuning.measure import measure

OnStep = Callable[[int, int], None]


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


def calibrate(
    renderer: Renderer,
    prompt: str,
    seed: int,
    *,
    steps: Sequence[int],
    orders: Sequence[str],
    points: Sequence[HeadThresholds],
    backend: Backend,
    keep_text: bool = True,
    every: int = 4,
    on_step: OnStep | None = None,
) -> tuple[Curves, Rendering]:
    """Render one prompt dense and measure every layer at the sampled steps.

    Args:
        renderer: of a pipeline that nothing is installed on.
        prompt: the text.
        seed: of the rendering.
        steps: denoising steps to measure at.
        orders: token orders to measure in.
        points: the grid of thresholds.
        backend: the kernel to calibrate for: its block shape, and what it refuses.
        keep_text: whether the text's key blocks are always computed.
        every: measure the error on every so many query tokens of a block.
        on_step: called after each denoising step.

    Returns:
        The curves of this prompt, and the dense video, which is the same as without calibration; its seconds are
        those of the rendering alone.

    Raises:
        TuningError: a layer made no call that could be measured; the message says why.
        GenerationError: the rendering failed.
    """
    sites = attention_sites(renderer.loaded.pipe)
    layers = tuple((layer.name, layer.num_heads) for layer in sites.layers)
    probe = _Probe(layers, tuple(steps), tuple(orders), tuple(points), backend, keep_text, every)
    interception = Interception(sites, probe.attend)
    try:
        with torch.inference_mode():
            rendering = renderer.render(prompt, seed, on_step)
    finally:
        interception.remove()
    curves = probe.curves(renderer.settings.num_inference_steps)
    return curves, replace(rendering, seconds=rendering.seconds - probe.seconds)


class _Probe:
    """Measures attention calls as they pass, and lets every one run dense."""

    def __init__(
        self,
        layers: tuple[tuple[str, int], ...],
        steps: tuple[int, ...],
        orders: tuple[str, ...],
        points: tuple[HeadThresholds, ...],
        backend: Backend,
        keep_text: bool,
        every: int,
    ) -> None:
        shape = (len(orders), len(layers), len(steps), max(heads for _, heads in layers), len(points))
        self.seconds = 0.0
        self._layers, self._steps, self._orders, self._points = layers, steps, orders, points
        self._backend, self._keep_text, self._every = backend, keep_text, every
        self._error, self._sparsity = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
        self._seen = np.zeros((len(layers), len(steps)), bool)
        self._layer_index = {name: index for index, (name, _) in enumerate(layers)}
        self._step_index = {step: index for index, step in enumerate(steps)}
        self._refused: set[str] = set()

    def attend(self, call: AttentionCall) -> Tensor:
        if call.step is None or call.step in self._step_index:
            if reason := refusal(call) or self._backend.refusal(call.q, call.k, call.v):
                self._refused.add(reason)
            else:
                self._measure(call)
        return call.original()

    def _measure(self, call: AttentionCall) -> None:
        if call.transformer is None or call.step is None:
            return
        if call.q.is_cuda:
            torch.cuda.synchronize(call.q.device)  # else the wait for earlier work would count as ours
        started = time.perf_counter()
        layout = call.transformer.layout
        keep = kept_blocks(self._keep_text, layout, self._backend.blocks)
        at = (self._layer_index[call.layer.name], self._step_index[call.step])
        for number, order in enumerate(self._orders):
            path = permutation(order, layout, call.q.device)
            q, k, v = (x if path is None else x[..., path.there, :] for x in (call.q, call.k, call.v))
            measured = measure(
                q, k, v, self._points, blocks=self._backend.blocks, keep=keep, scale=call.scale, every=self._every
            )
            target = (number, *at, slice(call.layer.num_heads))
            # A step may make two calls (guidance without batching): both must hold the bound.
            self._error[target] = np.fmax(self._error[target], measured.error.cpu().numpy())
            self._sparsity[target] = np.fmin(self._sparsity[target], measured.sparsity.cpu().numpy())
        self._seen[at] = True
        self.seconds += time.perf_counter() - started

    def curves(self, num_steps: int) -> Curves:
        if not self._seen.all():
            layer, step = (int(index) for index in np.argwhere(~self._seen)[0])
            reasons = "; ".join(sorted(self._refused)) or "no attention call was made there"
            raise TuningError(
                f"every self-attention layer must be measurable, but {self._layers[layer][0]} at step "
                f"{self._steps[step]} was not: {reasons}"
            )
        return Curves(
            layers=self._layers,
            orders=self._orders,
            steps=self._steps,
            num_steps=num_steps,
            points=self._points,
            error=self._error,
            sparsity=self._sparsity,
            num_inputs=1,
            keep_text=self._keep_text,
        )
