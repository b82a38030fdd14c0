"""Latency of attention calls: dense kernels against sparse ones at forced sparsities."""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

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
    HeadThresholds(-1.0, topk=1.0),
    HeadThresholds(-1.0, topk=0.9),
    HeadThresholds(-1.0, topk=0.8),
    HeadThresholds(-1.0, topk=0.65),
    HeadThresholds(-1.0, topk=0.5),
    HeadThresholds(-1.0, topk=0.3),
    HeadThresholds(-1.0, topk=0.1),
    HeadThresholds(-1.0, cdfthreshd=0.98),
    HeadThresholds(-1.0, cdfthreshd=0.9),
    HeadThresholds(-1.0, cdfthreshd=0.7),
)
"""Thresholds that spread over the sparsities; -1 has every whole block judged."""

_DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

_AT_ONCE = 4
"""Attention calls timed together on a GPU, as a model makes them: without waiting in between."""


def time_calls(
    run: Callable[[], object], device: torch.device, *, repeats: int = 10, warm_up: int = 2, at_once: int = _AT_ONCE
) -> list[float]:
    """Time a function.

    Args:
        run: called again and again.
        device: where it computes.
        repeats: number of timings.
        warm_up: calls before the first timing.
        at_once: on a GPU, calls in a row of which a timing is the mean.

    Returns:
        Milliseconds a call; on a GPU between two events.
    """
    for _ in range(warm_up):
        run()
    if device.type != "cuda":
        return [_seconds(run) * 1e3 for _ in range(repeats)]
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        return [_event_ms(run, at_once) for _ in range(repeats)]


def time_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backends: Sequence[Backend],
    *,
    repeats: int = 10,
    forced: Sequence[HeadThresholds] = FORCED,
    on_time: Callable[[str, float], None] | None = None,
) -> ShapeTimes:
    """Measure one shape: dense attention by each kernel there is, and sparse attention by each backend.

    Args:
        q: (batch, heads, tokens, head_dim).
        k: see q.
        v: see q.
        backends: those that can run here.
        repeats: timings of which the median is taken.
        forced: thresholds of all heads.
        on_time: told of every kernel measured and its milliseconds.
    """
    scale = q.shape[-1] ** -0.5
    tell = on_time or (lambda name, latency: None)

    def median(name: str, run: Callable[[], object]) -> float:
        latency = statistics.median(time_calls(run, q.device, repeats=repeats))
        tell(name, latency)
        return latency

    dense = {name: median(f"dense {name}", run) for name, run in _dense_calls(q, k, v).items()}
    whole = UnmaskedCall(q, k, v, TokenLayout((1, 1, q.shape[-2]), range(0)), scale, q[..., :0, :])
    sparse = []
    for backend in backends:
        if head_dim_refusal(backend, whole) is not None:
            continue
        for head in forced:
            thresholds = LayerThresholds.uniform("bench", q.shape[1], head).tensors(q.device)
            call: dict[str, Any] = {"scale": scale, "keep": range(1)}
            attended = attend_padded(backend, q, k, v, thresholds, **call)
            num_q, num_k = backend.blocks.counts(q.shape[-2], k.shape[-2])
            sparsity = 1.0 - float(attended.computed.sum()) / (q.shape[0] * q.shape[1] * num_q * num_k)
            del attended
            latency = median(
                f"{backend.name} {head.rule} at {sparsity:.2f}",
                lambda b=backend, t=thresholds, c=call: attend_padded(b, q, k, v, t, **c),  # type: ignore[misc]
            )
            rounded = min(max(sparsity, 0.0), 1.0)
            sparse.append(SparseTime(kernel=backend.name, rule=head.rule, sparsity=rounded, latency_ms=latency))
    batch, heads, tokens, head_dim = q.shape
    return ShapeTimes(
        batch=batch, heads=heads, tokens=tokens, head_dim=head_dim, dtype=dtype_name(q.dtype), dense_ms=dense,
        sparse=tuple(sparse),
    )  # fmt: skip


