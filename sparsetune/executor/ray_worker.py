"""A Ray actor that loads the model and runs tasks with it; imports no Ray, so that it runs without."""

import logging
import logging.handlers
import os
import queue
import socket
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsetune.attention.device import device_name, device_of
from sparsetune.config import Config
from sparsetune.config.files import DEMO
from sparsetune.errors import SparsetuneError
from sparsetune.executor.base import Task
from sparsetune.executor.events import Started, Worker
from sparsetune.executor.session import ModelSession
from sparsetune.executor.worker_plan import WorkerInfo, package_versions
from sparsetune.metrics import load_metrics
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import load_pipeline
from sparsetune.models.runtime import device_kind


@dataclass(frozen=True)
class TaskResult:
    """The value of a task, or its error without traceback; neither if it was stopped."""

    value: Any = None
    error: Exception | None = None


class _StoppedError(BaseException):
    pass


class RayWorker:
    """Loads the model once and runs one task at a time.

    `config` has absolute paths; `cache_marker` is a file that exists in the driver's cache folder.
    """

    def __init__(self, index: int, config: Config, num_threads: int, cache_marker: Path) -> None:
        self._index, self._config, self._num_threads, self._cache_marker = index, config, num_threads, cache_marker
        self._session: ModelSession | None = None
        self._stopped: set[int] = set()
        self._thread = ThreadPoolExecutor(1)  # `stop` must get through while a task runs

    def info(self) -> WorkerInfo:
        """Describe the worker, before the model is loaded."""
        torch.set_num_threads(self._num_threads)
        device = device_of(self._config.model.device)
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu and device.type == "cuda"]
        name, threads = device_name(device), torch.get_num_threads()
        worker = Worker(self._index, socket.gethostname(), name, os.getpid(), tuple(gpus), threads)
        return WorkerInfo(worker, device_kind(device), package_versions(), self._cache_marker.exists())

    def load(self) -> SparsetuneError | None:
        """Return the error if that fails."""
        try:
            load_metrics(self._config.eval.metric_modules, self._config.eval.lpips_weights)
            renderer = Renderer(load_pipeline(self._config.model), self._config.generation)
        except SparsetuneError as error:
            return _without_traceback(error)
        self._session = ModelSession(renderer, shares_files=False)
        return None

    def run(self, task_id: int, task: Task[Any]) -> Iterator[object]:
        """Run a task; yields events and warnings as they come, and `TaskResult` last."""
        messages: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._thread.submit(self._run, task_id, task, messages)
        while not isinstance(message := messages.get(), TaskResult):
            yield message
        yield message

    def stop(self, task_id: int) -> None:
        """Stop a task at its next event."""
        self._stopped.add(task_id)

    def _run(self, task_id: int, task: Task[Any], messages: "queue.SimpleQueue[object]") -> None:
        def emit(what: object) -> None:
            if task_id in self._stopped:
                raise _StoppedError
            messages.put(what)

        assert self._session is not None, "load comes before run"
        handler = logging.handlers.QueueHandler(messages)
        handler.setLevel(logging.WARNING)
        logging.getLogger("sparsetune").addHandler(handler)
        messages.put(Started())
        result = TaskResult()
        try:
            result = TaskResult(task.run(self._session, emit))
        except SparsetuneError as error:
            result = TaskResult(error=_without_traceback(error))
        except _StoppedError:
            pass
        except BaseException as error:
            result = TaskResult(error=RuntimeError(f"worker {self._index} failed: {type(error).__name__}: {error}"))
            traceback.print_exc()  # into the worker's log file
        finally:
            logging.getLogger("sparsetune").removeHandler(handler)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # after an out-of-memory error the next task needs it
            messages.put(result)


def _without_traceback(error: SparsetuneError) -> SparsetuneError:
    """Copy an error, so that frames with their tensors are freed and its cause needn't be pickled."""
    return type(error)(*error.args)


def worker_config(config: Config, device: str) -> Config:
    """The configuration for workers, with their device, and paths that don't depend on the working folder."""

    def absolute(text: str) -> str:
        path = os.path.abspath(os.path.expanduser(text))
        return path if os.path.exists(path) and text != DEMO else text  # else it is a hub id or a module

    modules, weights = tuple(map(absolute, config.eval.metric_modules)), config.eval.lpips_weights
    files = {"metric_modules": modules, "lpips_weights": weights and weights.absolute()}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"source": absolute(config.model.source), "device": device}),
            "eval": config.eval.model_copy(update=files),
            "cache": config.cache.model_copy(update={"dir": config.cache.folder.absolute()}),
        }
    )
