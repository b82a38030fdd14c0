"""Checks of this machine: Python, libraries, GPU, backends, ffmpeg, tracking store and cache.

PyTorch, which takes seconds to import, is imported only where there is a GPU, and MLflow where the store is no SQLite
file.
"""

import ctypes
import functools
import importlib.util
import os
import platform
import runpy
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from sparsetune import ffmpeg
from sparsetune.config import CacheConfig, Config, TrackingConfig
from sparsetune.config.models import Backend
from sparsetune.errors import SparsetuneError

Status = Literal["ok", "note", "fail"]

_FILTERS = ("libvmaf", "xpsnr", "ssim", "psnr")
_LIBRARIES = ("diffusers", "transformers", "accelerate", "safetensors", "optuna", "mlflow")
_LEAST_PYTHON = (3, 11)
_ENCODER = "libx264"
_NEED_GPU = ("sparge", "flex")
_NO_GPU = "there is no GPU"
_TEST_TAG = "sparsetune.doctor"  # written to test that a tracking server is writable


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    name: str
    status: Status  # `note` where something optional is missing, `fail` where something required is
    text: str  # one line
    facts: dict[str, Any] = field(default_factory=dict)  # the same as JSON values


def examine(config: Config) -> Iterator[Finding]:
    """Run all checks; an exception in a check is its finding."""
    checks: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ("python", lambda: [_python()]),
        ("libraries", lambda: [_library(name) for name in _LIBRARIES]),
        ("torch", lambda: [_torch()]),
        ("gpu", _gpus),
        ("backend", _backends),
        ("spas_sage_attn", lambda: [_sparge()]),
        ("demo", lambda: [_demo()]),
        ("ffmpeg", lambda: [_ffmpeg()]),
        ("tracking", lambda: [_tracking(config.tracking)]),
        ("cache", lambda: [_cache(config.cache)]),
        ("leftovers", lambda: _leftovers(config.tracking)),
    )
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # a broken check must not stop the others
            yield Finding(name, "fail", f"{type(error).__name__}: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _python() -> Finding:
    version, enough = platform.python_version(), sys.version_info >= _LEAST_PYTHON
    text = f"{version} on {platform.platform()}" + ("" if enough else "; must be 3.11 or newer")
    return Finding("python", "ok" if enough else "fail", text, {"version": version, "platform": platform.platform()})


def _library(name: str) -> Finding:
    from sparsetune.checkpoint.manifest import package_version

    try:
        version = package_version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "fail", f"not installed; run: pip install {name}", {"version": None})
    return Finding(name, "ok", version, {"version": version})


@functools.cache
def _torch_version() -> dict[str, Any]:
    """Run torch/version.py alone: `__version__`, and `cuda` and `hip` of the build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ImportError("not installed; run: pip install torch")
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))


def _torch() -> Finding:
    version = _torch_version()
    cuda, cores = version["cuda"], os.cpu_count()
    built = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    facts = {"version": version["__version__"], "cuda": cuda, "cpu_cores": cores}
    return Finding("torch", "ok", f"{version['__version__']}, {built}, {cores} CPU cores", facts)


@functools.cache
def _has_gpu() -> bool:
    """Whether PyTorch finds a GPU; it isn't asked where CUDA's driver has no device."""
    version = _torch_version()
    if not version.get("hip") and not (version["cuda"] and _num_cuda_devices()):
        return False
    import torch

    return torch.cuda.is_available()


def _num_cuda_devices() -> int:
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def _gpus() -> list[Finding]:
    if not _has_gpu():
        return [Finding("gpu", "note", "PyTorch finds none; everything runs on the CPU, slowly", {"name": None})]
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        text = f"{properties.name}, compute capability {capability}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        facts = {"name": properties.name, "capability": capability, "free_bytes": free, "total_bytes": total}
        found.append(Finding(f"gpu {index}", "ok", text, facts))
    return found


def _backends() -> list[Finding]:
    if not _has_gpu():
        names = [name for name in get_args(Backend) if name != "auto"]
        found = [_backend(name, _NO_GPU if name in _NEED_GPU else None) for name in names]
        facts = {"chosen": "reference", "reason": _NO_GPU}
        return [*found, Finding("backend auto", "ok", f"reference ({_NO_GPU})", facts)]
    from sparsetune.attention.backends import backend_choice, missing_backends
    from sparsetune.attention.device import device_of

    device = device_of("auto")
    found = [_backend(name, missing) for name, missing in missing_backends(device).items()]
    choice = backend_choice("auto", device)
    facts = {"chosen": choice.backend.name, "reason": choice.reason}
    return [*found, Finding("backend auto", "ok", f"{choice.backend.name} ({choice.reason})", facts)]


def _backend(name: str, missing: str | None) -> Finding:
    text = "runs here" if missing is None else f"can't run here: {missing}"
    facts = {"runs": missing is None, "missing": missing}
    return Finding(f"backend {name}", "ok" if missing is None else "note", text, facts)


def _sparge() -> Finding:
    """Run SpargeAttn's kernel on a few tokens: a build for another GPU fails only then."""
    if not _has_gpu():
        installed = importlib.util.find_spec("spas_sage_attn") is not None
        text = f"{'installed, but' if installed else 'not installed, and'} there is no GPU to run it on"
        return Finding("spas_sage_attn", "note", text, {"runs": False, "missing": text})
    import torch

    from sparsetune.attention.backends import SpargeBackend
    from sparsetune.attention.device import device_of
    from sparsetune.attention.thresholds import SPARGE_DEFAULTS, LayerThresholds

    device = device_of("auto")
    if missing := SpargeBackend.missing(device):
        return Finding("spas_sage_attn", "note", missing, {"runs": False, "missing": missing})
    q, k, v = torch.randn(3, 1, 1, 256, 64, dtype=torch.bfloat16, device=device)
    thresholds = LayerThresholds.uniform("doctor", 1, SPARGE_DEFAULTS).tensors(device)
    try:
        attended = SpargeBackend(device).attend(q, k, v, thresholds, scale=0.125, keep=range(1))
        if not attended.output.isfinite().all():
            raise ArithmeticError("non-finite values")
    except Exception as error:  # its extension may raise anything
        text = f"installed, but its kernels fail: {_line(error)}; build it for this GPU and PyTorch"
        return Finding("spas_sage_attn", "fail", text, {"runs": False, "missing": _line(error)})
    return Finding("spas_sage_attn", "ok", "its kernels load and run", {"runs": True, "missing": None})


