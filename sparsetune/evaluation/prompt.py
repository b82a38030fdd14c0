"""One prompt rendered dense and sparse with the same seed, and what tells the two apart."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.errors import GenerationError, OutOfMemoryError
from sparsetune.evaluation.baseline import Baseline, BaselineCache
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.metrics import compute_available
from sparsetune.models.prompts import AnyPrompt, as_prompt

if TYPE_CHECKING:
    from sparsetune.attention.handle import SparseHandle
    from sparsetune.attention.stats import SparsityStats
    from sparsetune.executor import Side
    from sparsetune.models.generation import OnStep, Renderer, Rendering

Frames = NDArray[np.uint8]
"""RGB video, uint8 of shape (frames, height, width, 3)."""

Watch = Callable[["Side", int, int, bool], None]
"""Told what is being rendered, the steps done (from 1), all steps, and whether the video came from the cache."""


@dataclass(frozen=True)
class PromptResult:
    """What one prompt's sparse video is worth against its dense one.

    Args:
        prompt: the text.
        seed: of both renderings.
        metrics: value by metric name; empty when the prompt failed.
        unavailable: metrics that could not be computed here, with the reason.
        sparsity: fraction of block pairs not computed, over all self-attention calls; None when it failed.
        sparsity_active: the same over sparse calls only.
        seconds_dense: the dense rendering's seconds, as measured when it was rendered (perhaps by an earlier run).
        seconds_sparse: the sparse rendering's seconds.
        stats: the counters of the sparse rendering.
        error: why the prompt has no numbers; None when it has.
        dense_cached: whether the dense video came from the cache.
    """

    prompt: str
    seed: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)
    sparsity: float | None = None
    sparsity_active: float | None = None
    seconds_dense: float | None = None
    seconds_sparse: float | None = None
    stats: "SparsityStats | None" = None
    error: str | None = None
    dense_cached: bool = False


@dataclass(frozen=True)
class Pair:
    """The two videos of a prompt, RGB uint8 of shape (frames, height, width, 3)."""

    dense: Frames
    sparse: Frames


def evaluate_prompt(
    renderer: "Renderer",
    handle: "SparseHandle",
    prompt: AnyPrompt,
    seed: int,
    cache: BaselineCache,
    metrics: Sequence[str],
    watch: Watch | None = None,
) -> PromptResult:
    """Render a prompt under the handle's policy and judge it against its dense video.

    Args:
        renderer: of the pipeline that the handle is installed on.
        handle: the policy at work; its counters are reset.
        prompt: what is rendered.
        seed: of both renderings, where the prompt has none of its own.
        cache: where the dense video is read from, or kept in when it must be rendered.
        metrics: names of registered metrics.
        watch: told of every step.

    Returns:
        The result; one without numbers but with `error` where NaN or black frames came out.

    Raises:
        OutOfMemoryError: which no other prompt would escape.
        MetricError: a metric is unknown, or gave no finite number.
    """
    return judge(renderer, handle, prompt, seed, cache, metrics, watch)[0]


def judge(
    renderer: "Renderer",
    handle: "SparseHandle",
    prompt: AnyPrompt,
    seed: int,
    cache: BaselineCache,
    metrics: Sequence[str],
    watch: Watch | None = None,
) -> tuple[PromptResult, Pair | None]:
    """Do as `evaluate_prompt`, and give the videos too; None where the prompt failed."""
    given = as_prompt(prompt)
    seed = seed if given.seed is None else given.seed
    try:
        dense = dense_baseline(renderer, handle, prompt, seed, cache, watch)
        handle.reset()
        sparse = render(renderer, prompt, seed, "sparse", watch)
    except OutOfMemoryError:
        raise
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
        seconds_dense=dense.seconds,
        seconds_sparse=sparse.seconds,
        stats=stats,
        dense_cached=dense.cached,
    )
    return result, Pair(dense.frames, sparse.frames)


def dense_baseline(
    renderer: "Renderer",
    handle: "SparseHandle | None",
    prompt: AnyPrompt,
    seed: int,
    cache: BaselineCache,
    watch: Watch | None = None,
) -> Baseline:
    """Read a prompt's dense video from the cache, or render and keep it.

    Args:
        renderer: of the pipeline.
        handle: the handle installed on it, kept from working meanwhile; None where none is.
        prompt: what is rendered.
        seed: of the rendering.
        cache: the cache.
        watch: told of every step; once, as cached, where nothing was rendered.

    Raises:
        GenerationError: rendering failed.
        CacheError: the cache's folder can't be used.
    """

    def rendered() -> tuple[Frames, float]:
        with rendering_dense(handle):
            video = render(renderer, prompt, seed, "dense", watch)
        return video.frames, video.seconds

    found = cache.get_or_render(baseline_key(renderer, prompt, seed), rendered)
    if found.cached and watch is not None:
        num_steps = renderer.settings.num_inference_steps
        watch("dense", num_steps, num_steps, True)
    return found


@contextlib.contextmanager
def rendering_dense(handle: "SparseHandle | None") -> Iterator[None]:
    """Have every attention call run as the pipeline made it while the block runs."""
    if handle is None:
        yield
        return
    with running(handle, replace(handle.policy, schedule=DenseSchedule(1.0))):
        yield


@contextlib.contextmanager
def running(handle: "SparseHandle", policy: Policy) -> Iterator[None]:
    """Put another policy to work while the block runs, in all its layers, whether that pays or not."""
    before, break_even = handle.policy, handle.break_even
    handle.break_even = None
    handle.policy = policy
    try:
        yield
    finally:
        handle.break_even = break_even
        handle.policy = before


def render(renderer: "Renderer", prompt: AnyPrompt, seed: int, side: "Side", watch: Watch | None) -> "Rendering":
    """Render a prompt as the pipeline stands.

    Raises:
        GenerationError: rendering failed.
    """
    on_step: OnStep | None = None
    if watch is not None:

        def on_step(step: int, num_steps: int) -> None:
            watch(side, step, num_steps, False)

    return renderer.render(prompt, seed, on_step)
