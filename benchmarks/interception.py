"""Times what our interception costs over SpargeAttn's kernel called directly, and what is left of it when removed.

    python benchmarks/interception.py

One denoising step of CogVideoX-2b's transformer, with random weights and eight of its 30 layers (all layers are alike):
49 frames at 480 x 720, guidance batched. Directly means that diffusers' own processor calls SpargeAttn's topk function
in the place of PyTorch's attention. It needs a GPU and spas_sage_attn.
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

AIM = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="layers of the transformer (default: 8)")
    parser.add_argument("--rounds", type=int, default=12, help="timings of each, taken in turn (default: 12)")
    options = parser.parse_args()
    step, untouched = make_step(options.layers), make_step(options.layers)
    before = dense(options.rounds, untouched, step)
    device = torch.device("cuda")
    layers = [(layer.name, layer.num_heads) for layer in step.sites.layers]
    backend = SpargeBackend(device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.layers} layers, bfloat16")
    print("| topk | directly, ms | through sparsetune, ms | overhead |")
    print("| --- | --- | --- | --- |")
    for topk in (0.5, 0.3, 0.15):

        def through(topk: float = topk) -> contextlib.AbstractContextManager[object]:
            return SparseHandle(step.sites, Policy.uniform(layers, HeadThresholds(-1.0, topk=topk)), backend)

        ours, direct = in_turn(options.rounds, device, (step, through), (step, lambda topk=topk: directly(topk)))
        print(
            f"| {topk:g} | {direct:.2f} | {ours:.2f} | {ours / direct - 1:+.2%} (aim: {AIM:.0%} or less) |", flush=True
        )

    after = dense(options.rounds, untouched, step)
    for when, (never, ours) in (("before", before), ("after", after)):
        print(f"dense, {when} policies came and went: a pipeline never touched {never:.2f} ms, this one {ours:.2f} ms: "
              f"{ours / never - 1:+.2%}")  # fmt: skip


def dense(rounds: int, *steps: Step) -> tuple[float, ...]:
    """Median milliseconds of each step with nothing installed."""
    return in_turn(rounds, torch.device("cuda"), *((step, contextlib.nullcontext) for step in steps))


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
def directly(topk: float) -> Iterator[None]:
    """Have diffusers call SpargeAttn's function."""
    from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda as kernel

    def attend(q: Tensor, k: Tensor, v: Tensor, *_rest: object, **_more: object) -> Tensor:
        output: Tensor = kernel(q, k, v, simthreshd1=-1.0, topk=topk, attention_sink=True)
        return output

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


def in_turn(
    rounds: int, device: torch.device, *ways: tuple[Step, Callable[[], contextlib.AbstractContextManager[object]]]
) -> tuple[float, ...]:
    """Median milliseconds of a step each way; taken in turn, so that a drift of the clock meets all alike."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for (step, way), collected in zip(ways, times, strict=True):
            with way():
                collected += time_calls(step.run, device, repeats=1, warm_up=1, at_once=2)
    return tuple(statistics.median(collected) for collected in times)


if __name__ == "__main__":
    main()
