"""Overhead of sparsetune's interception over direct calls of SpargeAttn's kernel, and after a policy is removed.

    python benchmarks/interception.py

One denoising step of CogVideoX-2b's transformer, with random weights and eight of its 30 layers (all layers have the
same shape): 49 frames at 480 x 720, batched guidance. In the direct case, diffusers' own processor calls SpargeAttn's
topk function instead of PyTorch's attention. Requires a GPU and spas_sage_attn.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.backends import SpargeBackend
from sparsetune.attention.handle import SparseHandle
from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.bench.latency import time_calls
from sparsetune.bench.step import Step, capture_step
from sparsetune.config import resolve
from sparsetune.models import loading
from sparsetune.models.generation import Renderer
from sparsetune.models.random_weights import blueprint

TARGET = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="layers of the transformer (default: 8)")
    parser.add_argument("--rounds", type=int, default=12, help="alternating runs of each case (default: 12)")
    options = parser.parse_args()
    step, untouched = make_step(options.layers), make_step(options.layers)
    before = dense(options.rounds, untouched, step)
    device = torch.device("cuda")
    layers = [(layer.name, layer.num_heads) for layer in step.sites.layers]
    backend = SpargeBackend(device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.layers} layers, bfloat16")
    print("| topk | direct, ms | through sparsetune, ms | overhead |")
    print("| --- | --- | --- | --- |")
    for topk in (0.5, 0.3, 0.15):

        def sparse(topk: float = topk) -> contextlib.AbstractContextManager[object]:
            return SparseHandle(step.sites, Policy.uniform(layers, HeadThresholds(-1.0, topk=topk)), backend)

        ours, direct = alternating(options.rounds, device, (step, sparse), (step, lambda topk=topk: direct_calls(topk)))
        overhead = f"{ours / direct - 1:+.2%} (target: {TARGET:.0%} or less)"
        print(f"| {topk:g} | {direct:.2f} | {ours:.2f} | {overhead} |", flush=True)

    after = dense(options.rounds, untouched, step)
    for when, (reference, tested) in (("before", before), ("after", after)):
        print(f"dense, {when} installing and removing policies: untouched pipeline {reference:.2f} ms, "
              f"tested pipeline {tested:.2f} ms, {tested / reference - 1:+.2%}")  # fmt: skip


def dense(rounds: int, *steps: Step) -> tuple[float, ...]:
    """Median milliseconds of each step without a policy."""
    return alternating(rounds, torch.device("cuda"), *((step, contextlib.nullcontext) for step in steps))


def make_step(num_layers: int) -> Step:
    plan = blueprint("cogvideox-2b")
    transformer = dict(plan.components["transformer"])
    transformer["config"] = transformer["config"] | {"num_layers": num_layers}
    smaller = replace(plan, components=plan.components | {"transformer": transformer})
    config = resolve("cogvideox-2b", (), {}, {"model.random_weights": "full"})
    with mock.patch.object(loading, "blueprint", lambda name: smaller):
        loaded = loading.load_pipeline(config.model)
    return capture_step(Renderer(loaded, config.generation), "a panda eats bamboo")


@contextlib.contextmanager
def direct_calls(topk: float) -> Iterator[None]:
    """Replace PyTorch's attention with SpargeAttn's topk function."""
    from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda as kernel

    def attend(q: Tensor, k: Tensor, v: Tensor, *_rest: object, **_more: object) -> Tensor:
        output: Tensor = kernel(q, k, v, simthreshd1=-1.0, topk=topk, attention_sink=True)
        return output

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


def alternating(
    rounds: int, device: torch.device, *cases: tuple[Step, Callable[[], contextlib.AbstractContextManager[object]]]
) -> tuple[float, ...]:
    """Median milliseconds of a step in each case; alternating, so that clock drift affects all cases equally."""
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for (step, installed), collected in zip(cases, times, strict=True):
            with installed():
                collected += time_calls(step.run, device, repeats=1, warm_up=1, at_once=2)
    return tuple(statistics.median(collected) for collected in times)


if __name__ == "__main__":
    main()
