"""The other side of an engine of several processes: one worker, in its own. It knows nothing of what connects it."""

import logging
import os
import queue
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsetune.attention.device import device_name, device_of
from sparsetune.checkpoint.manifest import versions
from sparsetune.config import Config
from sparsetune.errors import SparsetuneError
from sparsetune.executor.base import Task
from sparsetune.executor.events import Started, Worker
from sparsetune.executor.session import ModelSession
from sparsetune.executor.worker_plan import WorkerInfo
from sparsetune.metrics import import_metrics
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import DEMO, load_pipeline
from sparsetune.models.runtime import device_kind

MUST_AGREE = ("sparsetune", "torch", "diffusers", "transformers")
"""Packages whose versions workers must share with the process that leads them."""


def deciding_versions() -> dict[str, str]:
    """Give the versions, in this process, of the packages that must agree."""
    installed = versions()
    return {name: installed[name] for name in MUST_AGREE if name in installed}


@dataclass(frozen=True)
class LogRecord:
    """A warning that a worker logged."""

    logger: str
    level: int
    message: str


@dataclass(frozen=True)
class Ended:
    """The last that is told of a task: its value, or why there is none.

    Args:
        value: what the task gave.
        error: what was the user's to mend.
        crash: what wasn't; None unless the task failed by a fault of the program.
    """

    value: Any = None
    error: SparsetuneError | None = None
    crash: str | None = None


class RemoteWorker:
    """Loads a model once and does tasks with it.

    Args:
        index: the worker's number.
        config: which model it loads and what it renders; paths in it are absolute.
        num_threads: CPU threads for PyTorch.
        mark: a file that the leader put into its folder of dense baselines.
    """

    def __init__(self, index: int, config: Config, num_threads: int, mark: Path | None = None) -> None:
        self._mark = mark
        self._index = index
        self._config = config
        self._num_threads = num_threads
        self._session: ModelSession | None = None
        self._stopped: set[int] = set()
        self._pool = ThreadPoolExecutor(1)

    def hello(self) -> WorkerInfo:
        """Say who it is; the model isn't loaded yet."""
        torch.set_num_threads(self._num_threads)
        device = device_of(self._config.model.device)
        gpus = tuple(gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu)
        worker = Worker(
            index=self._index,
            host=socket.gethostname(),
            device=device_name(device),
            pid=os.getpid(),
            gpus=gpus if device.type == "cuda" else (),
            num_threads=torch.get_num_threads(),
        )
        sees_cache = self._mark is None or self._mark.exists()
        return WorkerInfo(worker, device_kind(device), deciding_versions(), sees_cache)

    def load(self) -> SparsetuneError | None:
        """Load the model; gives what was wrong, or None."""
        try:
            import_metrics(self._config.eval.metric_modules)
            renderer = Renderer(load_pipeline(self._config.model), self._config.generation)
        except SparsetuneError as error:
            return _portable(error)
        self._session = ModelSession(renderer, shares_files=False)
        return None

    def run(self, ticket: int, task: Task[Any]) -> Iterator[object]:
        """Do a task; gives what it tells as it tells it, and `Ended` at last."""
        told: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._pool.submit(self._work, ticket, task, told)
        while True:
            what = told.get()
            yield what
            if isinstance(what, Ended):
                return

    def stop(self, ticket: int) -> None:
        """Have a task end at the next thing that it would tell."""
        self._stopped.add(ticket)

    def _work(self, ticket: int, task: Task[Any], told: "queue.SimpleQueue[object]") -> None:
        def emit(what: object) -> None:
            if ticket in self._stopped:
                raise _StoppedError
            told.put(what)

        assert self._session is not None, "a worker loads before it works"
        handler = _Forwarding(told)
        logger = logging.getLogger("sparsetune")
        logger.addHandler(handler)
        told.put(Started())
        try:
            told.put(Ended(task.run(self._session, emit)))
        except SparsetuneError as error:
            told.put(Ended(error=_portable(error)))
        except _StoppedError:
            told.put(Ended())
        except BaseException as error:
            logging.getLogger(__name__).exception("a task failed")
            told.put(Ended(crash=f"{type(error).__name__}: {error}"))
        finally:
            logger.removeHandler(handler)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what a task that ran out of memory left must not hinder the next


class _StoppedError(BaseException):
    """Nobody wants a task's outcome any more."""


class _Forwarding(logging.Handler):
    """Sends warnings to where they are read."""

    def __init__(self, told: "queue.SimpleQueue[object]") -> None:
        super().__init__(logging.WARNING)
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.put(LogRecord(record.name, record.levelno, record.getMessage()))


def _portable(error: SparsetuneError) -> SparsetuneError:
    """Give an error without its cause and traceback, which other processes may not be able to read."""
    return type(error)(*error.args)


def absolute(config: Config) -> Config:
    """Give a configuration whose paths mean the same in any working folder."""

    def whole(text: str) -> str:
        path = os.path.abspath(os.path.expanduser(text))
        return path if os.path.exists(path) and text != DEMO else text  # else it is a hub id or a module

    modules = tuple(whole(module) for module in config.eval.metric_modules)
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"source": whole(config.model.source)}),
            "eval": config.eval.model_copy(update={"metric_modules": modules}),
            "cache": config.cache.model_copy(update={"dir": config.cache.folder.absolute()}),
        }
    )
