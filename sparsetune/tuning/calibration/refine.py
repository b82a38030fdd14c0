"""Refinement: the lowest thresholds of every head within an error bound, searched during dense renderings."""

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
from sparsetune.models.prompts import AnyPrompt
from sparsetune.tuning.calibration.attention_tap import attention_layers, render_tapped, reordered
from sparsetune.tuning.calibration.bounded_policy import DENSE, Bounds
from sparsetune.tuning.calibration.curves import Array, read_table, reading, write_table
from sparsetune.tuning.calibration.threshold_search import LowestThresholds, lowest_thresholds

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RefinedThresholds:
    """The lowest thresholds of each head whose error is within a bound for every prompt.

    simthreshd1 and token order are fixed. The error falls as a threshold rises, so the threshold for several prompts
    is the largest of theirs: merging is exact, in any order. Arrays are float32 (layers, heads), NaN for heads that a
    layer doesn't have.
    """

    layers: tuple[tuple[str, int], ...]  # name and number of heads
    mask_threshold: Array  # the lowest cdfthreshd or topk; infinite where none is within the bound
    pvthreshd: Array  # the lowest one at that mask threshold
    num_inputs: int  # prompts

    @classmethod
    def zeros(cls, layers: tuple[tuple[str, int], ...], num_inputs: int = 0) -> "RefinedThresholds":
        """0 for every head: neutral when merged."""
        table = np.full((len(layers), max(heads for _, heads in layers)), np.nan, np.float32)
        for index, (_, heads) in enumerate(layers):
            table[index, :heads] = 0.0
        return cls(layers, table, table.copy(), num_inputs)

    def merged(self, other: "RefinedThresholds") -> "RefinedThresholds":
        if self.layers != other.layers:
            raise TuningError("cannot merge thresholds of different layers")
        return replace(
            self,
            mask_threshold=np.maximum(self.mask_threshold, other.mask_threshold),
            pvthreshd=np.maximum(self.pvthreshd, other.pvthreshd),
            num_inputs=self.num_inputs + other.num_inputs,
        )

    def policy(self, start: Policy) -> Policy:
        """Replace the thresholds of the policy that was refined; a head without a mask threshold below 1 is dense."""
        layers = []
        for index, layer in enumerate(start.layers):
            # As read from a checkpoint: the shortest decimals with the same float32 value.
            masks, pvs = (
                [float(str(value)) for value in table[index]] for table in (self.mask_threshold, self.pvthreshd)
            )
            heads = tuple(
                _thresholds(layer.rule, head.simthreshd1, masks[number], pvs[number])
                for number, head in enumerate(layer.heads)
            )
            layers.append(LayerThresholds(layer.name, heads, layer.order))
        return replace(start, layers=tuple(layers))

    def save(self, path: Path) -> None:
        about = {"layers": self.layers, "num_inputs": self.num_inputs}
        write_table(path, SCHEMA_VERSION, about, cut=self.mask_threshold, pvthreshd=self.pvthreshd)

    @classmethod
    def load(cls, path: Path) -> "RefinedThresholds":
        with reading(path, "thresholds", "search them again"):
            about, (mask_threshold, pvthreshd) = read_table(path, SCHEMA_VERSION, "cut", "pvthreshd")
            layers = tuple((str(name), int(heads)) for name, heads in about["layers"])
            if not mask_threshold.shape == pvthreshd.shape == cls.zeros(layers).pvthreshd.shape:
                raise ValueError(f"arrays of {mask_threshold.shape} and {pvthreshd.shape} for {len(layers)} layers")
            return cls(layers, mask_threshold, pvthreshd, int(about["num_inputs"]))


def _thresholds(rule: Rule, sim: float, mask_threshold: float, pvthreshd: float) -> HeadThresholds:
    if mask_threshold >= 1.0:
        return DENSE[rule]
    if rule == "cdf":
        return HeadThresholds(sim, cdfthreshd=mask_threshold, pvthreshd=pvthreshd)
    return HeadThresholds(sim, topk=mask_threshold, pvthreshd=pvthreshd)


def search_call(call: UnmaskedCall, start: Policy, layer: int, bounds: Bounds, backend: Backend) -> LowestThresholds:
    of_layer = start.layers[layer]
    return lowest_thresholds(
        *reordered(call, start.orders[layer]),
        torch.tensor([head.simthreshd1 for head in of_layer.heads], device=call.q.device),
        bounds,
        backend=backend,
        scale=call.scale,
        keep=kept_blocks(start.keep_text, call.layout, backend.blocks),
        rule=of_layer.rule,
        select_partial=start.select_partial,
    )


@dataclass(frozen=True)
class RefinePrompt:
    """Task that renders one prompt dense and searches every layer's lowest thresholds at the sampled steps."""

    prompt: AnyPrompt
    seed: int
    start: Policy  # each head's simthreshd1 and order, each layer's rule, and what is always computed
    bounds: Bounds
    steps: tuple[int, ...]  # denoising steps to search at
    backend: str  # the kernel to search for, as the configuration names it

    def run(self, session: ModelSession, emit: Emit) -> RefinedThresholds:
        renderer = session.restore()
        backend = choose_backend(self.backend, renderer.loaded.device)
        refined = RefinedThresholds.zeros(attention_layers(renderer), num_inputs=1)

        def on_attention(layer: int, step: int, call: UnmaskedCall) -> None:
            found = search_call(call, self.start, layer, self.bounds, backend)
            for table, lowest in ((refined.mask_threshold, found.mask_threshold), (refined.pvthreshd, found.pvthreshd)):
                of_layer = table[layer, : len(lowest)]
                np.maximum(of_layer, lowest.cpu().numpy(), out=of_layer)

        render_tapped(
            renderer, self.prompt, self.seed, on_attention, steps=self.steps, backend=backend,
            on_step=lambda step, num_steps: emit(StepDone("refinement", "dense", step, num_steps)),
        )  # fmt: skip
        return refined
