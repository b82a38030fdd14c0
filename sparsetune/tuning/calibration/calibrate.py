"""Calibration: dense renderings of a few prompts, with every self-attention layer measured on the way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sparsetune.attention.backends import Backend, choose_backend
from sparsetune.attention.handle import kept_blocks
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.attention.unmask import UnmaskedCall
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.executor import Emit, ModelSession, StepDone
from sparsetune.models.generation import Renderer, Rendering
from sparsetune.models.prompts import AnyPrompt
from sparsetune.tuning.calibration.attention_tap import OnStep, in_order, layers_of, render_watched
from sparsetune.tuning.calibration.curves import Arrangement, Curves
from sparsetune.tuning.calibration.mask_error import measure

EVERY = 16
"""Of each block's queries, every so many are measured: 8 of 128, or 4 of Hopper's 64."""


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
        The curves of this prompt, and the dense video, see `render_watched`.

    Raises:
        TuningError: a layer made no call that could be measured; the message says why.
        GenerationError: the rendering failed.
    """
    layers = layers_of(renderer)
    per_head = (len(layers), len(steps), max(heads for _, heads in layers))
    error = np.full((len(arrangements), *per_head, len(points)), np.nan, np.float32)
    sparsity, size = np.full_like(error, np.nan), np.full(per_head, np.nan, np.float32)

    def look(layer: int, step: int, plain: UnmaskedCall) -> None:
        heads = slice(plain.q.shape[1])
        for number, (order, keep_text) in enumerate(arrangements):
            keep = kept_blocks(keep_text, plain.layout, backend.blocks)
            measured = measure(
                *in_order(plain, order), points, blocks=backend.blocks, keep=keep, scale=plain.scale,
                every=every, select_partial=select_partial,
            )  # fmt: skip
            # A step may make two calls (guidance without batching): both must hold the bound.
            at = (number, layer, step, heads)
            error[at] = np.fmax(error[at], measured.error.cpu().numpy())
            sparsity[at] = np.fmin(sparsity[at], measured.sparsity.cpu().numpy())
            size[layer, step, heads] = measured.size.cpu().numpy()

    rendering = render_watched(renderer, prompt, seed, look, steps=steps, backend=backend, on_step=on_step)
    curves = Curves(
        layers=layers,
        arrangements=tuple(arrangements),
        steps=tuple(steps),
        num_steps=renderer.settings.num_inference_steps,
        points=tuple(points),
        error=error,
        error_rms=error,
        sparsity=sparsity,
        size=size,
        num_inputs=1,
        select_partial=select_partial,
    )
    return curves, rendering


@dataclass(frozen=True)
class CalibratePrompt:
    """Calibrates on a prompt; what is not said here is as in `calibrate`.

    Args:
        backend: the kernel to calibrate for, as the configuration names it.
        cache: gets the dense video that this renders.
    """

    prompt: AnyPrompt
    seed: int
    steps: tuple[int, ...]
    arrangements: tuple[Arrangement, ...]
    points: tuple[HeadThresholds, ...]
    backend: str
    select_partial: bool
    cache: BaselineCache

    def run(self, session: ModelSession, emit: Emit) -> Curves:
        """Calibrate; every step is told as `StepDone`.

        Raises:
            TuningError: a layer made no call that could be measured.
            GenerationError: the rendering failed.
        """
        renderer = session.restore()
        curves, rendering = calibrate(
            renderer,
            self.prompt,
            self.seed,
            steps=self.steps,
            arrangements=self.arrangements,
            points=self.points,
            backend=choose_backend(self.backend, renderer.loaded.device),
            select_partial=self.select_partial,
            on_step=_telling(emit),
        )
        key = baseline_key(renderer, self.prompt, self.seed)
        self.cache.get_or_render(key, lambda: (rendering.frames, rendering.seconds))
        return curves


def _telling(emit: Emit) -> Callable[[int, int], None]:
    return lambda step, num_steps: emit(StepDone("calibration", "dense", step, num_steps))
