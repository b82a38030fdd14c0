"""Measurements for the support table: each pipeline class, tiny and with random weights, run with `sparsify`."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.ordering import permutation
from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.sites import AttentionSites
from sparsetune.attention.stats import SparsityStats
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.models.families import attention_sites
from sparsetune.models.random_weights import _ready, blueprint, build_pipeline
from sparsetune.models.sparsify import sparsify
from tests.models.bare_cases import BareCase
from tests.models.cases import Case

DENSE = HeadThresholds(1.0, cdfthreshd=1.0)
HALF = HeadThresholds(-1.0, cdfthreshd=0.5)
STEPS = 2


def build(case: Case) -> Any:
    """Build a case's pipeline: the blueprint's class, or another class with the same components."""
    if isinstance(case, BareCase):
        return _bare(case)
    plan = blueprint(case.blueprint)
    if case.transformer:
        components = {name: dict(part) for name, part in plan.components.items()}
        components["transformer"]["tiny"] = components["transformer"]["tiny"] | case.transformer
        plan = replace(plan, components=components)
    made = build_pipeline(plan, "tiny")
    wanted = getattr(diffusers, case.pipeline)
    if type(made) is not wanted:
        takes = inspect.signature(wanted.__init__).parameters
        parts = made.components | case.parts(made)
        options = {name: value for name, value in plan.options.items() if name in takes}
        made = wanted(**{name: part for name, part in parts.items() if name in takes}, **options)
    made.set_progress_bar_config(disable=True)
    return made


def _bare(case: BareCase) -> Any:
    """Build a pipeline of a transformer and a scheduler, without other components than `parts` gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = _ready(getattr(diffusers, case.kind)(**case.transformer))
    parts = {"transformer": transformer, "scheduler": getattr(diffusers, case.scheduler)(**case.schedule)}
    if case.inputs:
        return type(case.pipeline, (Alone,), {})(**parts, inputs=case.inputs, time=case.time)
    parts |= case.parts(transformer)
    wanted = getattr(diffusers, case.pipeline)
    takes = inspect.signature(wanted.__init__).parameters
    required = [name for name, one in takes.items() if name != "self" and one.default is inspect.Parameter.empty]
    made = wanted(**dict.fromkeys(required) | parts)
    made.set_progress_bar_config(disable=True)
    return made


class Alone:
    """Stands in for a pipeline: calls the transformer with the same inputs in each step."""

    _execution_device = torch.device("cpu")

    def __init__(self, transformer: Any, scheduler: Any, inputs: dict[str, Any], time: str) -> None:
        self.transformer, self.scheduler, self._inputs, self._time = transformer, scheduler, inputs, time

    def __call__(self, num_inference_steps: int) -> tuple[torch.Tensor]:
        self.scheduler.set_timesteps(num_inference_steps)
        found = []
        for time in self.scheduler.timesteps:
            inputs = self._inputs | {self._time: time[None] / 1000}
            found.append(self.transformer(**inputs, return_dict=False)[0])
            self.scheduler.step(found[-1], time, found[-1])
        return (torch.stack(found),)


def rendered(pipe: Any, case: Case) -> torch.Tensor:
    """Call a pipeline and return its latents."""
    arguments: dict[str, Any] = {
        "prompt": "a red circle moving right",
        "negative_prompt": "",
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    } | case.arguments
    takes = inspect.signature(pipe.__call__).parameters
    with torch.inference_mode(), _smaller(case):
        output = pipe(**{name: value for name, value in arguments.items() if name in takes})
    found = output[0]
    return found if isinstance(found, torch.Tensor) else torch.as_tensor(np.asarray(found))


@contextlib.contextmanager
def _smaller(case: Case) -> Iterator[None]:
    """Keep a pipeline from enlarging small images to a megapixel."""
    with contextlib.ExitStack() as stack:
        for name in case.enlarging:
            stack.enter_context(mock.patch(name, lambda area, ratio: (256, 256, None)))
        yield


def policy(pipe: Any, head: HeadThresholds, **rest: Any) -> Policy:
    return Policy.uniform([(layer.name, layer.num_heads) for layer in attention_sites(pipe).layers], head, **rest)


