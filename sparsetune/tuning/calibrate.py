"""Calibration: dense renderings of a few prompts, with every self-attention layer measured on the way."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sparsetune.attention.blockmap import BlockShape
from sparsetune.attention.interception import AttentionCall, Interception, refusal
from sparsetune.attention.ordering import permutation
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
    blocks: BlockShape,
    keep_text: bool = True,
    every: int = 2,
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
        blocks: block shape of the kernel to calibrate for.
        keep_text: whether the text's key blocks are always computed.
        every: measure the error on every so many query blocks.
        on_step: called after each denoising step.

    Returns:
        The curves of this prompt, and the dense video, which is the same as without calibration; its seconds are
        those of the rendering alone.

    Raises:
        TuningError: no attention call could be measured; the message says why.
        GenerationError: the rendering failed.
    """
    sites = attention_sites(renderer.loaded.pipe)
    layers = tuple((layer.name, layer.num_heads) for layer in sites.layers)
    shape = (len(orders), len(layers), len(steps), max(heads for _, heads in layers), len(points))
    error, sparsity = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    place = {name: index for index, (name, _) in enumerate(layers)}
    place_of_step = {step: index for index, step in enumerate(steps)}
    refused: set[str] = set()
    spent = 0.0

    def attend(call: AttentionCall) -> Tensor:
        nonlocal spent
        started = time.perf_counter()
        if reason := refusal(call):
            refused.add(reason)
        elif call.transformer is not None and call.step in place_of_step:
            layout = call.transformer.layout
            keep = blocks.covering(layout.text) if keep_text else range(0)
            at = (place[call.layer.name], place_of_step[call.step])
            for number, order in enumerate(orders):
                path = permutation(order, layout, call.q.device)
                q, k, v = (x if path is None else x[..., path, :] for x in (call.q, call.k, call.v))
                measured = measure(q, k, v, points, blocks=blocks, keep=keep, scale=call.scale, every=every)
                target = (number, *at, slice(call.layer.num_heads))
                # A step may make two calls (guidance without batching): both must hold the bound.
                error[target] = np.fmax(error[target], measured.error.cpu().numpy())
                sparsity[target] = np.fmin(sparsity[target], measured.sparsity.cpu().numpy())
        spent += time.perf_counter() - started
        return call.original()

    interception = Interception(sites, attend)
    try:
        with torch.inference_mode():
            rendering = renderer.render(prompt, seed, on_step)
    finally:
        interception.remove()
    if np.isnan(error[..., 0, :]).any():
        reasons = "; ".join(sorted(refused)) or "no attention call was made at the sampled steps"
        raise TuningError(f"every self-attention layer must be measurable, but some were not: {reasons}")
    num_steps = renderer.settings.num_inference_steps
    curves = Curves(layers, tuple(orders), tuple(steps), num_steps, tuple(points), error, sparsity, 1, keep_text)
    return curves, replace(rendering, seconds=rendering.seconds - spent)
