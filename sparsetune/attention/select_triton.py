"""Triton kernels that select blocks from pooled ones; `blockmap.select_blocks` calls them for CUDA tensors.

The product of the means and the cumulated sum are left to PyTorch: both are SpargeAttn's to the last bit then. PyTorch
cumulates bfloat16 in bfloat16 on a GPU; sums in float32 would select up to 3 % of the pairs differently.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCKS = 4096  # in a row, which one program sorts: 500,000 tokens in blocks of 128


def fits(means_q: Tensor, means_k: Tensor) -> bool:
    """Whether the kernels can select from these means (batch, heads, blocks, head_dim)."""
    known = means_q.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return means_q.is_cuda and known and means_k.shape[-2] <= _MAX_BLOCKS


def select(
    pooled: tuple[Tensor, Tensor, Tensor, Tensor], simthreshd1: Tensor, share: Tensor, cdf: bool, keep: range
) -> tuple[Tensor, Tensor]:
    """Return the block map by `blockmap.select_blocks`' rule, and the number of its pairs in each head.

    `pooled` holds means and similarities of q's blocks, then of k's; `share` is cdfthreshd or topk, float32 (heads,).
    Of blocks with equal probabilities the first is taken first, as by a stable sort.

    Returns:
        bool (batch, heads, q blocks, k blocks), and float64 (heads,).
    """
    # As in pool_triton: an operator only for torch.compile.
    launch = _select_blocks if torch.compiler.is_compiling() else _launch
    selected: tuple[Tensor, Tensor] = launch(*pooled, simthreshd1, share, cdf, keep.start, keep.stop)
    return selected


def _launch(
    means_q: Tensor,
    similarity_q: Tensor,
    means_k: Tensor,
    similarity_k: Tensor,
    simthreshd1: Tensor,
    share: Tensor,
    cdf: bool,
    keep_start: int,
    keep_stop: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, num_q, dim = means_q.shape
    num_k = means_k.shape[-2]
    products = means_q @ means_k.transpose(-1, -2)
    ranked, ranks = torch.empty_like(products), torch.empty_like(products, dtype=torch.int16)
    selected = torch.empty_like(products, dtype=torch.bool)
    counts = simthreshd1.new_empty(heads, dtype=torch.float64)
    grid = (num_q, batch * heads)
    width = max(64, triton.next_power_of_2(num_k))
    with torch.cuda.device_of(means_q):  # type: ignore[no-untyped-call]
        _rank[grid](
            products, similarity_k, simthreshd1, ranked, ranks, counts, heads, num_k, dim**-0.5,
            WIDTH=width, num_warps=8 if width > 1024 else 4,
        )  # fmt: skip
        cumulated = ranked.cumsum(-1) if cdf else ranked
        _select[grid](
            cumulated, ranks, similarity_q, similarity_k, simthreshd1, share, selected, counts,
            heads, num_k, keep_start, keep_stop, WIDTH=width, CDF=cdf,
        )  # fmt: skip
    return selected, counts


def _outputs(means_q: Tensor, similarity_q: Tensor, means_k: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    selected = means_q.new_empty(*similarity_q.shape, means_k.shape[-2], dtype=torch.bool)
    return selected, means_q.new_empty(means_q.shape[1], dtype=torch.float64)


_select_blocks = torch.library.custom_op("sparsetune::select_blocks", _launch, mutates_args=())
_select_blocks.register_fake(_outputs)


@triton.jit(do_not_specialize=["heads", "num_k"])  # type: ignore[untyped-decorator]
def _rank(  # type: ignore[no-untyped-def]
    products, similarity_k, simthreshd1, ranked, ranks, counts, heads, num_k, scale, WIDTH: tl.constexpr
):
    """Sort a row's probabilities, and write each block's rank; set the counts to 0 for `_select`."""
    row = tl.program_id(1).to(tl.int64)
    if (tl.program_id(0) == 0) & (row < heads):
        tl.store(counts + row, 0.0)
    place = (row * tl.num_programs(0) + tl.program_id(0)) * num_k
    block = tl.arange(0, WIDTH)
    inside = block < num_k
    similarity = tl.load(similarity_k + row * num_k + block, mask=inside, other=-float("inf"))
    similar = similarity > tl.load(simthreshd1 + row % heads)
    product = tl.load(products + place + block, mask=inside, other=0.0)
    # Rounded to the means' dtype wherever a tensor of PyTorch's operations would be.
    score = tl.where(similar, (product.to(tl.float32) * scale).to(product.dtype).to(tl.float32), -float("inf"))
    weight = tl.where(similar, tl.exp(score - tl.max(score, axis=0)), 0.0)
    total = tl.sum(weight, axis=0)
    probability = tl.where(total > 0.0, tl.div_rn(weight, total), 0.0).to(product.dtype)
    # The bits of numbers from 0 up are in the numbers' order; the block in the low bits puts equal ones in its own.
    if product.dtype == tl.float32:
        bits = probability.to(tl.int32, bitcast=True).to(tl.int64)
    else:
        bits = probability.to(tl.int16, bitcast=True).to(tl.int32)
    key = tl.sort((bits << 16) | (0xFFFF - block), descending=True)
    if product.dtype == tl.float32:
        value = (key >> 16).to(tl.int32).to(product.dtype, bitcast=True)
    else:
        value = (key >> 16).to(tl.int16).to(product.dtype, bitcast=True)
    tl.store(ranked + place + block, value, mask=inside)
    tl.store(ranks + place + (0xFFFF - (key & 0xFFFF)), block.to(tl.int16), mask=inside)


@triton.jit(do_not_specialize=["heads", "num_k", "keep_start", "keep_stop"])  # type: ignore[untyped-decorator]
def _select(  # type: ignore[no-untyped-def]
    cumulated, ranks, similarity_q, similarity_k, simthreshd1, share, selected, counts,
    heads, num_k, keep_start, keep_stop, WIDTH: tl.constexpr, CDF: tl.constexpr,
):  # fmt: skip
    """Write a row of the map, and add its number of pairs to its head's."""
    row = tl.program_id(1).to(tl.int64)
    head = row % heads
    query = row * tl.num_programs(0) + tl.program_id(0)
    place = query * num_k
    block = tl.arange(0, WIDTH)
    inside = block < num_k
    threshold = tl.load(share + head)
    if CDF:
        below = tl.load(cumulated + place + block, mask=inside, other=float("inf")).to(tl.float32) <= threshold
        taken = tl.sum(below.to(tl.int32), axis=0)
    else:
        taken = (threshold * num_k).to(tl.int32)
    floor = tl.load(simthreshd1 + head)
    chosen = tl.load(ranks + place + block, mask=inside, other=0) < tl.maximum(taken, 1)
    similar_q = tl.load(similarity_q + query) > floor
    similar_k = tl.load(similarity_k + row * num_k + block, mask=inside, other=0.0) > floor
    kept = (block >= keep_start) & (block < keep_stop)
    used = (chosen | (similar_k == 0) | (similar_q == 0) | kept) & inside
    tl.store(selected + place + block, used, mask=inside)
    tl.atomic_add(counts + head, tl.sum(used.to(tl.int32), axis=0).to(tl.float64), sem="relaxed")
