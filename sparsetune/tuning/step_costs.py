"""What one step of a rendering costs here, measured."""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.backends.sparge import SpargeBackend
from sparsetune.attention.handle import SparseHandle, kept_blocks
from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import SPARGE_DEFAULTS, HeadThresholds, LayerThresholds
from sparsetune.attention.unmask import Refusal, UnmaskedCall, unmasked_call
from sparsetune.errors import TuningError
from sparsetune.models.families import attention_sites
from sparsetune.models.generation import Renderer
from sparsetune.models.sparsify import default_policy
from sparsetune.tuning.calibration.bounded_policy import Bounds
from sparsetune.tuning.calibration.calibrate import EVERY
from sparsetune.tuning.calibration.mask_error import measure
from sparsetune.tuning.calibration.refine import search_call
from sparsetune.tuning.context import TuningContext

NUM_STEPS = 4
"""Denoising steps of the renderings that are timed; the first of them warms up."""

_KERNEL_CALLS = 20


@dataclass(frozen=True)
class StepCosts:
    """Seconds and memory of the parts that a search is made of.

    Args:
        dense_step, sparse_step: seconds of one denoising step.
        fixed: seconds of a rendering outside of its steps: text encoding and decoding.
        calls_per_step: attention calls of a step, over all layers.
        head_calls_per_step: heads of these calls, added up.
        measure: seconds to measure one attention call as calibration does, in all token orders and text rules.
        refine: seconds to search the thresholds of one attention call's heads.
        peak_dense_gib, peak_sparse_gib, peak_measure_gib: the most memory held while it ran: allocated on the GPU,
            and on a CPU resident in the process since its start.
        kernel_call: seconds of one step of SpargeAttn's search: its kernel for one head, and the comparison.
        no_kernel: why there is no `kernel_call`; empty where there is one.
    """

    dense_step: float
    sparse_step: float
    fixed: float
    calls_per_step: float
    head_calls_per_step: float
    measure: float
    refine: float
    peak_dense_gib: float
    peak_sparse_gib: float
    peak_measure_gib: float
    kernel_call: float | None = None
    no_kernel: str = ""

    def dense(self, num_steps: int) -> float:
        """Seconds of a dense rendering."""
        return self.fixed + num_steps * self.dense_step

    def sparse(self, num_steps: int) -> float:
        """Seconds of a sparse rendering."""
        return self.fixed + num_steps * self.sparse_step


def measure_costs(bench: TuningContext) -> StepCosts:
    """Measure on short renderings of the first tune prompt, at the real size.

    Raises:
        TuningError: no attention call could be measured; the message says why.
        GenerationError: a rendering failed.
    """
    steps = min(NUM_STEPS, bench.config.generation.num_inference_steps)
    device = bench.renderer.loaded.device
    settings = bench.config.generation.model_copy(update={"num_inference_steps": steps})
    short = Renderer(bench.renderer.loaded, settings)
    sites = attention_sites(short.loaded.pipe)
    watched = _Watched(bench)
    interception = Interception(sites, watched.attend)
    try:
        with _peak_memory(device) as dense_peak:
            dense = _timed(short, bench)
    finally:
        interception.remove()
    call = watched.kept()
    with (
        SparseHandle(sites, default_policy(short.loaded.pipe), bench.backend),
        _peak_memory(device) as sparse_peak,
    ):
        sparse = _timed(short, bench)
    with _peak_memory(device) as measure_peak, torch.inference_mode():
        measure, refine = _measure_seconds(bench, call), _refine_seconds(bench, call)
    kernel = _kernel_seconds(call)
    return StepCosts(
        dense_step=dense.step,
        sparse_step=sparse.step,
        fixed=sparse.fixed,  # the first rendering's includes what is done only once
        calls_per_step=watched.num_calls / steps,
        head_calls_per_step=watched.num_heads / steps,
        measure=measure,
        refine=refine,
        peak_dense_gib=dense_peak(),
        peak_sparse_gib=sparse_peak(),
        peak_measure_gib=measure_peak(),
        kernel_call=None if isinstance(kernel, str) else kernel,
        no_kernel=kernel if isinstance(kernel, str) else "",
    )


