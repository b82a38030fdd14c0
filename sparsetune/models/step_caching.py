"""Step caches through diffusers' own hooks, with the steps that they may not skip."""

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsetune.attention.step_cache import (
    CACHE_KINDS,
    WITH_MAX_SKIPS,
    WITH_THRESHOLD,
    CacheKind,
    StepCache,
    StepCaching,
)
from sparsetune.errors import ModelError

_HOOKS = "_diffusers_hook"  # the attribute in which diffusers keeps a module's hooks
_NEVER = -1.0  # a threshold that no change is under
_ANY = 1e3  # one that every change is under
_WARM_UP = 2  # steps that TaylorSeer must compute before it predicts

ReadLatents = Callable[[nn.Module, Mapping[str, Any]], list[Tensor] | None]
ReadNoise = Callable[[int], float | None]


class DiffusersCaching:
    """The step caches of diffusers for a pipeline's transformers, see `StepCaching`.

    Args:
        transformers: perhaps wrapped by torch.compile.
        latents: what a transformer's call denoises, by its arguments, each (channels, frames, height, width).
        noise: noise over noise and signal at a step, in [0, 1].
    """

    def __init__(self, transformers: Sequence[nn.Module], latents: ReadLatents, noise: ReadNoise) -> None:
        self._given = tuple(transformers)
        self._latents, self._noise = latents, noise
        self._transformers = tuple(getattr(module, "_orig_mod", module) for module in transformers)

    def enabled(self) -> str | None:
        for module in self._transformers:
            if (config := getattr(module, "_cache_config", None)) is not None:
                return type(config).__name__.removesuffix("Config")
        return None

    def install(self, cache: StepCache) -> "_Installed":
        if (other := self.enabled()) is not None:
            raise ModelError(
                f"the policy's cache, {cache.kind}, can't be enabled: {other} is enabled already; call "
                "transformer.disable_cache() first"
            )
        if cache.ratios and len(cache.ratios) != len(self._transformers):
            raise ModelError(
                f"the policy's mag cache has ratios of {len(cache.ratios)} transformers, the model has "
                f"{len(self._transformers)}; use a checkpoint that was tuned for this model"
            )
        if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in self._given):
            raise ModelError(
                f"the policy's cache, {cache.kind}, can't be enabled on a transformer that is compiled as a whole; "
                "compile its blocks instead: transformer.compile_repeated_blocks()"
            )
        installed: list[_OnTransformer] = []
        try:
            for index, module in enumerate(self._transformers):
                installed.append(_OnTransformer(module, cache, index, self._latents, self._noise))
        except BaseException:
            for one in installed:
                one.remove()
            raise
        return _Installed(installed)


class _Installed:
    def __init__(self, caches: "list[_OnTransformer]") -> None:
        self._caches = caches

    def before_call(self, transformer: int, step: int | None, num_steps: int, arguments: Mapping[str, Any]) -> None:
        self._caches[transformer].before_call(step, num_steps, arguments)

    def reset(self) -> None:
        for cache in self._caches:
            cache.forget()

    def remove(self) -> None:
        for cache in self._caches:
            cache.remove()
        self._caches = []


