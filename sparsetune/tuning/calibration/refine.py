"""Refining: a dense rendering of a prompt, with the lowest thresholds of every layer searched on the way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sparsetune.attention.backends import Backend, choose_backend
from sparsetune.attention.handle import kept_blocks
from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds, Rule
from sparsetune.attention.unmask import UnmaskedCall
from sparsetune.errors import TuningError
from sparsetune.executor import Emit, ModelSession, StepDone
from sparsetune.models.generation import Renderer
from sparsetune.models.prompts import AnyPrompt
from sparsetune.tuning.calibration.attention_tap import OnStep, in_order, layers_of, render_watched
from sparsetune.tuning.calibration.bounded_policy import DENSE, Bounds
from sparsetune.tuning.calibration.curves import UNREADABLE, Array, read_table, write_table
from sparsetune.tuning.calibration.threshold_search import Cuts, lowest_cuts

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Limits:
    """The lowest thresholds of each head that keep its error within a bound on every input seen.

    They are of a fixed simthreshd1 and token order. The error falls as a threshold rises, so what holds on all inputs
    is the largest of what holds on each: limits are merged in any order, exactly.

    Args:
        layers: (name, number of heads) of each layer.
        cut: the lowest cdfthreshd or topk, float32 (layers, heads); infinite where none holds the bound, NaN for heads
            that a layer doesn't have.
        pvthreshd: the lowest one at that cut, the same shape; NaN as above.
        num_inputs: prompts seen.
    """

    layers: tuple[tuple[str, int], ...]
    cut: Array
    pvthreshd: Array
    num_inputs: int

    @classmethod
    def none(cls, layers: tuple[tuple[str, int], ...], num_inputs: int = 0) -> "Limits":
        """Limits of no input, to which others are merged: 0 for every head."""
        cut = np.full((len(layers), max(heads for _, heads in layers)), np.nan, np.float32)
        for index, (_, heads) in enumerate(layers):
            cut[index, :heads] = 0.0
        return cls(layers, cut, cut.copy(), num_inputs)

    def merged(self, other: "Limits") -> "Limits":
        """Put the limits of further prompts to these.

        Raises:
            TuningError: the layers differ.
        """
        if self.layers != other.layers:
            raise TuningError("limits can be merged when they are of the same layers, but theirs differ")
        return replace(
            self,
            cut=np.maximum(self.cut, other.cut),
            pvthreshd=np.maximum(self.pvthreshd, other.pvthreshd),
            num_inputs=self.num_inputs + other.num_inputs,
        )

    def policy(self, start: Policy) -> Policy:
        """Give each head of a policy its limits; one that no cut below 1 keeps within the bound is dense.

        Args:
            start: what the limits were searched at: its simthreshd1, orders and rule hold.
        """
        layers = []
        for index, layer in enumerate(start.layers):
            # As a checkpoint gives them back: the shortest decimals that are the same in float32.
            cuts, pvs = ([float(str(value)) for value in table[index]] for table in (self.cut, self.pvthreshd))
            heads = tuple(
                _thresholds(layer.rule, head.simthreshd1, cuts[place], pvs[place])
                for place, head in enumerate(layer.heads)
            )
            layers.append(LayerThresholds(layer.name, heads, layer.order))
        return replace(start, layers=tuple(layers))

    def save(self, path: Path) -> None:
        """Write the limits as .npz: the two arrays as above, `about` a JSON text with the rest."""
        about = {"layers": self.layers, "num_inputs": self.num_inputs}
        write_table(path, SCHEMA_VERSION, about, cut=self.cut, pvthreshd=self.pvthreshd)

    @classmethod
    def load(cls, path: Path) -> "Limits":
        """Read limits that `save` wrote.

        Raises:
            TuningError: the file isn't that.
        """
        try:
            about, (cut, pvthreshd) = read_table(path, SCHEMA_VERSION, "cut", "pvthreshd")
            layers = tuple((str(name), int(heads)) for name, heads in about["layers"])
            if not cut.shape == pvthreshd.shape == cls.none(layers).cut.shape:
                raise ValueError(f"arrays of {cut.shape} and {pvthreshd.shape} for {len(layers)} layers")
            return cls(layers, cut, pvthreshd, int(about["num_inputs"]))
        except UNREADABLE as problem:
            raise TuningError(
                f"the limits must be a table that sparsetune wrote, but {path} can't be read as one ({problem}); "
                "remove it to search them again"
            ) from problem


def _thresholds(rule: Rule, sim: float, cut: float, pvthreshd: float) -> HeadThresholds:
    if cut >= 1.0:
        return DENSE[rule]
    if rule == "cdf":
        return HeadThresholds(sim, cdfthreshd=cut, pvthreshd=pvthreshd)
    return HeadThresholds(sim, topk=cut, pvthreshd=pvthreshd)


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

    def run(self, session: ModelSession, emit: Emit) -> Limits:
        """Refine; every step is told as `StepDone`.

        Raises:
            TuningError: a layer made no call that could be measured.
            GenerationError: the rendering failed.
        """
        renderer = session.restore()
        return refine(
            renderer,
            self.prompt,
            self.seed,
            start=self.start,
            bounds=self.bounds,
            steps=self.steps,
            backend=choose_backend(self.backend, renderer.loaded.device),
            on_step=lambda step, num_steps: emit(StepDone("refinement", "dense", step, num_steps)),
        )
