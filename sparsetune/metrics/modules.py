"""Import of the Python files and modules in which users register metrics of their own."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from sparsetune.errors import MetricError


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