class _OnTransformer:
    """A cache on one transformer."""

    def __init__(
        self,
        module: Any,
        cache: StepCache,
        index: int,
        latents: ReadLatents = lambda module, arguments: None,
        noise: ReadNoise = lambda step: None,
    ) -> None:
        self.module, self.cache, self._index = module, cache, index
        self._latents, self._noise = latents, noise
        self._num_steps = 0
        self._last_step: int | None = None
        if not hasattr(module, "enable_cache"):
            raise ModelError(f"{type(module).__name__} supports none of diffusers' step caches; use --caches none")
        self._hooked_before = {id(one) for one in module.modules() if _HOOKS in one.__dict__}
        self._config = self._make_config()
        try:
            module.enable_cache(self._config)
        except Exception as error:
            module._cache_config = self._config  # so that hooks on its first blocks are removed too
            self.remove()
            raise ModelError(
                f"{type(module).__name__} doesn't support the cache {cache.kind} ({' '.join(str(error).split())}); "
                "use another one of --caches"
            ) from error
        self._hooks = [hook for hook in hooks_of(module) if type(hook).__name__ in _LEADERS]
        if not self._hooks:
            self.remove()
            raise ModelError(
                f"{type(module).__name__} doesn't support the cache {cache.kind}: diffusers finds no blocks in it; use "
                "another one of --caches"
            )
        self._root = next((hook for hook in hooks_of(module) if type(hook).__name__ == _ROOT), None)
        if self._root is not None:  # it runs in `before_call`, where the step is known
            self._root.fn_ref.pre_forward = lambda module, *args, **kwargs: (args, kwargs)

    def before_call(self, step: int | None, num_steps: int, arguments: Mapping[str, Any]) -> None:
        """Let the hooks skip, or not, in the next call."""
        if self.module._cache_config is not self._config:
            raise ModelError(
                f"the policy's cache, {self.cache.kind}, was disabled or replaced under it; call remove() on the "
                "handle, and sparsify again"
            )
        may_skip = self.cache.may_skip(step, num_steps)
        if step is not None:
            if self._last_step is not None and step < self._last_step:
                self.forget()
            self._last_step = step
        manager = self._hooks[0].state_manager
        if manager._context is None:
            raise ModelError(
                f"the cache {self.cache.kind} can't run in this pipeline, which doesn't name its transformer calls "
                "(cache_context); use another one of --caches, or none"
            )
        if self.cache.kind == "taylorseer":
            for hook in self._hooks:
                hook.disable_cache_after_step = None if may_skip else 0  # all steps from there on are computed
            return
        # First Block Cache's hook has a copy of the threshold, the others' share the configuration.
        owner = self._hooks[0] if self.cache.kind == "first_block" else self._config
        owner.threshold = self.cache.threshold if may_skip else _NEVER
        if self.cache.kind == "mag":
            self._fit_ratios(num_steps)
        if self._root is not None:
            # Few pipelines of diffusers pass these.
            noise = None if step is None else self._noise(step)
            context = replace(manager._context, step_index=step, sigma=noise, num_inference_steps=num_steps)
            manager.set_context(context)
            self._root.pre_forward(self.module, **arguments)

    def forget(self) -> None:
        """Forget an earlier generation, which the pipeline does at its end, but not where it failed."""
        for hook in hooks_of(self.module):
            if (manager := getattr(hook, "state_manager", None)) is not None:
                manager._state_cache.clear()

    def remove(self) -> None:
        """Disable the cache, and leave no attribute of diffusers' hooks behind that wasn't there."""
        if self.module._cache_config is self._config:  # and not one that the user enabled in its place
            self.module.disable_cache()
        for module in self.module.modules():
            registry = module.__dict__.get(_HOOKS)
            if registry is None or registry.hooks or id(module) in self._hooked_before:
                continue
            del module.__dict__[_HOOKS]
            forward = module.__dict__.get("forward")
            if isinstance(forward, types.MethodType) and forward.__func__ is type(module).forward:
                del module.__dict__["forward"]
        registry = self.module.__dict__.get(_HOOKS)
        if registry is not None:
            registry.invalidate_child_registries_cache()

    def _make_config(self) -> Any:
        from diffusers import FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig

        cache = self.cache
        if cache.kind == "first_block":
            return FirstBlockCacheConfig(threshold=cache.threshold or 0.0)  # type: ignore[no-untyped-call]
        if cache.kind == "mag":
            ratios = list(cache.ratios[self._index])
            return MagCacheConfig(  # type: ignore[no-untyped-call]
                threshold=cache.threshold or 0.0, max_skip_steps=cache.max_skips or 0, retention_ratio=0.0,
                num_inference_steps=len(ratios), mag_ratios=ratios,
            )  # fmt: skip
        if cache.kind == "sea":
            return SeaCacheConfig(  # type: ignore[no-untyped-call]
                threshold=cache.threshold or 0.0, max_consecutive_cached=cache.max_skips or 0, retention_steps=0,
                cache_end_steps=0, raw_vision_callback=lambda module, _, kwargs: self._latents(module, kwargs),
            )  # fmt: skip
        return TaylorSeerCacheConfig(  # type: ignore[no-untyped-call]
            cache_interval=(cache.max_skips or 0) + 1,
            disable_cache_before_step=_WARM_UP,
            taylor_factors_dtype=self.module.dtype,
            cache_identifiers=[rf"{name}\.\d+" for name in block_lists(self.module)],
        )

    def _fit_ratios(self, num_steps: int) -> None:
        """Stretch the calibrated ratios to this generation's steps, each transformer's share of them alike."""
        if num_steps == self._num_steps:
            return
        from diffusers.hooks.mag_cache import nearest_interp

        calibrated = sum(len(ratios) for ratios in self.cache.ratios)
        ratios = self.cache.ratios[self._index]
        length = max(1, round(len(ratios) * num_steps / calibrated))
        self._config.mag_ratios = nearest_interp(torch.tensor(ratios), length)
        self._config.num_inference_steps = num_steps + 1  # the hook would forget its state within a longer generation
        self._num_steps = num_steps


