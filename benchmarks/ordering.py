"""Cost of a token order: permuting q, k and v and restoring the output, compared with the attention itself.

    python benchmarks/ordering.py [--heads 3] [--repeats 10]

One call of the demo model's shape and one of CogVideoX-2b's with `--heads` of its 30 heads (heads cost the same), on a
GPU in bfloat16 if there is one, otherwise on the CPU in float32. The attention is PyTorch's dense attention.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.ordering import ORDERS, Permutation, TokenLayout, permutation
from sparsetune.bench.latency import time_calls

SHAPES = {
    "demo": TokenLayout(grid=(5, 16, 16), text=range(32)),
    "cogvideox-2b": TokenLayout(grid=(13, 30, 45), text=range(226)),
}
HEAD_DIM = 64
SEARCHED = ("hfw", "whf", "hilbert", "wfh", "raster")
WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=3, help="attention heads in a call (default: 3)")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls; the median counts (default: 10)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(
        f"{device.type}, torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}, {options.heads} heads"
    )
    print("| shape | order | permuting, ms | dense attention, ms | share |\n| --- | --- | --- | --- | --- |")
    for name, layout in SHAPES.items():
        torch.manual_seed(0)
        # The heads of a token are adjacent in memory, as after a model's projections.
        qkv = torch.randn(3, 1, layout.num_tokens, options.heads, HEAD_DIM, device=device, dtype=dtype).transpose(2, 3)
        attention = timed(lambda qkv=qkv: F.scaled_dot_product_attention(*qkv), device, options.repeats)
        by_head = tuple(itertools.islice(itertools.cycle(SEARCHED), options.heads))
        for order in (*(order for order in ORDERS if order != "raster"), by_head):
            path = permutation(order, layout, device)
            assert path is not None
            cost = timed(lambda qkv=qkv, path=path: permuted(*qkv, path), device, options.repeats)
            shown = order if isinstance(order, str) else "one per head"
            print(f"| {name} | {shown} | {cost:.2f} | {attention:.2f} | {cost / attention:.1%} |", flush=True)


def permuted(q: Tensor, k: Tensor, v: Tensor, path: Permutation) -> Tensor:
    """Permute and restore as `sparsify` does around a kernel, with v in place of the output."""
    _, _, out = (path.order(x) for x in (q, k, v))
    return path.undo(out)


def timed(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    return statistics.median(time_calls(call, device, repeats=repeats, warm_up=WARM_UP, at_once=1))


if __name__ == "__main__":
    main()
