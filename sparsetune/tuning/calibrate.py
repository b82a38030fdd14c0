"""Calibration: dense renderings of a few prompts, with every self-attention layer measured on the way."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sparsetune.attention.backends import Backend
from sparsetune.attention.head_dim import head_dim_refusal
from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.ordering import permutation
from sparsetune.attention.plain import PlainCall, plain_call
from sparsetune.attention.sparsify import kept_blocks
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.errors import TuningError
from sparsetune.models.families import attention_sites
from sparsetune.models.generation import Renderer, Rendering
from sparsetune.models.prompts import AnyPrompt
from sparsetune.tuning.curves import Arrangement, Curves
from sparsetune.tuning.measure import measure

EVERY = 16
"""Of each block's queries, every so many are measured: 8 of 128, or 4 of Hopper's 64."""

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
    prompt: AnyPrompt,
    seed: int,
    *,
    steps: Sequence[int],
    arrangements: Sequence[Arrangement],
    points: Sequence[HeadThresholds],
    backend: Backend,
    select_partial: bool = True,
    every: int = EVERY,
    on_step: OnStep | None = None,
) -> tuple[Curves, Rendering]:
    """Render one prompt dense and measure every layer at the sampled steps.

    Args:
        renderer: of a pipeline that nothing is installed on.
        prompt: the text.
        seed: of the rendering.
        steps: denoising steps to measure at.
        arrangements: token orders and text rules to measure.
        points: the grid of thresholds.
        backend: the kernel to calibrate for: its block shape, and what it refuses.
        select_partial: whether partial last blocks are chosen like any other.
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
    probe = _Probe(layers, tuple(steps), tuple(arrangements), tuple(points), backend, select_partial, every)
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
        arrangements: tuple[Arrangement, ...],
        points: tuple[HeadThresholds, ...],
        backend: Backend,
        select_partial: bool,
        every: int,
    ) -> None:
        per_head = (len(layers), len(steps), max(heads for _, heads in layers))
        shape = (len(arrangements), *per_head, len(points))
        self.seconds = 0.0
        self._layers, self._steps, self._arrangements, self._points = layers, steps, arrangements, points
        self._backend, self._select_partial, self._every = backend, select_partial, every
        self._error, self._sparsity = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
        self._size = np.full(per_head, np.nan, np.float32)
        self._seen = np.zeros((len(layers), len(steps)), bool)
        self._layer_index = {name: index for index, (name, _) in enumerate(layers)}
        self._step_index = {step: index for index, step in enumerate(steps)}
        self._refused: set[str] = set()

    def attend(self, call: AttentionCall) -> Tensor:
        if call.step is None or call.step in self._step_index:
            plain = plain_call(call)
            reason = plain if isinstance(plain, str) else head_dim_refusal(self._backend, plain)
            if isinstance(plain, str) or reason is not None:
                self._refused.add(str(reason))
            else:
                self._measure(call, plain)
        return call.original()

    def _measure(self, call: AttentionCall, plain: PlainCall) -> None:
        if call.step is None:
            return
        if call.q.is_cuda:
            torch.cuda.synchronize(call.q.device)  # else the wait for earlier work would count as ours
        started = time.perf_counter()
        at = (self._layer_index[call.layer.name], self._step_index[call.step])
        for number, (order, keep_text) in enumerate(self._arrangements):
            keep = kept_blocks(keep_text, plain.layout, self._backend.blocks)
            path = permutation(order, plain.layout, call.q.device)
            q, k, v = (x if path is None else x[..., path.there, :] for x in (plain.q, plain.k, plain.v))
            measured = measure(
                q, k, v, self._points, blocks=self._backend.blocks, keep=keep, scale=call.scale,
                every=self._every, select_partial=self._select_partial,
            )  # fmt: skip
            target = (number, *at, slice(call.layer.num_heads))
            # A step may make two calls (guidance without batching): both must hold the bound.
            self._error[target] = np.fmax(self._error[target], measured.error.cpu().numpy())
            self._sparsity[target] = np.fmin(self._sparsity[target], measured.sparsity.cpu().numpy())
            self._size[(*at, slice(call.layer.num_heads))] = measured.size.cpu().numpy()
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
            arrangements=self._arrangements,
            steps=self._steps,
            num_steps=num_steps,
            points=self._points,
            error=self._error,
            error_rms=self._error,
            sparsity=self._sparsity,
            size=self._size,
            num_inputs=1,
            select_partial=self._select_partial,
        )
