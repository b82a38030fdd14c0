"""Registry of metrics: name, unit, direction and definition of each, and their computation on a pair of videos."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from sparsetune.errors import MetricError, SparsetuneError

Frames = npt.NDArray[np.uint8]
"""A video: uint8 RGB, (frames, height, width, 3), before any video encoding."""


class MetricUnavailable(MetricError):
    """A metric that can't be computed here: frames too small for it, or a package that isn't installed."""


@dataclass(frozen=True)
class Metric:
    """One registered metric.

    Args:
        name: its key in tables and JSON.
        function: of the dense and the sparse frames, each uint8 (frames, height, width, 3).
        unit: of its value, e.g. `dB`; empty when it has none.
        range: the lowest and highest value that it can take.
        higher_is_better: the direction.
        definition: what exactly is computed.
        source: where the formula comes from.
        prepare: function of both videos, called once per pair; its value is the third argument of `function`.
    """

    name: str
    function: Callable[..., float]
    unit: str
    range: tuple[float, float]
    higher_is_better: bool
    definition: str
    source: str
    prepare: Callable[[Frames, Frames], Any] | None = None


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
    prepare: Callable[[Frames, Frames], Any] | None = None,
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
        _REGISTRY[key] = Metric(key, function, unit, range, higher_is_better, described, source, prepare)
        return function

    return register


def checked(function: _Function) -> _Function:
    """Check the two videos before the call; `compute` checks them once and calls the registered function itself."""

    @functools.wraps(function)
    def call(dense: Frames, sparse: Frames, *rest: Any, **options: Any) -> Any:
        check_pair(dense, sparse)
        return function(dense, sparse, *rest, **options)

    return cast(_Function, call)


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
        raise MetricError(f"unknown metric {name!r}; choose from {', '.join(near)}")
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
    chosen = [get(name) for name in names]
    check_pair(dense, sparse)
    prepared = {prepare: prepare(dense, sparse) for prepare in {one.prepare for one in chosen if one.prepare}}
    values: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    for one in chosen:
        try:
            values[one.name] = _value(one, dense, sparse, *([prepared[one.prepare]] if one.prepare else []))
        except MetricUnavailable as error:
            unavailable[one.name] = str(error)
    return values, unavailable


def check_pair(dense: Frames, sparse: Frames) -> None:
    """Raise MetricError unless both are uint8 arrays of the same non-empty shape (frames, height, width, 3)."""
    for side, frames in (("dense", dense), ("sparse", sparse)):
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
            kind = getattr(frames, "dtype", type(frames).__name__)
            raise MetricError(f"{side} frames must be a uint8 array of values 0..255, got {kind}")
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
            raise MetricError(f"{side} frames must have shape (frames, height, width, 3), got {frames.shape}")
    if dense.shape != sparse.shape:
        raise MetricError(
            f"dense and sparse frames must have the same shape, got {dense.shape} and {sparse.shape}; "
            "render both with the same size and number of frames"
        )


def check_min_side(name: str, frames: Frames, side: int) -> None:
    """Raise MetricUnavailable where a side of the frames is under `side` pixels."""
    height, width = frames.shape[1:3]
    if min(height, width) < side:
        raise MetricUnavailable(f"{name} needs frames of at least {side}x{side} pixels, got {height}x{width}")


def _value(one: Metric, *arguments: Any) -> float:
    try:
        value = float(one.function(*arguments))
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
                raise MetricError(f"no metric module named {module}") from error
            raise MetricError(f"cannot import metric module {module}: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise MetricError(f"no metric module at {path}")
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