def _dense_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """Dense attention by PyTorch's own choice, and by each kernel that takes these tensors."""
    calls: dict[str, Callable[[], object]] = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v)}
    if not q.is_cuda:
        return calls

    def by(kernel: SDPBackend) -> None:
        with sdpa_kernel(kernel):
            F.scaled_dot_product_attention(q, k, v)

    for name, kernel in _DENSE.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of each reason why a kernel doesn't do
            try:
                by(kernel)
            except RuntimeError:  # it isn't built, or refuses this dtype or head_dim
                continue
        calls[name] = lambda kernel=kernel: by(kernel)  # type: ignore[misc]
    return calls


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _event_ms(run: Callable[[], object], at_once: int) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    for _ in range(at_once):
        run()
    after.record()
    after.synchronize()
    elapsed: float = before.elapsed_time(after)
    return elapsed / at_once


_BANDS = (0.5, 1.0, 2.0, 4.0)
"""Bandwidths that the heads take in turn: periods of their features along each axis of the video."""

_SHARPNESS = (1.0, 1.4, 1.8)
"""Scales of q and k that the heads take in turn: the larger, the fewer keys a query attends to."""


def video_like(
    layout: TokenLayout,
    *,
    heads: int,
    head_dim: int = 64,
    batch: int = 1,
    seed: int = 0,
    model_seed: int = 0,
    noise: float = 0.15,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v as smooth features over a latent video, with rough ones for the text.

    A head's features are waves over frame, row and column: q and k share them, so that a query attends to its
    neighbourhood and to what repeats, more or less sharply from head to head. On top lies a smooth content of its own,
    and noise on every token.

    Args:
        layout: where the tokens lie.
        heads: attention heads; bandwidth and sharpness differ between them.
        head_dim: channels a head, even.
        batch: batch entries, each with its own content.
        seed: of content and noise: another input of the same model.
        model_seed: of the heads' features: another model.
        noise: standard deviation of the noise, where features have about 0.7.
        device: where it is drawn; another kind draws other content from the same seed.

    Returns:
        q, k, v of shape (batch, heads, tokens, head_dim), float32 on the device.
    """
    model = torch.Generator().manual_seed(model_seed)
    content = torch.Generator(device).manual_seed(seed + 1_000_003)
    axes = torch.meshgrid(*(torch.arange(length) / max(layout.grid) for length in layout.grid), indexing="ij")
    place = torch.stack([axis.flatten() for axis in axes], dim=-1).to(device)
    band = torch.tensor([_BANDS[head % len(_BANDS)] for head in range(heads)])[:, None, None]
    sharp = torch.tensor([_SHARPNESS[head // len(_BANDS) % len(_SHARPNESS)] for head in range(heads)])
    sharp = sharp[:, None, None].to(device)
    waves = place @ (torch.randn(heads, 3, head_dim // 2, generator=model) * band * math.tau / 2).to(device)
    shared = torch.cat([waves.cos(), waves.sin()], dim=-1)  # (heads, video tokens, head_dim)

    def field(strength: float) -> Tensor:
        direction = torch.randn(batch, heads, 3, head_dim, generator=content, device=device) * math.tau
        phase = torch.rand(batch, heads, 1, head_dim, generator=content, device=device) * math.tau
        return strength * torch.sin(place @ direction + phase)

    def tensor(video: Tensor, scale: Tensor | float) -> Tensor:
        text = torch.randn(batch, heads, len(layout.text), head_dim, generator=content, device=device) * 0.7
        whole = torch.cat([text, video] if layout.text.start == 0 else [video, text], dim=-2)
        return scale * (whole + noise * torch.randn(whole.shape, generator=content, device=device))

    topic = field(0.4)
    return tensor(shared + topic, sharp), tensor(shared + topic + field(0.2), sharp), tensor(field(1.0), 1.0)
