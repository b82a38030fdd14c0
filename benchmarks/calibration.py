"""Times our search of one layer's thresholds against SpargeAttn's own, on the same inputs with the same bounds.

    python benchmarks/calibration.py

Both tune on the same inputs of one layer of CogVideoX-2b's shape; both results are then judged by the same kernel on
those inputs and on others. Errors are relative L1, Σ|o − o'| / Σ|o|, by head. It needs a GPU and spas_sage_attn; with
--reference it runs anywhere, on a small shape and without SpargeAttn's search, to see that it runs.
"""

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.backends import Backend, ReferenceBackend, SpargeBackend
from sparsetune.attention.device import device_name
from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.synthetic import video_like
from sparsetune.attention.thresholds import (
    PVTHRESHD_OFF,
    HeadThresholds,
    LayerThresholds,
    ThresholdTensors,
)
from sparsetune.tuning.curves import grid
from sparsetune.tuning.layersearch import Found, search_inputs
from sparsetune.tuning.measure import measure

BOUND, PV_BOUND = 0.06, 0.065
SPEED_BOUND, SPARSITY_BOUND = 200.0, 0.005
HELD_OUT = 1000
"""The first seed of the held-out inputs."""

Input = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Judged:
    """Thresholds on some inputs: mean sparsity, and each head's largest errors without and with pvthreshd."""

    sparsity: float
    l1: Tensor
    pv_l1: Tensor

    def cells(self) -> str:
        over = int(((self.l1 > BOUND) | (self.pv_l1 > PV_BOUND)).sum())
        return f"{self.sparsity:.4f} | {self.l1.max():.4f} | {self.pv_l1.max():.4f} | {over} of {len(self.l1)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=5, help="inputs to tune on (default: 5)")
    parser.add_argument("--held-out", type=int, default=5, help="inputs to judge by (default: 5)")
    parser.add_argument(
        "--many", type=int, default=15, help="inputs of the search that only ours affords (default: 15)"
    )
    parser.add_argument("--repeats", type=int, default=10, help="timings of which a median is taken (default: 10)")
    parser.add_argument("--builtin-seconds", type=float, default=170.0, help="start no input after that (default: 170)")
    parser.add_argument("--reference", action="store_true", help="a small shape on the CPU")
    options = parser.parse_args()
    device = torch.device("cpu" if options.reference else "cuda")
    backend: Backend = ReferenceBackend() if options.reference else SpargeBackend(device)
    layout, heads = (TokenLayout((3, 16, 16), range(32)), 4) if options.reference else (LAYER, HEADS)
    dtype = torch.float32 if options.reference else torch.bfloat16
    seeds = [*range(max(options.inputs, options.many)), *range(HELD_OUT, HELD_OUT + options.held_out)]
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda seed: video_like(layout, heads=heads, seed=seed), seeds))
    inputs = [tuple(tensor.to(device, dtype) for tensor in one) for one in drawn]
    del drawn
    tuned, many, held = inputs[: options.inputs], inputs[: options.many], inputs[-options.held_out :]
    shape = " x ".join(str(size) for size in tuned[0][0].shape)
    print(f"{device_name(device)}, torch {torch.__version__}, {shape}, {dtype}, backend {backend.name}, seeds 0 on")

    rows = ours_rows(tuned, many, held, backend, options.repeats)
    seconds_ours = rows[0][1]
    print_rows(rows)
    seconds_theirs = None
    if not options.reference:
        thresholds, seconds_theirs, count, own = builtin(tuned, heads, options.builtin_seconds)
        name = f"SpargeAttn's own, {count} inputs (its own figure for the sparsity: {own:.4f})"
        rows.insert(0, (name, seconds_theirs, judge(thresholds, tuned, backend), judge(thresholds, held, backend)))
        if count < len(tuned):
            print(f"mind: its search was stopped after {count} of {len(tuned)} inputs")
    print_rows(rows)
    if seconds_theirs is not None:
        ratio, lost = seconds_theirs / seconds_ours, rows[0][3].sparsity - rows[1][3].sparsity
        print(f"ours takes {ratio:.0f} times less (aim: {SPEED_BOUND:.0f})")
        print(f"held out, its sparsity is {-lost:+.4f} of SpargeAttn's (aim: {-SPARSITY_BOUND:+.3f} or more)")


Row = tuple[str, float, Judged, Judged]
LAYER, HEADS = TokenLayout((13, 30, 45), range(226)), 30


