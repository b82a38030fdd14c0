"""Seconds and memory of the parts of a tuning, measured on a few steps of the model."""

import statistics
import time
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
from sparsetune.bench.latency import device_clock, peak_memory, time_calls
from sparsetune.config import Config
from sparsetune.errors import TuningError
from sparsetune.evaluation.outputs import OutputFolder
from sparsetune.evaluation.prompt import Pair
from sparsetune.files import scratch_folder
from sparsetune.metrics import Frames, compute_available
from sparsetune.models.families import attention_sites
from sparsetune.models.generation import Renderer
from sparsetune.models.prompts import AnyPrompt
from sparsetune.models.sparsify import default_policy
from sparsetune.tuning.calibration.bounded_policy import Bounds
from sparsetune.tuning.calibration.calibrate import EVERY
from sparsetune.tuning.calibration.mask_error import grid_errors
from sparsetune.tuning.calibration.refine import search_call
from sparsetune.tuning.context import TuningContext

NUM_STEPS = 4
"""Denoising steps of the renderings that are timed; the first of them warms up."""

_KERNEL_CALLS = 20


@dataclass(frozen=True)
class StepCosts:
    """Seconds and memory of the parts of a tuning."""

    dense_step: float
    sparse_step: float
    fixed: float  # of a rendering outside of its steps: text encoding and decoding
    calls_per_step: float  # attention calls, over all layers
    head_calls_per_step: float  # heads of these calls, added up
    measure: float  # to calibrate one attention call, in all token orders and text rules
    refine: float  # to search the thresholds of one attention call's heads
    judge: float  # to compute a prompt's metrics in an evaluation, and to write its videos
    peak_dense_gib: float
    peak_sparse_gib: float
    peak_measure_gib: float
    kernel_call: float | None = None  # one step of SpargeAttn's search: its kernel for one head, and the comparison
    no_kernel: str = ""  # why `kernel_call` is None

    def dense(self, num_steps: int) -> float:
        """Seconds of a dense rendering."""
        return self.fixed + num_steps * self.dense_step

    def sparse(self, num_steps: int) -> float:
        return self.fixed + num_steps * self.sparse_step


def measure_costs(context: TuningContext) -> StepCosts:
    """Measure on short renderings of the first tune prompt, at the real size."""
    loaded, generation = context.renderer.loaded, context.config.generation
    steps = min(NUM_STEPS, generation.num_inference_steps)
    short = context.renderer.with_steps(steps)
    sites = attention_sites(loaded.pipe)
    prompt, seed = context.prompts[0], context.config.tune.seed
    num_heads: list[int] = []  # of each attention call
    samples: list[UnmaskedCall] = []  # the first that the backend can run
    refused = "it made no attention call"

    def attend(call: AttentionCall) -> Tensor:
        nonlocal refused
        num_heads.append(call.layer.num_heads)
        if not samples:
            plain = unmasked_call(call, context.backend)
            if isinstance(plain, Refusal):
                refused = plain.reason
            else:
                copies = {name: getattr(plain, name).clone() for name in ("q", "k", "v", "padding")}
                samples.append(replace(plain, **copies))
        return call.original()

    interception = Interception(sites, attend)
    try:
        with peak_memory(loaded.device) as dense_peak:
            dense_step, _, dense = _time_rendering(short, prompt, seed)  # its fixed part has what is done only once
    finally:
        interception.remove()
    if not samples:
        raise TuningError(f"cannot tune this model: none of its attention calls can run sparse: {refused}")
    sample = samples[0]
    with SparseHandle(sites, default_policy(loaded.pipe), context.backend), peak_memory(loaded.device) as sparse_peak:
        sparse_step, fixed, sparse = _time_rendering(short, prompt, seed)
    with peak_memory(loaded.device) as measure_peak, torch.inference_mode():
        measure, refine = _calibration_seconds(context, sample), _refinement_seconds(context, sample)
    kernel_call, no_kernel = _kernel_seconds(sample)
    return StepCosts(
        dense_step=dense_step,
        sparse_step=sparse_step,
        fixed=fixed,
        calls_per_step=len(num_heads) / steps,
        head_calls_per_step=sum(num_heads) / steps,
        measure=measure,
        refine=refine,
        judge=_judging_seconds(context.config, Pair(dense, sparse)),
        peak_dense_gib=dense_peak(),
        peak_sparse_gib=sparse_peak(),
        peak_measure_gib=measure_peak(),
        kernel_call=kernel_call,
        no_kernel=no_kernel,
    )


