"""Time and memory of calls, and the latency of attention: dense kernels against sparse ones at forced sparsities."""

import contextlib
import functools
import math
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsetune.attention.backends import Backend
from sparsetune.attention.breakeven import ShapeTimes, SparseTime, dtype_name
from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.attention.unmask import UnmaskedCall, attend_padded, head_dim_refusal

FORCED = (
    *(HeadThresholds(-1.0, topk=topk) for topk in (1.0, 0.9, 0.8, 0.65, 0.5, 0.3, 0.1)),
    *(HeadThresholds(-1.0, cdfthreshd=cdfthreshd) for cdfthreshd in (0.98, 0.9, 0.7)),
)
"""Thresholds for sparsities from 0 to about 0.9; with simthreshd1 -1 the rule selects among all whole blocks."""

_DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def device_clock(device: torch.device) -> float:
    """Return `time.perf_counter()` once a GPU's work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_calls(
    run: Callable[[], object], device: torch.device, *, repeats: int = 10, warm_up: int = 2, at_once: int = 4
) -> list[float]:
    """Return milliseconds a call, `repeats` times.

    On a GPU each is the mean of `at_once` calls between two events: like a model, without synchronizing in between.
    """
    for _ in range(warm_up):
        run()
    if device.type != "cuda":
        return [_cpu_ms(run) for _ in range(repeats)]
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        return [_cuda_ms(run, at_once) for _ in range(repeats)]


def _cpu_ms(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def _cuda_ms(run: Callable[[], object], at_once: int) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    for _ in range(at_once):
        run()
    after.record()
    after.synchronize()
    elapsed: float = before.elapsed_time(after)
    return elapsed / at_once


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield a function that returns, after the block, its peak memory in GiB.

    That is what was allocated on a GPU; on a CPU it is what was resident in the process since its start.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    peak: list[float] = []
    yield lambda: peak[0]
    if device.type == "cuda":
        peak.append(torch.cuda.max_memory_allocated(device) / 2**30)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30)


def time_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backends: Sequence[Backend],
    *,
    repeats: int = 10,
    forced: Sequence[HeadThresholds] = FORCED,
    on_time: Callable[[str, float], None] = lambda name, milliseconds: None,
) -> ShapeTimes:
    """Time dense attention by each kernel there is, and sparse attention by each backend with `forced` thresholds.

    q, k and v are (batch, heads, tokens, head_dim). `on_time` gets the name and median milliseconds of every kernel.
    """

    def median(name: str, run: Callable[[], object]) -> float:
        latency = statistics.median(time_calls(run, q.device, repeats=repeats))
        on_time(name, latency)
        return latency

    dense = {name: median(f"dense {name}", run) for name, run in _dense_calls(q, k, v).items()}
    batch, heads, tokens, head_dim = q.shape
    scale = head_dim**-0.5
    unmasked = UnmaskedCall(q, k, v, TokenLayout((1, 1, tokens), range(0)), scale, q[..., :0, :])
    sparse = []
    for backend in backends:
        if head_dim_refusal(backend, unmasked) is not None:
            continue
        num_q, num_k = backend.blocks.counts(tokens, k.shape[-2])
        for head in forced:
            thresholds = LayerThresholds.uniform("bench", heads, head).tensors(q.device)
            run = functools.partial(attend_padded, backend, q, k, v, thresholds, scale=scale, keep=range(1))
            sparsity = 1.0 - float(run().computed.sum()) / (batch * heads * num_q * num_k)
            latency = median(f"{backend.name} {head.rule} at {sparsity:.2f}", run)
            clipped = min(max(sparsity, 0.0), 1.0)
            sparse.append(SparseTime(kernel=backend.name, rule=head.rule, sparsity=clipped, latency_ms=latency))
    return ShapeTimes(
        batch=batch, heads=heads, tokens=tokens, head_dim=head_dim, dtype=dtype_name(q.dtype), dense_ms=dense,
        sparse=tuple(sparse),
    )  # fmt: skip


def _dense_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v)}
    if not q.is_cuda:
        return calls

    def run(kernel: SDPBackend) -> None:
        with sdpa_kernel(kernel):
            F.scaled_dot_product_attention(q, k, v)

    for name, kernel in _DENSE.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of each reason why a kernel doesn't do
            try:
                run(kernel)
            except RuntimeError:  # it isn't built, or refuses this dtype or head_dim
                continue
        calls[name] = functools.partial(run, kernel)
    return calls


_BANDS = (0.5, 1.0, 2.0, 4.0)
"""Bandwidths of the heads, cycled: periods of their features along each axis of the video."""

_SHARPNESS = (1.0, 1.4, 1.8)
"""Scales of the heads' q and k, cycled: the larger, the fewer keys a query attends to."""

_NOISE = 0.15
"""Standard deviation of the noise, where features have about 0.7."""


def video_like(
    layout: TokenLayout,
    *,
    heads: int,
    head_dim: int = 64,
    batch: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v that are smooth over a latent video, and rough for the text.

    A head's features are waves over frame, row and column: q and k share them, so that a query attends to its
    neighbourhood and to what repeats, more or less sharply from head to head. Content (smooth) and noise are added.

    Returns float32 q, k, v of shape (batch, heads, tokens, head_dim); head_dim must be even. `seed` draws content and
    noise: another input of the same model. The content of a seed depends on the kind of device.
    """
    model = torch.Generator().manual_seed(0)
    content = torch.Generator(device).manual_seed(seed + 1_000_003)
    axes = torch.meshgrid(*(torch.arange(length) / max(layout.grid) for length in layout.grid), indexing="ij")
    position = torch.stack([axis.flatten() for axis in axes], dim=-1).to(device)
    band = torch.tensor([_BANDS[head % len(_BANDS)] for head in range(heads)])[:, None, None]
    sharp = torch.tensor([_SHARPNESS[head // len(_BANDS) % len(_SHARPNESS)] for head in range(heads)])
    sharp = sharp[:, None, None].to(device)
    waves = position @ (torch.randn(heads, 3, head_dim // 2, generator=model) * band * math.tau / 2).to(device)
    shared = torch.cat([waves.cos(), waves.sin()], dim=-1)  # (heads, video tokens, head_dim)

    def field(strength: float) -> Tensor:
        direction = torch.randn(batch, heads, 3, head_dim, generator=content, device=device) * math.tau
        phase = torch.rand(batch, heads, 1, head_dim, generator=content, device=device) * math.tau
        return strength * torch.sin(position @ direction + phase)

    def tensor(video: Tensor, scale: Tensor | float) -> Tensor:
        text = torch.randn(batch, heads, len(layout.text), head_dim, generator=content, device=device) * 0.7
        whole = torch.cat([text, video] if layout.text.start == 0 else [video, text], dim=-2)
        return scale * (whole + _NOISE * torch.randn(whole.shape, generator=content, device=device))

    topic = field(0.4)
    return tensor(shared + topic, sharp), tensor(shared + topic + field(0.2), sharp), tensor(field(1.0), 1.0)