def ours_rows(
    tuned: Sequence[Input], many: Sequence[Input], held: Sequence[Input], backend: Backend, repeats: int
) -> list[Row]:
    """Our search on the inputs that SpargeAttn's has, on more, on one, and with a margin under the bounds."""
    rows = []
    for name, inputs, margin in (
        (f"ours, {len(tuned)} inputs", tuned, 1.0),
        (f"ours, {len(tuned)} inputs, bounds x 0.93", tuned, 0.93),
        (f"ours, {len(many)} inputs", many, 1.0),
        (f"ours, {len(many)} inputs, bounds x 0.96", many, 0.96),
        ("ours, 1 input", tuned[:1], 1.0),
    ):

        def search(inputs: Sequence[Input] = inputs, margin: float = margin) -> Found:
            return search_inputs(
                inputs, bound=BOUND * margin, pv_bound=PV_BOUND * margin, backend=backend, scale=scale(inputs[0])
            )

        found = search()
        seconds = median_seconds(search, repeats if name == f"ours, {len(tuned)} inputs" else min(repeats, 3))
        thresholds = LayerThresholds("layer", found.heads).tensors(inputs[0][0].device)
        rows.append((name, seconds, judge(thresholds, tuned, backend), judge(thresholds, held, backend)))
    points = grid(("cdf",))
    q, k, v = tuned[0]
    blocks = backend.blocks

    def curves() -> object:
        return measure(q, k, v, points, blocks=blocks, keep=range(0), scale=scale(tuned[0]), every=16)

    curves()
    print(f"the curves of `--tuner calibrate`: {len(points)} points of 1 input in {median_seconds(curves, 3):.3f} s")
    return rows


def builtin(inputs: Sequence[Input], heads: int, limit: float) -> tuple[ThresholdTensors, float, int, float]:
    """Run `SparseAttentionMeansim`'s search on the inputs, as its tune mode does, one head after the other."""
    from spas_sage_attn.autotune import SparseAttentionMeansim

    search = SparseAttentionMeansim(l1=BOUND, pv_l1=PV_BOUND)
    search.init_hyperparams(heads, inputs[0][0].device)
    torch.cuda.synchronize()
    started, count = time.perf_counter(), 0
    for q, k, v in inputs:
        if time.perf_counter() - started > limit:
            break
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for head in range(heads):
                if search.is_sparse[head].item():
                    one = slice(head, head + 1)
                    search.fill_results(search.autotune(q[:, one], k[:, one], v[:, one], head))
        search.num_data_passed += 1
        count += 1
        torch.cuda.synchronize()
        print(f"SpargeAttn's own search, input {count}: {time.perf_counter() - started:.1f} s so far", flush=True)
    seconds = time.perf_counter() - started
    columns = (search.simthreshd1, search.cdfthreshd, search.pvthreshd, search.is_sparse)
    found = tuple(
        HeadThresholds(sim, cdf, pvthreshd=pv, is_sparse=bool(sparse))
        for sim, cdf, pv, sparse in zip(*(column.float().tolist() for column in columns), strict=True)
    )
    own = search.tuning_sparsity.mean().item()
    return LayerThresholds("layer", found).tensors(inputs[0][0].device), seconds, count, own


def judge(thresholds: ThresholdTensors, inputs: Sequence[Input], backend: Backend) -> Judged:
    """Run thresholds through the kernel on whole inputs, without and with pvthreshd."""
    off = replace(thresholds, pvthreshd=torch.full_like(thresholds.pvthreshd, PVTHRESHD_OFF))
    sparsities, errors, errors_pv = [], [], []
    for one in inputs:
        q, k, v = one
        dense = F.scaled_dot_product_attention(q, k, v, scale=scale(one)).float()
        for given, collected in ((off, errors), (thresholds, errors_pv)):
            attended = backend.attend(q, k, v, given, scale=scale(one), keep=range(0))
            difference = (attended.output.float() - dense).abs().sum(dim=(0, 2, 3))
            collected.append(difference / dense.abs().sum(dim=(0, 2, 3)))
        num_q, num_k = backend.blocks.counts(q.shape[-2], k.shape[-2])
        sparsities.append(1.0 - float(attended.computed.sum()) / (q.shape[0] * q.shape[1] * num_q * num_k))
    return Judged(statistics.mean(sparsities), torch.stack(errors).amax(0), torch.stack(errors_pv).amax(0))


def scale(one: Input) -> float:
    return float(one[0].shape[-1] ** -0.5)


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def print_rows(rows: Sequence[Row]) -> None:
    columns = "sparsity | worst l1 | worst pv l1 | heads over"
    print(f"| search | seconds | tuned on: {columns} | held out: {columns} |", flush=True)
    print("| " + " | ".join(["---"] * 10) + " |")
    for name, seconds, on_tuned, on_held in rows:
        print(f"| {name} | {seconds:.3f} | {on_tuned.cells()} | {on_held.cells()} |", flush=True)


if __name__ == "__main__":
    main()
