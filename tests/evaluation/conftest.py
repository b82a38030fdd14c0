"""A renderer without a model: frames depend on prompt, seed and the installed policy, as defined here."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sparsetune.attention.policy import Policy
from sparsetune.attention.stats import CallRecord, SparsityStats
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.config import GenerationConfig
from sparsetune.errors import GenerationError
from sparsetune.evaluation import evaluate as run
from sparsetune.evaluation.baseline import BaselineCache, BaselineKey
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.evaluation.events import EvaluationListener
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.executor import session as describe
from sparsetune.executor import session as workplace
from sparsetune.metrics import BASE_METRICS

LAYERS = (("transformer.blocks.0.attn1", 3), ("transformer.blocks.1.attn1", 3))
POLICY = Policy.uniform(LAYERS, HeadThresholds(simthreshd1=0.1, cdfthreshd=0.9))
SETTINGS = GenerationConfig(num_frames=5, height=16, width=24, num_inference_steps=4, guidance_scale=2.5, fps=8)
AMPLITUDES = {"dense": 0, "kernel": 2, "sparse": 12}
"""Largest pixel change, by installed policy."""


@dataclass
class FakeHandle:
    """An installed policy, with the interface of `SparseHandle`."""

    policy: Policy
    num_renderings: int = 0
    num_resets: int = 0
    removed: bool = False
    backend: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(name="reference"))
    break_even: Path | None = None
    chosen_because: str = "asked for"
    warm: Policy | None = None
    is_paused: bool = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.is_paused = True
        yield
        self.is_paused = False

    @property
    def kind(self) -> str:
        if self.policy.schedule.dense_fraction == 1.0:
            return "dense"
        heads = {head for layer in self.policy.layers for head in layer.heads}
        return "kernel" if heads == {HeadThresholds(simthreshd1=1.0, cdfthreshd=1.0)} else "sparse"

    def reset(self) -> None:
        self.num_renderings = 0
        self.num_resets += 1

    def stats(self) -> SparsityStats:
        computed = {"dense": 100.0, "kernel": 100.0, "sparse": 60.0}[self.kind]
        kind = "dense" if self.kind == "dense" else "sparse"
        return SparsityStats(
            tuple(
                CallRecord(name, step, kind, "sparge", None, self.num_renderings, (computed,) * heads, 100.0, heads)
                for name, heads in LAYERS
                for step in range(SETTINGS.num_inference_steps)
            )
        )

    def __enter__(self) -> "FakeHandle":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        self.removed = True


class FakeRenderer:
    """Renders noise: deterministic for prompt and seed, slightly different with a policy."""

    def __init__(self, settings: GenerationConfig = SETTINGS) -> None:
        scheduler = SimpleNamespace(config={"num_train_timesteps": 1000, "_class_name": "FakeScheduler"})
        identity = SimpleNamespace(
            name="fake",
            published_name="fake/fake",
            source="fake/fake",
            random_weights="no",
            lora=None,
            lora_scale=None,
            flow_shift=None,
            revision=None,
            fingerprint="f" * 64,
            pipeline_class="FakePipeline",
            transformer_class="FakeTransformer",
            layers=tuple((name, heads, 64) for name, heads in LAYERS),
        )
        self.loaded = SimpleNamespace(
            pipe=SimpleNamespace(scheduler=scheduler, vae=SimpleNamespace(use_tiling=False)),
            identity=identity,
            family=SimpleNamespace(name="cogvideo"),
            device=torch.device("cpu"),
            dtype=torch.float32,
            compiled=False,
        )
        self.settings = settings
        self.handle: FakeHandle | None = None
        self.rendered: list[tuple[str, str]] = []
        self.failing: dict[tuple[str, str], GenerationError] = {}
        self.again = 0
        self.timed: list[str] = []

    def with_steps(self, num_inference_steps: int) -> "FakeRenderer":
        return FakeRenderer(self.settings.model_copy(update={"num_inference_steps": num_inference_steps}))

    def render(self, prompt: str, seed: int, on_step: Callable[[int, int], None] | None = None) -> SimpleNamespace:
        kind = self.handle.kind if self.handle else "dense"
        self.rendered.append((kind, prompt))
        for step in range(self.settings.num_inference_steps):
            if on_step is not None:
                on_step(step + 1, self.settings.num_inference_steps)
        if error := self.failing.get((kind, prompt)):
            raise error
        if self.handle is not None:
            self.handle.num_renderings += 1
        shape = (self.settings.num_frames, self.settings.height, self.settings.width, 3)
        noise = np.random.default_rng(int(hashlib.sha256(f"{prompt}{seed}".encode()).hexdigest()[:8], 16))
        frames = noise.integers(20, 220, shape)
        shift = noise.integers(-AMPLITUDES[kind], AMPLITUDES[kind] + 1, shape)
        seconds = 2.0 if kind == "dense" else 1.0
        return SimpleNamespace(
            frames=(frames + shift).astype(np.uint8), seconds=seconds, denoising_seconds=0.8 * seconds
        )

    def step_seconds(self, prompt: str, seed: int, num_steps: int = 4) -> float:
        assert self.handle is not None
        self.timed.append("dense" if self.handle.is_paused else self.handle.kind)
        return 0.39 if prompt == "a red circle" else 0.41


@pytest.fixture
def renderer() -> FakeRenderer:
    return FakeRenderer()


@pytest.fixture
def handle(renderer: FakeRenderer) -> Iterator[FakeHandle]:
    renderer.handle = FakeHandle(POLICY)
    yield renderer.handle
    renderer.handle = None


@pytest.fixture
def cache(tmp_path: Path) -> BaselineCache:
    return BaselineCache(tmp_path / "cache", max_gb=1.0)


@pytest.fixture
def key(renderer: FakeRenderer) -> BaselineKey:
    return baseline_key(renderer, "a red circle", 42)


PROMPTS = ("a red circle", "a | blue *star*", "a green ring")
Evaluate = Callable[..., EvaluationResult]


class Recorder(EvaluationListener):
    """Records every event."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda event: self.events.append((name, event))
        return super().__getattribute__(name)

    def named(self, name: str) -> list[Any]:
        return [event for known, event in self.events if known == name]


@pytest.fixture
def evaluate(renderer: FakeRenderer, cache: BaselineCache, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    def sparsify(pipe: object, policy: Policy, backend: str, break_even: Path | None) -> FakeHandle:
        renderer.handle = FakeHandle(policy, break_even=break_even)
        return renderer.handle

    monkeypatch.setattr(workplace, "sparsify", sparsify)
    monkeypatch.setattr(describe, "default_policy", lambda pipe: POLICY)

    def call(policy: Policy | None = POLICY, prompts: tuple[str, ...] = PROMPTS, **options: Any) -> EvaluationResult:
        return run.evaluate(renderer, policy, prompts, **({"cache": cache, "metrics": BASE_METRICS} | options))

    return call
