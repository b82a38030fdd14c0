"""Intercepts the self-attention calls of any model.

While a self-attention module's forward runs, an `AttentionCallMode` redirects each attention call below it, whatever
processor makes that call. Nothing of a model's own code is copied or replaced.
"""

import copy
import functools
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsetune.attention.call_mode import AttentionCallMode, Forward, sdpa
from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.schedule import step_of
from sparsetune.attention.sites import AttentionSites, DenseCall, LayerSite, TransformerCall, TransformerSite
from sparsetune.errors import ModelError

logger = logging.getLogger(__name__)

# The attribute in which accelerate's offloading hooks keep the forward that they call. They restore it as `forward` and
# hook it again after each generation, which would lose a wrapper around the hooked forward: ours goes below. So it does
# below diffusers' hooks (step caches, group offloading), which restore the forward that they found once removed.
_UNHOOKED = "_old_forward"
_DIFFUSERS_HOOKS = "_diffusers_hook"


class CallObserver(Protocol):
    """Is told of each transformer call; of no call within a graph of `torch.compile`."""

    def before_call(
        self, site: TransformerSite, step: int | None, num_steps: int, arguments: Mapping[str, Any]
    ) -> None: ...

    def after_call(self, site: TransformerSite, step: int | None) -> None:
        """Not called where the transformer's forward raised."""


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of a self-attention layer, as its module makes it."""

    layer: LayerSite
    transformer: TransformerCall | None  # the one around it; None when the attention ran outside of one
    step: int | None  # from 0; None when the timestep isn't one of the scheduler's
    num_steps: int
    q: Tensor  # (batch, heads, tokens, head_dim), like k and v
    k: Tensor
    v: Tensor
    mask: Tensor | None
    is_causal: bool
    dropout: float
    enable_gqa: bool
    scale: float
    dense: DenseCall = sdpa

    def original(self) -> Tensor:
        """Return the dense output, by the pipeline's own kernel."""
        names = ("q", "k", "v", "mask", "dropout", "is_causal", "scale", "enable_gqa")
        return self.dense(**{name: getattr(self, name) for name in names})

    @functools.cached_property
    def layout(self) -> TokenLayout | None:
        """Positions of video and text tokens; None where they don't add up to the number of queries."""
        if self.transformer is None:
            return None
        grid, tail = self.transformer.grid_and_tail(self.q.shape[-2])
        frames, height, width = grid
        num_text = self.q.shape[-2] - frames * height * width - tail
        if self.layer.text is None and num_text == -tail:
            return TokenLayout(grid, range(0))  # of a layer for the grid's tokens alone
        if num_text < 0 or (num_text and self.layer.text is None):
            return None
        first = 0 if self.layer.text == "start" else self.q.shape[-2] - num_text
        return TokenLayout(grid, range(first, first + num_text) if num_text else range(0), tail)


