"""Yardsticks: what harmless changes do to the dense video, beside what the policy does."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparsetune.errors import GenerationError, OutOfMemoryError
from sparsetune.evaluation.result import EvaluationResult, YardstickSection
from sparsetune.metrics import compute_available
from sparsetune.models.prompts import as_prompt

if TYPE_CHECKING:
    from sparsetune.attention.handle import SparseHandle
    from sparsetune.evaluation.baseline import BaselineCache
    from sparsetune.evaluation.prompt import Frames, Pair, StepCallback
    from sparsetune.models.generation import Renderer
    from sparsetune.models.prompts import AnyPrompt

_LOG = logging.getLogger(__name__)
_STEPS = "steps="
POLICY = "policy"


@dataclass(frozen=True)
class Placed:
    """Means of one change over the prompts that have it; `name` is a yardstick's or `POLICY`."""

    name: str
    metrics: Mapping[str, float]  # of the changed video against the dense one
    sparse_psnr: float | None  # in dB, of the sparse video against the changed one; None for the policy
    num_prompts: int


@dataclass(frozen=True)
class Yardsticks:
    """Measures yardsticks (see `EvalConfig.yardsticks`) of prompts."""

    renderer: "Renderer"
    handle: "SparseHandle"
    cache: "BaselineCache"
    metrics: Sequence[str]
    on_step: "StepCallback | None" = None

    def measure(
        self, names: Sequence[str], prompt: "AnyPrompt", seed: int, pair: "Pair"
    ) -> tuple[dict[str, YardstickSection], dict[str, str]]:
        """Return the metrics by yardstick, and the reasons of those that can't be rendered here."""
        measured, unavailable = {}, {}
        for name in names:
            try:
                changed = self._frames(name, prompt, seed)
            except OutOfMemoryError:
                raise
            except GenerationError as error:
                _LOG.warning("no yardstick %s of %r: %s", name, as_prompt(prompt).text, error)
                unavailable[f"yardstick {name}"] = str(error)
                continue
            dense = compute_available(pair.dense, changed, self.metrics)[0]
            sparse = compute_available(changed, pair.sparse, self.metrics)[0]
            measured[name] = YardstickSection(dense=dense, sparse=sparse)
        return measured, unavailable

    def _frames(self, name: str, prompt: "AnyPrompt", seed: int) -> "Frames":
        if name == "seed":
            return self._baseline(self.renderer, replace(as_prompt(prompt), seed=seed + 1), seed + 1)
        if name.startswith(_STEPS):
            return self._baseline(self.renderer.with_steps(int(name.removeprefix(_STEPS))), prompt, seed)
        from sparsetune.evaluation.prompt import render, rendering_dense  # which loads torch
        from sparsetune.models.variants import VARIANTS

        with rendering_dense(self.handle), VARIANTS[name](self.renderer.loaded):
            return render(self.renderer, prompt, seed, "yardstick", self.on_step).frames

    def _baseline(self, renderer: "Renderer", prompt: "AnyPrompt", seed: int) -> "Frames":
        from sparsetune.evaluation.prompt import dense_baseline  # which loads torch

        return dense_baseline(renderer, self.handle, prompt, seed, self.cache, self.on_step, "yardstick").frames


def placed(result: EvaluationResult) -> tuple[Placed, ...]:
    """The policy and all yardsticks, the one with the highest mean PSNR first; empty where none was measured.

    The policy's means are over the prompts that have any yardstick.
    """
    rows = [row for row in result.detailed_results if row.yardsticks and row.psnr is not None]
    if not rows:
        return ()
    found = [Placed(POLICY, _means([row.metrics for row in rows]), None, len(rows))]
    for name in dict.fromkeys(name for row in rows for name in row.yardsticks):
        sections = [row.yardsticks[name] for row in rows if name in row.yardsticks]
        sparse_psnr = statistics.mean(one.sparse["psnr"] for one in sections)
        found.append(Placed(name, _means([one.dense for one in sections]), sparse_psnr, len(sections)))
    return tuple(sorted(found, key=lambda one: one.metrics["psnr"], reverse=True))


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(row[name] for row in rows) for name in rows[0] if all(name in row for row in rows)}


def label(name: str) -> str:
    """Name of a change in tables."""
    labels = {
        POLICY: "the policy",
        "kernel": "another dense kernel",
        "dtype": "another data type",
        "fp8": "FP8 weights",
        "seed": "another seed",
    }
    return labels.get(name) or f"{name.removeprefix(_STEPS)} steps"


def place_text(rows: Sequence[Placed]) -> str:
    """Where the policy is among the yardsticks, as a sentence."""
    psnr = {one.name: one.metrics["psnr"] for one in rows}
    policy = psnr[POLICY]
    more = [f"{label(name)} ({value:.2f} dB)" for name, value in psnr.items() if name != POLICY and value <= policy]
    less = [f"{label(name)} ({value:.2f} dB)" for name, value in psnr.items() if value > policy]
    parts = [f"less than {', '.join(more)}"] if more else []
    parts += [f"more than {', '.join(less)}"] if less else []
    return f"the policy changes the dense video ({policy:.2f} dB) {' and '.join(parts)}"
