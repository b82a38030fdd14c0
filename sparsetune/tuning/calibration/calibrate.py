"""Calibration of a prompt: a dense rendering during which every attention layer's error and sparsity are measured."""

from dataclasses import dataclass

import numpy as np

from sparsetune.attention.backends import choose_backend
from sparsetune.attention.handle import kept_blocks
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.attention.unmask import UnmaskedCall
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.executor import Emit, ModelSession, StepDone
from sparsetune.models.prompts import AnyPrompt
from sparsetune.tuning.calibration.attention_tap import attention_layers, render_tapped, reordered
from sparsetune.tuning.calibration.curves import Arrangement, Curves
from sparsetune.tuning.calibration.mask_error import grid_errors

EVERY = 16
"""Every so many queries of each block are measured: 8 of 128, or 4 of Hopper's 64."""


@dataclass(frozen=True)
class CalibratePrompt:
    """Task that renders one prompt dense and measures every layer at the sampled steps."""

    prompt: AnyPrompt
    seed: int
    steps: tuple[int, ...]  # denoising steps to measure at
    arrangements: tuple[Arrangement, ...]
    points: tuple[HeadThresholds, ...]
    backend: str  # the kernel to calibrate for, as the configuration names it
    select_partial: bool  # whether partial last blocks are selected like any other
    cache: BaselineCache  # the dense video goes there

    def run(self, session: ModelSession, emit: Emit) -> Curves:
        renderer = session.restore()
        backend = choose_backend(self.backend, renderer.loaded.device)
        layers = attention_layers(renderer)
        per_head = (len(layers), len(self.steps), max(heads for _, heads in layers))
        error = np.full((len(self.arrangements), *per_head, len(self.points)), np.nan, np.float32)
        sparsity, size = np.full_like(error, np.nan), np.full(per_head, np.nan, np.float32)

        def on_attention(layer: int, step: int, call: UnmaskedCall) -> None:
            heads = slice(call.q.shape[1])
            for index, (order, keep_text) in enumerate(self.arrangements):
                keep = kept_blocks(keep_text, call.layout, backend.blocks)
                measured = grid_errors(
                    *reordered(call, order), self.points, blocks=backend.blocks, keep=keep, scale=call.scale,
                    every=EVERY, select_partial=self.select_partial,
                )  # fmt: skip
                # A step may make two calls (guidance without batching): both must be within the bound.
                at = (index, layer, step, heads)
                error[at] = np.fmax(error[at], measured.error.cpu().numpy())
                sparsity[at] = np.fmin(sparsity[at], measured.sparsity.cpu().numpy())
                size[layer, step, heads] = measured.size.cpu().numpy()

        rendering = render_tapped(
            renderer, self.prompt, self.seed, on_attention, steps=self.steps, backend=backend,
            on_step=lambda step, num_steps: emit(StepDone("calibration", "dense", step, num_steps)),
        )  # fmt: skip
        key = baseline_key(renderer, self.prompt, self.seed)
        self.cache.get_or_render(key, lambda: (rendering.frames, rendering.seconds))
        return Curves(
            layers=layers,
            arrangements=self.arrangements,
            steps=self.steps,
            num_steps=renderer.settings.num_inference_steps,
            points=self.points,
            error=error,
            error_rms=error,
            sparsity=sparsity,
            size=size,
            num_inputs=1,
            select_partial=self.select_partial,
        )