class Interception:
    """Redirects every self-attention call of a pipeline to `attend`, until `remove`.

    ModelError where the pipeline's attention is intercepted already.
    """

    def __init__(
        self,
        sites: AttentionSites,
        attend: Callable[[AttentionCall], Tensor],
        observer: CallObserver | None = None,
    ) -> None:
        _check_free(sites)
        self.active = True
        self._sites = sites
        self._attend = attend
        self._observer = observer
        self._running: dict[str, TransformerCall] = {}
        self._last: tuple[Tensor, int | None, int] | None = None
        self._without_calls: set[str] = set()
        self._copied = False
        self._replaced: list[tuple[nn.Module, Forward | None, Forward]] = []  # module, its own forward, ours
        self._modes: list[AttentionCallMode] = []
        try:
            for transformer in sites.transformers:
                self._replace(transformer.module, functools.partial(self._transformer_wrapper, transformer))
                for layer in transformer.layers:
                    self._replace(layer.module, functools.partial(self._layer_wrapper, transformer, layer))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the pipeline's modules exactly; does nothing the second time."""
        self.active = False  # a wrapper that someone put around ours since stays in place: ours passes calls through
        for module, own_forward, ours in self._replaced:
            for owner, attribute in _places(module):
                if owner.__dict__.get(attribute) is not ours:
                    continue
                if own_forward is None and owner is module and attribute == "forward":
                    del module.forward
                else:
                    owner.__dict__[attribute] = own_forward or types.MethodType(type(module).forward, module)
        for mode in self._modes:
            mode.close()
        self._replaced.clear()
        self._modes.clear()

    def warn_of_copy(self) -> None:
        if self.active and not self._copied:
            self._copied = True
            logger.warning("a copy of a sparse transformer is dense; call sparsify on a pipeline with the copy")

    def _replace(self, module: nn.Module, wrap: Callable[[Forward], Forward]) -> None:
        owner, attribute = _innermost(module)
        own_forward = owner.__dict__.get(attribute)
        original = getattr(owner, attribute)
        forward = _Intercepted(self, original, wrap(original)).forward
        owner.__dict__[attribute] = forward
        self._replaced.append((module, own_forward, forward))

    def _transformer_wrapper(self, transformer: TransformerSite, original: Forward) -> Forward:
        """Wrap a transformer's forward so that its timestep and grid are known below it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(transformer.arguments, args, strict=False)) | kwargs
            call = transformer.read_call(transformer.module, given)
            # Copying from a GPU waits for it: once a call, not once a layer.
            call = call._replace(
                timestep=call.timestep.to("cpu"),
                positions=None if call.positions is None else call.positions.to("cpu"),
            )
            self._running[transformer.name] = call
            try:
                if self._observer is None or torch.compiler.is_compiling():
                    return original(*args, **kwargs)
                step = self._before(self._observer, transformer, call.timestep, given)
                output = original(*args, **kwargs)
                self._after(self._observer, transformer, step)
                return output
            finally:
                self._running.pop(transformer.name, None)

        return forward

    def _layer_wrapper(self, transformer: TransformerSite, layer: LayerSite, original: Forward) -> Forward:
        def redirect(running: TransformerCall | None, dense: DenseCall, **call: Any) -> Tensor:
            step, num_steps = (None, 0) if running is None else self._step(running.timestep)
            return self._attend(
                AttentionCall(layer=layer, transformer=running, step=step, num_steps=num_steps, dense=dense, **call)
            )

        mode = AttentionCallMode(redirect, layer)
        self._modes.append(mode)

        def forward(*args: Any, **kwargs: Any) -> Any:
            mode.running = self._running.get(transformer.name)
            try:
                output = mode.run(original, args, kwargs)
            finally:
                mode.running = None  # a graph can't return what was made while it was compiled
            if not torch.compiler.is_compiling():
                self._check_called(layer, mode)
            return output

        return forward

    # What a broken graph leaves to Python is traced too, call by call: not these.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(
        self, observer: CallObserver, site: TransformerSite, timestep: Tensor, arguments: Mapping[str, Any]
    ) -> int | None:
        step, num_steps = self._step(timestep)
        observer.before_call(site, step, num_steps, arguments)
        return step

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, observer: CallObserver, site: TransformerSite, step: int | None) -> None:
        observer.after_call(site, step)

    def _step(self, timestep: Tensor) -> tuple[int | None, int]:
        if self._sites.counts_steps:
            step, num_steps = self._sites.step_index(), len(self._sites.timesteps())
            return (step if step is None or step < num_steps else None), num_steps
        if self._last is None or self._last[0] is not timestep:
            timesteps = self._sites.timesteps()
            rounding = torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
            step = step_of(float(timestep), timesteps, rounding, self._sites.step_index())
            self._last = (timestep, step, len(timesteps))
        return self._last[1:]

    def _check_called(self, layer: LayerSite, mode: AttentionCallMode) -> None:
        if not mode.called and layer.name not in self._without_calls:
            self._without_calls.add(layer.name)
            if len(self._without_calls) == 1:
                text = (
                    "%s made no attention call that can be made sparse or counted: a cache skipped it, or its %s "
                    "doesn't use PyTorch's scaled_dot_product_attention"
                )
                logger.warning(text, layer.name, type(getattr(layer.module, "processor", layer.module)).__name__)
        mode.called = False


class _Intercepted:
    """Holds a module's forward under an interception, as its own `forward`.

    A bound method, which torch.compile sees through, unlike a callable object. A copy of the module, or one that is
    pickled, gets the forward below it: that of the copy, which is dense.
    """

    def __init__(self, interception: Interception, original: Forward, run: Forward) -> None:
        self.interception = interception
        self.original = original
        self._run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self._run if self.interception.active else self.original)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self.interception.warn_of_copy()
        original = copy.deepcopy(self.original, memo)
        return _Intercepted(_NONE, original, original)

    def __reduce__(self) -> Any:
        self.interception.warn_of_copy()
        return types.SimpleNamespace, (), {"forward": self.original}


class _NoInterception:
    active = False

    def warn_of_copy(self) -> None: ...


_NONE: Any = _NoInterception()


def _places(module: nn.Module) -> list[tuple[Any, str]]:
    """Return the objects and attributes that may hold a module's forward."""
    places: list[tuple[Any, str]] = [(module, "forward")]
    if (registry := module.__dict__.get(_DIFFUSERS_HOOKS)) is not None:
        places += [(hooked, name) for hooked in registry._fn_refs for name in ("forward", "original_forward")]
    if _UNHOOKED in module.__dict__:
        places.append((module, _UNHOOKED))
    return places


def _innermost(module: nn.Module) -> tuple[Any, str]:
    """Return the object and attribute that hold a module's forward below all hooks."""
    registry = module.__dict__.get(_DIFFUSERS_HOOKS)
    if registry is None or not registry._fn_refs:
        return (module, _UNHOOKED if _UNHOOKED in module.__dict__ else "forward")
    hooked = registry._fn_refs[0]
    attribute = "forward" if hooked.original_forward is None else "original_forward"
    below = getattr(hooked, attribute)
    offloaded = isinstance(below, functools.partial) and below.func.__module__ == "accelerate.hooks"
    return (module, _UNHOOKED) if offloaded and _UNHOOKED in module.__dict__ else (hooked, attribute)


def _check_free(sites: AttentionSites) -> None:
    for transformer in sites.transformers:
        places: tuple[TransformerSite | LayerSite, ...] = (transformer, *transformer.layers)
        for site in places:
            for owner, attribute in _places(site.module):
                holder = getattr(owner.__dict__.get(attribute), "__self__", None)
                if isinstance(holder, _Intercepted) and holder.interception.active:
                    raise ModelError(f"{site.name} is sparse already; call remove() on its handle first")