def _time_rendering(renderer: Renderer, prompt: AnyPrompt, seed: int) -> tuple[float, float, Frames]:
    """Seconds of a step after the first, and of the rendering outside of its steps; and the frames."""
    device = renderer.loaded.device
    stamps = [device_clock(device)]
    frames = renderer.render(prompt, seed, lambda step, num_steps: stamps.append(device_clock(device))).frames
    ended = device_clock(device)
    durations = [after - before for before, after in pairwise(stamps)]
    if not durations:  # a pipeline without step callbacks
        return (ended - stamps[0]) / renderer.settings.num_inference_steps, 0.0, frames
    step = statistics.median(durations[1:] or durations)
    return step, max(0.0, durations[0] - step) + ended - stamps[-1], frames


def _judging_seconds(config: Config, pair: Pair) -> float:
    started = time.perf_counter()
    compute_available(pair.dense, pair.sparse, config.eval.metrics)
    if config.eval.save_videos:
        with scratch_folder() as folder:
            OutputFolder(folder, "", False, config.generation.fps).write_videos(0, pair, difference=False)
    return time.perf_counter() - started


def _calibration_seconds(context: TuningContext, call: UnmaskedCall) -> float:
    blocks, points = context.backend.blocks, context.points
    keep = kept_blocks(context.keep_text[0], call.layout, blocks)

    def run(num_points: int) -> None:
        grid_errors(
            call.q, call.k, call.v, points[:num_points], blocks=blocks, keep=keep, scale=call.scale,
            every=EVERY, select_partial=context.config.tune.select_partial,
        )  # fmt: skip

    run(len(points) if call.q.is_cuda else 1)  # warms up; a GPU's kernels are compiled for all of them
    (ms,) = time_calls(lambda: run(len(points)), call.q.device, repeats=1, warm_up=0, at_once=1)
    return len(context.arrangements) * ms / 1e3


def _refinement_seconds(context: TuningContext, call: UnmaskedCall) -> float:
    """Seconds to search a call's thresholds, with a simthreshd1 that calibration might choose."""
    tune = context.config.tune
    head = HeadThresholds(-1.0, cdfthreshd=1.0) if tune.rules[0] == "cdf" else HeadThresholds(-1.0, topk=1.0)
    start = Policy.uniform(
        [("layer", call.q.shape[1])], head, keep_text=context.keep_text[0], select_partial=tune.select_partial
    )
    bounds = Bounds(tune.l1, tune.pv_l1)
    (ms,) = time_calls(
        lambda: search_call(call, start, 0, bounds, context.backend), call.q.device, repeats=1, warm_up=1, at_once=1
    )
    return ms / 1e3


def _kernel_seconds(call: UnmaskedCall) -> tuple[float | None, str]:
    """Seconds of one kernel call for one head and of the comparison that follows it, or why it can't be made."""
    q, k, v = (x[:, :1] for x in (call.q, call.k, call.v))
    if reason := SpargeBackend.missing(q.device) or SpargeBackend(q.device).refusal(q, k, v):
        return None, reason
    backend = SpargeBackend(q.device)
    thresholds = LayerThresholds.uniform("head", 1, SPARGE_DEFAULTS).tensors(q.device)
    dense = F.scaled_dot_product_attention(q, k, v, scale=call.scale).float()

    def run() -> float:
        output = backend.attend(q, k, v, thresholds, scale=call.scale, keep=range(0)).output.float()
        return float(F.cosine_similarity(output.flatten(), dense.flatten(), dim=0) + (output - dense).abs().sum())

    (ms,) = time_calls(run, q.device, repeats=1, warm_up=1, at_once=_KERNEL_CALLS)
    return ms / 1e3, ""
