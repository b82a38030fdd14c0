"""The registry of metrics: what each is called, what it means and how to run it."""

import difflib
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sparsetune.errors import MetricError, SparsetuneError

Frames = npt.NDArray[np.uint8]
"""A video: uint8 RGB, (frames, height, width, 3), every frame before any video encoding."""

MetricFunction = Callable[[Frames, Frames], float]
"""A metric: the dense model's frames and the sparse one's, in that order, to one finite number."""


class MetricUnavailable(MetricError):
    """A metric that can't be taken here: frames too small for it, or a part that isn't installed."""


@dataclass(frozen=True)
class Metric:
    """One registered metric and everything that a reader of its numbers needs.

    Args:
        name: its key in tables and JSON.
        function: takes the dense and the sparse frames, each uint8 (frames, height, width, 3).
        unit: of its value, e.g. `dB`; empty when it has none.
        range: the lowest and highest value that it can take.
        higher_is_better: the direction.
        definition: what exactly is computed.
        source: where the formula comes from.
    """

    name: str
    function: MetricFunction
    unit: str
    range: tuple[float, float]
    higher_is_better: bool
    definition: str
    source: str


_REGISTRY: dict[str, Metric] = {}

_Function = TypeVar("_Function", bound=Callable[..., float])


def metric(
    *,
    higher_is_better: bool,
    name: str | None = None,
    unit: str = "",
    range: tuple[float, float] = (-math.inf, math.inf),
    definition: str | None = None,
    source: str = "user-defined",
) -> Callable[[_Function], _Function]:
    """Register the decorated function of two frame arrays, and give it back unchanged.

        @metric(higher_is_better=False)
        def brightness_shift(dense, sparse):
            "Absolute difference of the mean pixel values."
            return abs(float(dense.mean()) - float(sparse.mean())) / 255

    `name` defaults to the function's, `definition` to the first line of its docstring.

    Raises:
        MetricError: the name is taken by another function, or isn't an identifier (it is a key in JSON files).
    """

    def register(function: _Function) -> _Function:
        key = name or function.__name__
        if not key.isidentifier():
            raise MetricError(f"a metric's name must be an identifier, but is {key!r}; give letters, digits and _")
        known = _REGISTRY.get(key)
        if known is not None and _place(known.function) != _place(function):
            raise MetricError(f"a metric's name must be unique, but {key!r} is taken; give name= another one")
        described = definition or (inspect.getdoc(function) or key).splitlines()[0]
        _REGISTRY[key] = Metric(key, function, unit, range, higher_is_better, described, source)
        return function

    return register


def _place(function: Callable[..., Any]) -> tuple[str, str]:
    # A module that is loaded again (a notebook's cell, importlib.reload) may register its own metrics again.
    return function.__module__, function.__qualname__


def names() -> tuple[str, ...]:
    """Every registered metric's name, in order of registration."""
    return tuple(_REGISTRY)


def own_names() -> tuple[str, ...]:
    """Names of the metrics that aren't sparsetune's but a user's, in order of registration."""
    return tuple(name for name, one in _REGISTRY.items() if one.function.__module__.partition(".")[0] != "sparsetune")


def get(name: str) -> Metric:
    """Look up one metric.

    Raises:
        MetricError: there is none of that name; the message gives the nearest ones.
    """
    try:
        return _REGISTRY[name]
    except KeyError:
        near = difflib.get_close_matches(name, _REGISTRY, n=3) or list(_REGISTRY)
        raise MetricError(f"a metric must be registered, but {name!r} is not; choose from {', '.join(near)}") from None


def compute(dense: Frames, sparse: Frames, names: Iterable[str]) -> dict[str, float]:
    """Take the named metrics on one pair of videos, each uint8 (frames, height, width, 3).

    Raises:
        MetricUnavailable: one of them can't be taken here (see `compute_available`).
        MetricError: a name is unknown, the videos don't match, or a value isn't a finite number.
    """
    chosen = [get(name) for name in names]
    check_pair(dense, sparse)
    return {one.name: _value(one, dense, sparse) for one in chosen}


