"""Refining: a dense rendering of a prompt, with the lowest thresholds of every layer searched on the way."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparsetune.attention.backends import Backend, choose_backend
from sparsetune.attention.handle import kept_blocks
from sparsetune.attention.policy import Policy
from sparsetune.attention.unmask import UnmaskedCall
from sparsetune.executor import Emit, ModelSession, Stepped
from sparsetune.models.generation import Renderer
from sparsetune.models.prompts import AnyPrompt
from sparsetune.tuning.bounds import Bounds
from sparsetune.tuning.layersearch import Cuts, lowest_cuts
from sparsetune.tuning.limits import Limits
from sparsetune.tuning.probe import OnStep, in_order, layers_of, render_watched


def refine(
    renderer: Renderer,
    prompt: AnyPrompt,
    seed: int,
    *,
    start: Policy,
    bounds: Bounds,
    steps: Sequence[int],
    backend: Backend,
    on_step: OnStep | None = None,
) -> Limits:
    """Render one prompt dense, and search every layer's lowest thresholds at the sampled steps.

    Args:
        renderer: of a pipeline that nothing is installed on.
        prompt: the text.
        seed: of the rendering.
        start: gives each head its simthreshd1 and order, each layer its rule, and what is always computed.
        bounds: on each head's error.
        steps: denoising steps to search at.
        backend: the kernel to search for.
        on_step: called after each denoising step.

    Returns:
        The limits on all calls of these steps.

    Raises:
        TuningError: a layer made no call that could be measured; the message says why.
        GenerationError: the rendering failed.
    """
    limits = Limits.none(layers_of(renderer), num_inputs=1)

    def look(layer: int, step: int, plain: UnmaskedCall) -> None:
        found = search_call(plain, start, layer, bounds, backend)
        for table, seen in ((limits.cut, found.cut), (limits.pvthreshd, found.pvthreshd)):
            of_layer = table[layer, : len(seen)]
            np.maximum(of_layer, seen.cpu().numpy(), out=of_layer)

    render_watched(renderer, prompt, seed, look, steps=steps, backend=backend, on_step=on_step)
    return limits


def search_call(plain: UnmaskedCall, start: Policy, layer: int, bounds: Bounds, backend: Backend) -> Cuts:
    """Search one attention call of layer number `layer` as `refine` does."""
    of_layer = start.layers[layer]
    return lowest_cuts(
        *in_order(plain, start.orders[layer]),
        torch.tensor([head.simthreshd1 for head in of_layer.heads], device=plain.q.device),
        bounds,
        backend=backend,
        scale=plain.scale,
        keep=kept_blocks(start.keep_text, plain.layout, backend.blocks),
        rule=of_layer.rule,
        select_partial=start.select_partial,
    )


@dataclass(frozen=True)
class RefinePrompt:
    """The task that refining hands out: one prompt; what is not said here is as in `refine`.

    Args:
        backend: the kernel to search for, as the configuration names it.
    """

    prompt: AnyPrompt
    seed: int
    start: Policy
    bounds: Bounds
    steps: tuple[int, ...]
    backend: str

    def run(self, place: ModelSession, emit: Emit) -> Limits:
        """Refine; every step is told as `Stepped`.

        Raises:
            TuningError: a layer made no call that could be measured.
            GenerationError: the rendering failed.
        """
        renderer = place.plain()
        return refine(
            renderer,
            self.prompt,
            self.seed,
            start=self.start,
            bounds=self.bounds,
            steps=self.steps,
            backend=choose_backend(self.backend, renderer.loaded.device),
            on_step=lambda step, num_steps: emit(Stepped("dense", step, num_steps)),
        )