class _Watched:
    """Counts the attention calls of a dense rendering, and keeps the first that can be measured."""

    def __init__(self, bench: TuningContext) -> None:
        self.num_calls = self.num_heads = 0
        self._backend = bench.backend
        self._kept: UnmaskedCall | None = None
        self._refused = "it made no attention call"

    def attend(self, call: AttentionCall) -> Tensor:
        self.num_calls += 1
        self.num_heads += call.layer.num_heads
        if self._kept is None:
            plain = unmasked_call(call, self._backend)
            if isinstance(plain, Refusal):
                self._refused = plain.reason
            else:
                copies = {name: getattr(plain, name).clone() for name in ("q", "k", "v", "padding")}
                self._kept = replace(plain, **copies)
        return call.original()

    def kept(self) -> UnmaskedCall:
        if self._kept is None:
            raise TuningError(f"some attention call must be one that can be tuned, but none is: {self._refused}")
        return self._kept


@dataclass(frozen=True)
class _Timing:
    """Seconds of a step after the first, and of a rendering outside of its steps."""

    step: float
    fixed: float


def _timed(renderer: Renderer, bench: TuningContext) -> _Timing:
    device = renderer.loaded.device
    stamps: list[float] = []

    def on_step(_step: int, _num_steps: int) -> None:
        stamps.append(_now(device))

    started = _now(device)
    renderer.render(bench.prompts[0], bench.config.tune.seed, on_step)
    ended = _now(device)
    if not stamps:  # a pipeline that doesn't tell of its steps: its whole time is theirs
        return _Timing((ended - started) / renderer.settings.num_inference_steps, 0.0)
    first = stamps[0] - started
    step = statistics.median(b - a for a, b in pairwise(stamps)) if len(stamps) > 1 else first
    return _Timing(step, max(0.0, first - step) + ended - stamps[-1])


def _measure_seconds(bench: TuningContext, call: UnmaskedCall) -> float:
    """Seconds to measure a call in every arrangement."""
    tune, blocks, points = bench.config.tune, bench.backend.blocks, bench.points
    keep = kept_blocks(bench.keep_text[0], call.layout, blocks)

    def once(number: int) -> None:
        measure(
            call.q, call.k, call.v, points[:number], blocks=blocks, keep=keep, scale=call.scale,
            every=EVERY, select_partial=tune.select_partial,
        )  # fmt: skip

    once(1)
    return len(bench.arrangements) * _seconds(lambda: once(len(points)), call.q.device)


def _refine_seconds(bench: TuningContext, call: UnmaskedCall) -> float:
    """Seconds to search a call's thresholds, from a similarity threshold that calibration might choose."""
    tune, backend = bench.config.tune, bench.backend
    head = HeadThresholds(-1.0, cdfthreshd=1.0) if tune.rules[0] == "cdf" else HeadThresholds(-1.0, topk=1.0)
    start = Policy.uniform(
        [("layer", call.q.shape[1])], head, keep_text=bench.keep_text[0], select_partial=tune.select_partial
    )

    def once() -> None:
        search_call(call, start, 0, Bounds(tune.l1, tune.pv_l1), backend)

    once()
    return _seconds(once, call.q.device)


def _kernel_seconds(call: UnmaskedCall) -> float | str:
    """Seconds of one kernel call for one head with the comparison that follows it, or why it can't run here."""
    q, k, v = (x[:, :1] for x in (call.q, call.k, call.v))
    reason = SpargeBackend.missing(q.device)
    if reason is not None:
        return reason
    backend = SpargeBackend(q.device)
    reason = backend.refusal(q, k, v)
    if reason is not None:
        return reason
    thresholds = LayerThresholds.uniform("head", 1, SPARGE_DEFAULTS).tensors(q.device)
    dense = F.scaled_dot_product_attention(q, k, v, scale=call.scale).float()

    def once() -> float:
        found = backend.attend(q, k, v, thresholds, scale=call.scale, keep=range(0)).output.float()
        return float(F.cosine_similarity(found.flatten(), dense.flatten(), dim=0) + (found - dense).abs().sum())

    once()
    return _seconds(lambda: [once() for _ in range(_KERNEL_CALLS)], q.device) / _KERNEL_CALLS


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = _now(device)
    work()
    return _now(device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Give what tells, after the block, the most GiB that were held."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    peak: list[float] = []
    yield lambda: peak[0]
    if device.type == "cuda":
        peak.append(torch.cuda.max_memory_allocated(device) / 2**30)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30)