def compute_available(dense: Frames, sparse: Frames, names: Iterable[str]) -> tuple[dict[str, float], dict[str, str]]:
    """As `compute`, but a metric that can't be taken here is reported instead of raised.

    Returns:
        The values by name, and for each metric that is missing from them the reason, in one line.
    """
    chosen = [get(name) for name in names]
    check_pair(dense, sparse)
    values: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    for one in chosen:
        try:
            values[one.name] = _value(one, dense, sparse)
        except MetricUnavailable as error:
            unavailable[one.name] = str(error)
    return values, unavailable


def check_pair(dense: Frames, sparse: Frames) -> None:
    """Check that two videos can be compared frame by frame.

    Raises:
        MetricError: one isn't a uint8 array of shape (frames, height, width, 3) with at least one pixel, or
            their shapes differ.
    """
    for side, frames in (("dense", dense), ("sparse", sparse)):
        given = f"{frames.dtype} of shape {frames.shape}" if isinstance(frames, np.ndarray) else _kind(frames)
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
            raise MetricError(
                f"{side} frames must be a uint8 array, but are {given}; "
                "give np.stack of the frames, scaled to 0..255, rounded and cast to np.uint8"
            )
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
            raise MetricError(
                f"{side} frames must be (frames, height, width, 3) with at least one frame and pixel, "
                f"but are {given}; give RGB frames, channels last"
            )
    if dense.shape != sparse.shape:
        raise MetricError(
            f"dense and sparse frames must have the same shape, but dense are {dense.shape} and sparse "
            f"{sparse.shape}; render both with the same size and number of frames"
        )


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def _value(one: Metric, dense: Frames, sparse: Frames) -> float:
    try:
        value = float(one.function(dense, sparse))
    except SparsetuneError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise MetricError(
            f"a metric must give a finite number, but {one.name} raised {type(error).__name__}: {error}; "
            "mend its function, or raise MetricUnavailable where it has no value"
        ) from error
    if not math.isfinite(value):
        raise MetricError(
            f"a metric must give a finite number, but {one.name} gave {value}; "
            "mend its function, or raise MetricUnavailable where it has no value"
        )
    return value


def import_metrics(places: Iterable[str]) -> None:
    """Import modules whose functions are decorated with `metric`, which registers them.

    Args:
        places: each a file (`my_metrics.py`, `tools/my_metrics.py`), or the name of a module that can be imported
            from the current folder or the environment (`my_package.metrics`).

    Raises:
        MetricError: there is no such file or module, or importing it fails.
    """
    for place in map(os.path.expanduser, places):
        is_file = place.endswith(".py") or os.sep in place
        if is_file and not Path(place).is_file():
            raise MetricError(
                f"a metric module must be a Python file or a module's name, but there is no file {place}; mend the path"
            )
        try:
            _import_file(Path(place)) if is_file else _import_name(place)
        except MetricError:
            raise
        except ModuleNotFoundError as error:
            if error.name is not None and place.partition(".")[0] == error.name.partition(".")[0]:
                raise MetricError(
                    f"a metric module must be a Python file or a module's name, but there is no module {place}; "
                    "mend the name"
                ) from error
            raise _failed(place, error) from error
        except Exception as error:  # whatever a user's module raises
            raise _failed(place, error) from error


def _import_name(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())  # an installed command, unlike `python -m`, doesn't look here
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(os.getcwd())


def _import_file(path: Path) -> ModuleType:
    name = f"{path.stem}_{abs(hash(path.resolve())):x}"  # no name that another module could have
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise MetricError(f"a metric module must be a Python file, but {path} isn't; give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _failed(place: str, error: Exception) -> MetricError:
    return MetricError(
        f"a metric module must be importable, but importing {place} raised {type(error).__name__}: {error}; mend it"
    )
