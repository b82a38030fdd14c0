"""Registry of metrics: name, unit, direction and definition of each, and their computation on a pair of videos."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt

from sparsetune.errors import MetricError, SparsetuneError
from sparsetune.files import similar_path

Frames = npt.NDArray[np.unsignedinteger[Any]]
"""A video: uint8 RGB, (frames, height, width, 3); uint16, with 65535 as white, only of files with more than 8 bits."""

Part = TypeVar("Part")
Value = TypeVar("Value")

_SLAB_BYTES = 1 << 24


class MetricUnavailable(MetricError):
    """A metric that can't be computed here: frames too small for it, or a package that isn't installed."""


@dataclass(frozen=True)
class Metric:
    """One registered metric.

    Args:
        name: its key in tables and JSON.
        function: of the dense and the sparse frames (frames, height, width, 3): of the whole videos, or `Pooled`.
        unit: of its value, e.g. `dB`; empty when it has none.
        range: the lowest and highest value that it can take.
        higher_is_better: the direction.
        definition: what exactly is computed.
        source: where the formula comes from.
    """

    name: str
    function: Callable[..., float]
    unit: str
    range: tuple[float, float]
    higher_is_better: bool
    definition: str
    source: str


_REGISTRY: dict[str, Metric] = {}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def metric(
    *,
    higher_is_better: bool,
    name: str | None = None,
    unit: str = "",
    range: tuple[float, float] = (-math.inf, math.inf),
    definition: str | None = None,
    source: str = "user-defined",
) -> Callable[[_Function], _Function]:
    """Register the decorated function of two frame arrays as a metric; the function is returned unchanged.

        @metric(higher_is_better=False)
        def brightness_shift(dense, sparse):
            "Absolute difference of the mean pixel values."
            return abs(float(dense.mean()) - float(sparse.mean())) / 255

    `name` defaults to the function's, `definition` to the first line of its docstring; see `Metric` for the rest.

    Raises:
        MetricError: the name is taken by another function, or isn't an identifier (it is a key in JSON files).
    """

    def qualified(function: Callable[..., Any]) -> tuple[str, str]:
        return function.__module__, function.__qualname__

    def register(function: _Function) -> _Function:
        key = name or function.__name__
        if not key.isidentifier():
            raise MetricError(f"metric name {key!r} must be an identifier: letters, digits and _")
        known = _REGISTRY.get(key)
        # A module that is loaded again (a notebook's cell, importlib.reload) may register its own metrics again.
        if known is not None and qualified(known.function) != qualified(function):
            raise MetricError(f"metric name {key!r} is already taken; pass another one as name=")
        described = definition or (inspect.getdoc(function) or key).splitlines()[0]
        _REGISTRY[key] = Metric(key, function, unit, range, higher_is_better, described, source)
        return function

    return register


def checked(function: _Function) -> _Function:
    """Check the two videos before the call; `compute` checks them once and calls the registered function itself."""

    @functools.wraps(function)
    def call(dense: Frames, sparse: Frames, *rest: Any, **options: Any) -> Any:
        check_pair(dense, sparse)
        return function(dense, sparse, *rest, **options)

    return cast(_Function, call)


class Pooled(Generic[Part, Value]):
    """A function of two videos, measured some frames at a time: neither has to be in memory as a whole.

    Args:
        measure: of some consecutive frames of both videos; videos measured by one function are measured once.
        pool: of the values of `measure` over a video, in order.
        overlap: whether each call of `measure` but the first begins with the last frame of the one before.
    """

    def __init__(
        self, measure: Callable[..., Part], pool: Callable[[Sequence[Part]], Value], *, overlap: bool = False
    ) -> None:
        self.measure, self.pool, self.overlap = measure, pool, overlap
        functools.update_wrapper(self, pool)

    def __call__(self, dense: Frames, sparse: Frames, **options: Any) -> Value:
        """Measure two whole videos; options are those of `measure`."""
        check_pair(dense, sparse)
        slabs = slabs_of(dense, sparse, overlap=int(self.overlap))
        return self.pool([self.measure(*slab, **options) for slab in slabs])


def pooled(
    measure: Callable[..., Part], *, overlap: bool = False
) -> Callable[[Callable[[Sequence[Part]], Value]], Pooled[Part, Value]]:
    """Make a function that pools the values of `measure` a function of two videos."""
    return lambda pool: Pooled(measure, pool, overlap=overlap)


Slab = tuple[Frames, Frames]
"""The same consecutive frames of the dense and the sparse video."""


def slab_length(height: int, width: int) -> int:
    """Return the number of frames of a slab, about 16 MiB of 8-bit RGB."""
    return max(1, _SLAB_BYTES // (3 * height * width))


def slabs_of(dense: Frames, sparse: Frames, overlap: int = 0) -> Iterator[Slab]:
    """Cut two videos in memory into slabs, each with that many frames of the one before."""
    step = slab_length(*dense.shape[1:3])
    for start in range(0, len(dense), step):
        part = slice(max(0, start - overlap), start + step)
        yield dense[part], sparse[part]


def names() -> tuple[str, ...]:
    """Names of all registered metrics, in order of registration."""
    return tuple(_REGISTRY)


def own_names() -> tuple[str, ...]:
    """Names of the metrics that a user registered, in order of registration."""
    return tuple(name for name, one in _REGISTRY.items() if one.function.__module__.partition(".")[0] != "sparsetune")


def get(name: str) -> Metric:
    """Look up a metric, or raise MetricError with the names nearest to an unknown one."""
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=3) or list(_REGISTRY)
        raise MetricError(f"unknown metric {name!r}; choose from {', '.join(near)}", is_usage=True)
    return _REGISTRY[name]


def compute(dense: Frames, sparse: Frames, names: Iterable[str]) -> dict[str, float]:
    """Compute the named metrics of one pair of videos, each uint8 (frames, height, width, 3).

    Raises:
        MetricUnavailable: one of them can't be computed here (see `compute_available`).
        MetricError: a name is unknown, the videos don't match, or a value isn't a finite number.
    """
    values, unavailable = compute_available(dense, sparse, names)
    for reason in unavailable.values():
        raise MetricUnavailable(reason)
    return values


def compute_available(dense: Frames, sparse: Frames, names: Iterable[str]) -> tuple[dict[str, float], dict[str, str]]:
    """As `compute`, but return the values by name, and the reason, in one line, of each that can't be computed here."""
    check_pair(dense, sparse)
    measuring = Measuring(names, is_whole=True)
    for slab in slabs_of(dense, sparse):
        measuring.add(*slab)
    return measuring.values(dense, sparse)


