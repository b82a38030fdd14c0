"""Which step caches work on a model, and MagCache's ratios, found on two renderings of one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsetune.attention.step_cache import CacheKind
from sparsetune.errors import GenerationError, ModelError, OutOfMemoryError
from sparsetune.executor import Emit, ModelSession, StepDone
from sparsetune.models.families import attention_sites
from sparsetune.models.generation import Renderer
from sparsetune.models.prompts import AnyPrompt
from sparsetune.models.sparsify import default_policy, sparsify
from sparsetune.models.step_caching import always_skipping, measuring_ratios, supported_kinds

PROBE_STEPS = 5
"""Denoising steps of the rendering that shows whether a cache skips."""


@dataclass(frozen=True)
class WorkingCaches:
    """The kinds that skip blocks of a model, why the others don't, and MagCache's ratios (see `StepCache`)."""

    kinds: tuple[CacheKind, ...] = ()
    reasons: tuple[tuple[CacheKind, str], ...] = ()
    ratios: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class FindCaches:
    """Task that finds the kinds of cache that can be installed on a model, without rendering."""

    def run(self, session: ModelSession, emit: Emit) -> tuple[CacheKind, ...]:
        pipe = session.restore().loaded.pipe
        sites = attention_sites(pipe)
        return () if sites.caching is None else supported_kinds(pipe, sites.caching, len(sites.transformers))


@dataclass(frozen=True)
class ProbeCaches:
    """Task that calibrates MagCache on one dense rendering and tries each kind on a short one."""

    prompt: AnyPrompt
    seed: int
    kinds: tuple[CacheKind, ...]
    backend: str

    def run(self, session: ModelSession, emit: Emit) -> WorkingCaches:
        renderer = session.restore()
        working: list[CacheKind] = []
        reasons: list[tuple[CacheKind, str]] = []
        ratios: tuple[tuple[float, ...], ...] = ()
        for kind in self.kinds:
            try:
                if kind == "mag":
                    ratios = self._ratios(renderer, emit)
                if reason := self._doesnt_skip(renderer, kind, ratios):
                    reasons.append((kind, reason))
                else:
                    working.append(kind)
            except OutOfMemoryError:
                raise  # it says nothing of the model
            except (ModelError, GenerationError) as error:
                reasons.append((kind, str(error)))
        return WorkingCaches(tuple(working), tuple(reasons), ratios if "mag" in working else ())

    def _ratios(self, renderer: Renderer, emit: Emit) -> tuple[tuple[float, ...], ...]:
        def on_step(step: int, num_steps: int) -> None:
            emit(StepDone("preparation", "dense", step, num_steps))

        modules = [site.module for site in attention_sites(renderer.loaded.pipe).transformers]
        with measuring_ratios(modules) as ratios:
            renderer.render(self.prompt, self.seed, on_step)
        return tuple(tuple(each) for each in ratios)

    def _doesnt_skip(self, renderer: Renderer, kind: CacheKind, ratios: Sequence[tuple[float, ...]]) -> str | None:
        short = renderer.with_steps(PROBE_STEPS)
        cache, pipe = always_skipping(kind, tuple(ratios)), renderer.loaded.pipe
        with sparsify(pipe, replace(default_policy(pipe), cache=cache), self.backend) as handle:
            short.render(self.prompt, self.seed)
            return None if handle.stats().blocks_run < 1.0 else "it skipped no block in a short rendering"