def supported_kinds(pipe: Any, caching: StepCaching, num_transformers: int) -> tuple[CacheKind, ...]:
    """Return the kinds of cache that can be installed on a pipeline's transformers, without rendering."""
    if "cache_context" not in inspect.getsource(type(pipe).__call__):  # without it hooks can't tell calls apart
        return ()
    ratios = ((1.0,),) * num_transformers
    return tuple(kind for kind in CACHE_KINDS if _can_be_installed(caching, always_skipping(kind, ratios)))


def always_skipping(kind: CacheKind, ratios: tuple[tuple[float, ...], ...]) -> StepCache:
    """Return a cache that skips every other step, whatever the error."""
    return StepCache(
        kind,
        _ANY if kind in WITH_THRESHOLD else None,
        1 if kind in WITH_MAX_SKIPS else None,
        ratios=ratios if kind == "mag" else (),
    )


def _can_be_installed(caching: StepCaching, cache: StepCache) -> bool:
    try:
        caching.install(cache).remove()
    except ModelError:
        return False
    return True


_LEADERS = ("FBCHeadBlockHook", "MagCacheHeadHook", "TaylorSeerCacheHook", "SeaCacheLeaderBlockHook")
"""Names of the hooks that decide whether a step is skipped."""

_ROOT = "SeaCacheRootHook"
"""Name of the hook that prepares SeaCache for a call of the transformer."""


def hooks_of(module: nn.Module) -> list[Any]:
    """Return diffusers' hooks on a module and those below it."""
    registries = (one.__dict__.get(_HOOKS) for one in module.modules())
    return [hook for registry in registries if registry is not None for hook in registry.hooks.values()]


def block_lists(module: nn.Module) -> list[str]:
    """Return the names of a transformer's lists of blocks, as diffusers knows them."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS

    return [
        name
        for name, child in module.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, nn.ModuleList)
    ]


@contextlib.contextmanager
def measuring_ratios(transformers: Sequence[nn.Module]) -> Iterator[list[list[float]]]:
    """Calibrate MagCache: yield each transformer's ratios, which grow while it is rendered; nothing is skipped.

    Where guidance makes two calls a step, a ratio is the mean of both. Read them before the rendering ends: the
    pipeline then resets the hooks.

    Raises:
        ModelError: a transformer doesn't support MagCache, or a cache is enabled.
    """
    enabled: list[Any] = []
    handles = []
    ratios: list[list[float]] = [[] for _ in transformers]
    try:
        for module, found in zip(transformers, ratios, strict=True):
            cache = StepCache("mag", 1.0, 1, ratios=((1.0,),) * len(transformers))
            installed = _OnTransformer(module, cache, 0)
            enabled.append(installed)
            installed._config.calibrate, installed._config.num_inference_steps = True, 1_000_000

            def read(*_: Any, cache: _OnTransformer = installed, found: list[float] = found) -> None:
                states = [list(state.calibration_ratios) for state in _states(cache)]
                shortest = min(map(len, states), default=0)
                found[:] = [sum(each[step] for each in states) / len(states) for step in range(shortest)]

            handles.append(module.register_forward_hook(read))
        yield ratios
    finally:
        for handle in handles:
            handle.remove()
        for installed in enabled:
            installed.remove()


def _states(cache: _OnTransformer) -> list[Any]:
    return list(cache._hooks[0].state_manager._state_cache.values())