class Measuring:
    """Computes metrics of a pair of videos from slab after slab.

    Args:
        names: of registered metrics.
        is_whole: whether `values` will be given the whole videos; else they are kept for metrics that need them.
    """

    def __init__(self, names: Iterable[str], *, is_whole: bool = False) -> None:
        self._chosen = [get(name) for name in names]
        functions = [one.function for one in self._chosen]
        pooled_ones = [function for function in functions if isinstance(function, Pooled)]
        self._parts: dict[Callable[..., Any], list[Any]] = {one.measure: [] for one in pooled_ones}
        self._overlapping = {one.measure for one in pooled_ones if one.overlap}
        self._unavailable: dict[Callable[..., Any], str] = {}
        self._kept: list[Slab] | None = None if is_whole or len(pooled_ones) == len(functions) else []
        self._last: Slab | None = None

    def add(self, dense: Frames, sparse: Frames) -> None:
        """Measure the next frames of both videos."""
        check_pair(dense, sparse)
        extended = dense, sparse
        if self._overlapping and self._last is not None:
            extended = np.concatenate((self._last[0], dense)), np.concatenate((self._last[1], sparse))
        self._last = dense[-1:].copy(), sparse[-1:].copy()
        for measure, parts in self._parts.items():
            if measure not in self._unavailable:
                try:
                    parts.append(measure(*(extended if measure in self._overlapping else (dense, sparse))))
                except MetricUnavailable as error:
                    self._unavailable[measure] = str(error)
        if self._kept is not None:
            self._kept.append((dense, sparse))

    def values(self, *whole: Frames) -> tuple[dict[str, float], dict[str, str]]:
        """Return the values by name, and the reason of each metric that can't be computed here."""
        if self._kept is not None:
            whole = tuple(np.concatenate(side) for side in zip(*self._kept, strict=True))
        values: dict[str, float] = {}
        unavailable: dict[str, str] = {}
        for one in self._chosen:
            try:
                values[one.name] = _value(one, self._call(one.function, whole))
            except MetricUnavailable as error:
                unavailable[one.name] = str(error)
        return values, unavailable

    def _call(self, function: Callable[..., float], whole: tuple[Frames, ...]) -> Callable[[], float]:
        if not isinstance(function, Pooled):
            return functools.partial(function, *whole)
        if function.measure in self._unavailable:
            raise MetricUnavailable(self._unavailable[function.measure])
        return functools.partial(function.pool, self._parts[function.measure])