def _demo() -> Finding:
    from sparsetune.models.demo import WEIGHTS

    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    if not size:
        return Finding("demo model", "fail", f"weights missing from {WEIGHTS}; reinstall sparsetune")
    return Finding("demo model", "ok", f"{len(files)} files, {size / 1e6:.1f} MB", {"size_bytes": size})


def _ffmpeg() -> Finding:
    binary = ffmpeg.executable()
    if binary is None:
        return Finding("ffmpeg", "fail", "no ffmpeg found; run: pip install imageio-ffmpeg", {"path": None})
    words = ffmpeg.run(binary, ("-version",)).output.decode(errors="replace").split()
    version = words[2] if len(words) > 2 else "of an unknown version"
    encodes = _ENCODER in ffmpeg.run(binary, ("-encoders",)).output.decode(errors="replace")
    missing = [name for name in _FILTERS if name not in ffmpeg.filters(binary)]
    has = f"{_ENCODER} and the filters {', '.join(name for name in _FILTERS if name not in missing)}"
    facts = {"path": binary, "version": version, "encodes": encodes, "missing_filters": missing}
    if not encodes:
        text = f"{version} lacks {_ENCODER}, which writes videos; run: pip install --upgrade imageio-ffmpeg"
        return Finding("ffmpeg", "fail", text, facts)
    if missing:
        return Finding("ffmpeg", "note", f"{version} with {has}, without {', '.join(missing)}", facts)
    return Finding("ffmpeg", "ok", f"{version} with {has}", facts)


def _leftovers(config: TrackingConfig) -> list[Finding]:
    """Tell what killed processes left: nothing where nothing is left."""
    from sparsetune.files import left_scratch
    from sparsetune.tracking.processes import lock_folder, num_dead_processes
    from sparsetune.tracking.store import resolve_store

    folders = len(left_scratch())
    processes = num_dead_processes(lock_folder(resolve_store(config), config.root))
    if not folders and not processes:
        return []
    text = (
        f"{processes} processes died while they recorded runs, and {folders} temporary folders are left; "
        "run: sparsetune sync"
    )
    return [Finding("leftovers", "note", text, {"dead_processes": processes, "folders": folders})]


def _tracking(config: TrackingConfig) -> Finding:
    from sparsetune.tracking.moved import former_places, moved_text
    from sparsetune.tracking.store import cause_of, connect, resolve_store
    from sparsetune.urls import sqlite_path

    store = resolve_store(config)
    facts: dict[str, Any] = {"uri": store.shown, "enabled": config.enabled}
    failed: Status = "fail" if config.enabled else "note"
    database = sqlite_path(store.uri)
    if database is not None and not database.exists():
        folder = _nearest_existing(database.parent)
        if not os.access(folder, os.W_OK):
            return Finding("tracking", failed, f"cannot create {store.shown}: {folder} isn't writable", facts)
        return Finding("tracking", "ok", f"{store.shown} will be created by the first run", facts)
    try:
        if database is not None:  # first, because MLflow retries a file that is no database for minutes
            with closing(sqlite3.connect(database, timeout=5)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
                tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            if "experiments" in tables and (places := former_places(database)):
                return Finding("tracking", "note", moved_text(places), facts | {"artifacts": places})
            if {"experiments", "registered_models"} <= tables and not store.registry_is_apart:
                return Finding("tracking", "ok", f"{store.shown} is readable and writable", facts)
        client = connect(store)
        if store.is_server and (experiments := client.search_experiments(max_results=1)):
            client.set_experiment_tag(experiments[0].experiment_id, _TEST_TAG, "writable")
    except SparsetuneError as error:
        return Finding("tracking", failed, " ".join(str(error).split()), facts)
    except Exception as error:  # MLflow's stores may raise anything
        return Finding("tracking", failed, f"cannot write to {store.shown}: {cause_of(error)}", facts)
    return Finding("tracking", "ok", f"{store.shown} is readable and writable", facts)


def _cache(config: CacheConfig) -> Finding:
    from sparsetune.evaluation.baseline import BaselineCache

    folder = _nearest_existing(config.folder)
    entries = BaselineCache(config.folder, config.max_gb).ls() if config.folder.is_dir() else ()
    size, free = sum(entry.size_bytes for entry in entries), shutil.disk_usage(folder).free
    facts = {"folder": str(config.folder), "entries": len(entries), "size_bytes": size, "free_bytes": free}
    text = f"{len(entries)} dense baselines, {size / 1e9:.2f} of at most {config.max_gb:g} GB, in {config.folder}"
    if not os.access(folder, os.W_OK):
        return Finding("cache", "fail", f"{text}; {folder} isn't writable, set cache.dir to another folder", facts)
    return Finding("cache", "ok", f"{text}; {free / 1e9:.1f} GB free", facts)


def _nearest_existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
