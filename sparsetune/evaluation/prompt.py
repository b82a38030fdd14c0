"""Dense and sparse rendering of one prompt with the same seed, and their metrics."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparsetune.attention.backends import skips_work
from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.errors import GenerationError, OutOfMemoryError
from sparsetune.evaluation.baseline import Baseline, BaselineCache
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.metrics import compute_available
from sparsetune.models.prompts import AnyPrompt, as_prompt

if TYPE_CHECKING:
    from concurrent.futures import Future

    from sparsetune.attention.handle import SparseHandle
    from sparsetune.attention.stats import SparsityStats
    from sparsetune.evaluation.result import PolicySection
    from sparsetune.executor import Side
    from sparsetune.models.generation import Renderer, Rendering

Frames = NDArray[np.uint8]
"""RGB video, uint8 of shape (frames, height, width, 3)."""

StepCallback = Callable[["Side", int, int, bool], None]
"""Called with what is rendered, the steps done (from 1), all steps, and whether the video came from the cache."""


def speedup(dense: float | None, sparse: float | None) -> float | None:
    """Return dense over sparse seconds; None where either wasn't measured."""
    return dense / sparse if dense and sparse else None


@dataclass(frozen=True)
class PromptResult:
    """Metrics of one prompt's sparse video against its dense one; of a failed prompt only `error`.

    `sparsity` is the fraction of block pairs not computed, over all self-attention calls; `sparsity_active` the same
    over sparse calls only.
    """

    prompt: str
    seed: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)  # reasons by metric
    sparsity: float | None = None
    sparsity_active: float | None = None
    blocks_run: float | None = None  # fraction of the blocks' forwards that ran; see `SparsityStats`
    attention_computed: float | None = None  # fraction of a dense generation's block pairs
    seconds_dense: float | None = None  # of the whole rendering, perhaps by an earlier run
    seconds_sparse: float | None = None
    # Seconds of the denoising, where the kernel or a cache skips work: dense steps, timed just before the sparse ones
    denoising_dense: float | None = None
    denoising_sparse: float | None = None
    stats: "SparsityStats | None" = None  # of the sparse rendering
    error: str | None = None
    dense_cached: bool = False
    # Of a trial, side by side, as mp4: a future where it is encoded beside the next rendering
    video: "Future[bytes | None] | bytes | None" = field(default=None, repr=False, compare=False)

    @property
    def speedup(self) -> float | None:
        """Denoising seconds of dense over those of sparse; None where they weren't timed."""
        return speedup(self.denoising_dense, self.denoising_sparse)

    @property
    def cost(self) -> float | None:
        """Seconds of denoising as a share of dense, timed beside; of the rendering where that wasn't timed."""
        if self.denoising_dense and self.denoising_sparse:
            return self.denoising_sparse / self.denoising_dense
        return self.seconds_sparse


@dataclass(frozen=True)
class Pair:
    dense: Frames
    sparse: Frames


def evaluate_prompt(
    renderer: "Renderer",
    handle: "SparseHandle",
    prompt: AnyPrompt,
    seed: int,
    cache: BaselineCache,
    metrics: Sequence[str],
    on_step: StepCallback | None = None,
) -> tuple[PromptResult, Pair | None]:
    """Render a prompt under the handle's policy and compute metrics against its dense video.

    The handle is installed on the renderer's pipeline; its counters are reset. `seed` holds for both renderings where
    the prompt has none of its own. Where NaN or black frames came out, the result has only `error`, without videos.
    """
    given = as_prompt(prompt)
    seed = seed if given.seed is None else given.seed
    try:
        dense = dense_baseline(renderer, handle, prompt, seed, cache, on_step)
        denoising_dense = _denoising_dense(renderer, handle, prompt, seed)
        handle.reset()
        sparse = render(renderer, prompt, seed, "sparse", on_step)
    except OutOfMemoryError:
        raise  # it would hit every other prompt too
    except GenerationError as error:
        return PromptResult(given.text, seed, error=str(error)), None
    stats = handle.stats()
    values, unavailable = compute_available(dense.frames, sparse.frames, metrics)
    result = PromptResult(
        prompt=given.text,
        seed=seed,
        metrics=values,
        unavailable=unavailable,
        sparsity=stats.sparsity,
        sparsity_active=stats.sparsity_active,
        blocks_run=stats.blocks_run,
        attention_computed=stats.attention_computed,
        seconds_dense=dense.seconds,
        seconds_sparse=sparse.seconds,
        denoising_dense=denoising_dense,
        denoising_sparse=None if denoising_dense is None else sparse.denoising_seconds,
        stats=stats,
        dense_cached=dense.cached,
    )
    return result, Pair(dense.frames, sparse.frames)


def _denoising_dense(renderer: "Renderer", handle: "SparseHandle", prompt: AnyPrompt, seed: int) -> float | None:
    """Time dense steps now, and so beside the sparse ones: a cached video's seconds are of another day.

    They run without the interception, as without sparsetune. A policy's first time also warms its kernels up. None
    where the kernel computes every pair and no cache skips blocks, so that seconds say nothing.
    """
    if not saves_seconds(handle.backend.name, handle.policy):
        return None
    if handle.warm != handle.policy and skips_work(handle.backend.name):
        warm = handle.policy
        with with_policy(handle, replace(warm, schedule=DenseSchedule(), cache=None)):
            renderer.step_seconds(prompt, seed, num_steps=1)
        handle.warm = warm
    with handle.paused():
        step = renderer.step_seconds(prompt, seed)
    return None if step is None else step * renderer.settings.num_inference_steps


def dense_baseline(
    renderer: "Renderer",
    handle: "SparseHandle | None",
    prompt: AnyPrompt,
    seed: int,
    cache: BaselineCache,
    on_step: StepCallback | None = None,
    side: "Side" = "dense",
) -> Baseline:
    """Read a prompt's dense video from the cache, or render and store it.

    `handle` is the one installed on the pipeline, if any; it runs dense meanwhile. `on_step` is called once, as cached,
    where nothing was rendered.
    """

    def rendered() -> tuple[Frames, float]:
        with rendering_dense(handle):
            video = render(renderer, prompt, seed, side, on_step)
        return video.frames, video.seconds

    found = cache.get_or_render(baseline_key(renderer, prompt, seed), rendered)
    if found.cached and on_step is not None:
        num_steps = renderer.settings.num_inference_steps
        on_step(side, num_steps, num_steps, True)
    return found


def saves_seconds(kernel: str, policy: "Policy | PolicySection") -> bool:
    """Whether seconds say anything of a policy: its kernel skips work, or a cache skips blocks."""
    return skips_work(kernel) or policy.cache is not None


def rendering_dense(handle: "SparseHandle | None") -> contextlib.AbstractContextManager[None]:
    if handle is None:
        return contextlib.nullcontext()
    return with_policy(handle, replace(handle.policy, schedule=DenseSchedule(1.0), cache=None))


@contextlib.contextmanager
def with_policy(handle: "SparseHandle", policy: Policy) -> Iterator[None]:
    """Install another policy within the context, in all its layers: the break-even table is off meanwhile."""
    before, break_even = handle.policy, handle.break_even
    handle.break_even = None
    handle.policy = policy
    try:
        yield
    finally:
        handle.break_even = break_even
        handle.policy = before


def render(
    renderer: "Renderer", prompt: AnyPrompt, seed: int, side: "Side", on_step: StepCallback | None
) -> "Rendering":
    if on_step is None:
        return renderer.render(prompt, seed, None)
    return renderer.render(prompt, seed, lambda step, num_steps: on_step(side, step, num_steps, False))