def check_pair(dense: Frames, sparse: Frames) -> None:
    """Raise MetricError unless both are uint8 or uint16 of the same non-empty shape (frames, height, width, 3)."""
    for side, frames in (("dense", dense), ("sparse", sparse)):
        if not isinstance(frames, np.ndarray) or frames.dtype not in (np.uint8, np.uint16):
            kind = getattr(frames, "dtype", type(frames).__name__)
            raise MetricError(f"{side} frames must be a uint8 array of values 0..255, got {kind}")
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
            raise MetricError(f"{side} frames must have shape (frames, height, width, 3), got {frames.shape}")
    if dense.dtype != sparse.dtype:
        raise MetricError(f"dense and sparse frames must have the same type, got {dense.dtype} and {sparse.dtype}")
    if dense.shape != sparse.shape:
        raise MetricError(
            f"dense and sparse frames must have the same shape, got {dense.shape} and {sparse.shape}; "
            "render both with the same size and number of frames"
        )


def check_min_side(name: str, size: tuple[int, int], side: int) -> None:
    """Raise MetricUnavailable where height or width of the frames is under `side` pixels."""
    height, width = size
    if min(height, width) < side:
        raise MetricUnavailable(f"{name} needs frames of at least {side}x{side} pixels, got {height}x{width}")


def _value(one: Metric, call: Callable[[], float]) -> float:
    try:
        value = float(call())
    except SparsetuneError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise MetricError(f"metric {one.name} raised {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise MetricError(
            f"metric {one.name} returned {value} instead of a finite number; "
            "raise MetricUnavailable where it has no value"
        )
    return value


def import_metrics(modules: Iterable[str]) -> None:
    """Import modules whose functions are decorated with `metric`, which registers them.

    Each is a file (`my_metrics.py`, `tools/my_metrics.py`), or the name of a module that can be imported from the
    current folder or the environment (`my_package.metrics`). MetricError: there is none, or importing it fails.
    """
    folder = os.getcwd()
    for module in map(os.path.expanduser, modules):
        try:
            if module.endswith(".py") or os.sep in module:
                _import_file(Path(module))
            else:
                sys.path.insert(0, folder)  # an installed command, unlike `python -m`, doesn't look here
                try:
                    importlib.import_module(module)
                finally:
                    sys.path.remove(folder)
        except MetricError:
            raise
        except Exception as error:  # whatever a user's module raises
            if isinstance(error, ModuleNotFoundError) and error.name in (module, module.partition(".")[0]):
                raise MetricError(f"no metric module named {module}", is_usage=True) from error
            raise MetricError(f"cannot import metric module {module}: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise MetricError(f"no metric module at {path}{similar_path(path)}", is_usage=True)
    name = f"{path.stem}_{abs(hash(path.resolve())):x}"  # unlike any other module's name
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise MetricError(f"metric module {path} must be a Python file that ends in .py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