@dataclass(frozen=True)
class Findings:
    """The results of a pipeline run with `sparsify`."""

    num_layers: int
    head_dims: tuple[int, ...]
    text: str
    layout: str  # text tokens, grid and further tokens of each kind of layer
    difference: float  # at full density, largest over the latents' largest
    sparsity: float
    changed: bool
    restored: bool
    by_step: tuple[float, ...]
    fallbacks: dict[str, int]
    share: float  # of calls that ran sparse

    @property
    def exactness(self) -> str:
        """How close the latents are to the dense ones at full density."""
        return "bit for bit" if self.difference == 0.0 else "within 1e-5" if self.difference < 1e-5 else "no"

    @property
    def verdict(self) -> str:
        holds = self.exactness != "no" and self.changed and self.restored and self.sparsity > 0
        steps = len(self.by_step) == STEPS and self.by_step[0] == 0.0 and self.by_step[1] > 0.0
        if not (holds and steps):
            return "not"
        return "partly" if self.fallbacks else "supported"

    @property
    def reason(self) -> str:
        return "; ".join(f"{reason} ({count} calls)" for reason, count in self.fallbacks.items())


def examine(pipe: Any, render: Callable[[], torch.Tensor]) -> Findings:
    """Run a pipeline with `sparsify`."""
    sites = attention_sites(pipe)
    dense = render()

    def under(**rest: Any) -> tuple[torch.Tensor, SparsityStats]:
        with sparsify(pipe, policy(pipe, **rest), "reference") as handle:
            return render(), handle.stats()

    layout = layouts(sites, render)
    full, _ = under(head=DENSE)
    half, stats = under(head=HALF)
    _, scheduled = under(head=HALF, schedule=DenseSchedule(0.5))
    calls = stats.num_calls
    return Findings(
        num_layers=len(sites.layers),
        head_dims=tuple(sorted({layer.head_dim for layer in sites.layers})),
        text=", ".join(sorted({layer.text or "none" for layer in sites.layers})),
        layout=layout,
        difference=float((full - dense).abs().max() / dense.abs().max()),
        sparsity=stats.sparsity,
        changed=not torch.equal(half, dense),
        restored=torch.equal(render(), dense),
        by_step=scheduled.by_step,
        fallbacks=stats.fallbacks,
        share=calls["sparse"] / max(1, sum(calls.values())),
    )


def layouts(sites: AttentionSites, render: Callable[[], torch.Tensor]) -> str:
    """Return the layouts of a pipeline's calls; those that have none are refused, and left out.

    Tokens of each call are put in an order and back, which must restore them all and leave others than the video's in
    their places.
    """
    found: dict[str, None] = {}

    def attend(call: AttentionCall) -> torch.Tensor:
        if (layout := call.layout) is not None and call.k.shape == call.q.shape:
            order = permutation("hilbert3d", layout)
            assert order is not None and layout.num_tokens == call.q.shape[-2]
            moved = order.order(call.q)
            assert torch.equal(order.undo(moved), call.q)
            first = len(layout.text) if layout.text.start == 0 else 0
            video = slice(first, first + math.prod(layout.grid))
            assert sorted(order.forward[video].tolist()) == list(range(video.start, video.stop))
            parts = {"text": len(layout.text), "grid": "×".join(map(str, layout.grid)), "more": layout.tail}
            sides = ["grid", "more", "text"] if first == 0 else ["text", "grid", "more"]
            found[" + ".join(f"{parts[one]}{'' if one == 'grid' else ' ' + one}" for one in sides if parts[one])] = None
        return call.original()

    interception = Interception(sites, attend)
    try:
        render()
    finally:
        interception.remove()
    return ", ".join(found)


def graph_breaks(pipe: Any, render: Callable[[], torch.Tensor]) -> tuple[set[str], set[str], float]:
    """Compile a pipeline's transformers, sparse and, if graphs of the sparse model break, dense.

    Returns:
        Why the graphs of the dense and of the sparse model break, and the largest difference of the compiled sparse
        latents to those without compilation, over the largest latent.
    """
    names = [site.name for site in attention_sites(pipe).transformers]
    with sparsify(pipe, policy(pipe, HALF), "reference"):
        eager = render()
    plain = {name: getattr(pipe, name) for name in names}

    def compiled() -> tuple[torch.Tensor, set[str]]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for name in names:
            setattr(pipe, name, torch.compile(plain[name], backend="eager"))
        output = render()
        return output, set(torch._dynamo.utils.counters["graph_break"])

    try:
        with sparsify(pipe, policy(pipe, HALF), "reference"):
            output, sparse_breaks = compiled()
        for module in plain.values():  # a frame that is skipped counts its break only if another one called it
            module.forward = _calling(module.forward)
        dense_breaks = compiled()[1] if sparse_breaks else set()  # compiling takes most of the time
    finally:
        for name, module in plain.items():
            setattr(pipe, name, module)
            module.__dict__.pop("forward", None)
        torch._dynamo.reset()
    return dense_breaks, sparse_breaks, float((output - eager).abs().max() / eager.abs().max())


def _calling(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: forward(*args, **kwargs)
