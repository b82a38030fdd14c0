"""The executor whose workers are Ray actors."""

import contextlib
import itertools
import logging
import threading
import uuid
from collections import deque
from concurrent.futures import CancelledError
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from sparsetune.config import Config
from sparsetune.errors import ExecutorError, GenerationError, OutOfMemoryError
from sparsetune.executor.base import Executor, OnEvent, Result, Task, TaskFuture, ignore
from sparsetune.executor.events import Change, Event, Incident, Worker
from sparsetune.executor.ray_cluster import Cluster, brief
from sparsetune.executor.ray_worker import TaskResult, worker_config
from sparsetune.executor.worker_plan import WorkerInfo, check_workers, package_versions, plan_workers
from sparsetune.files import write_text

logger = logging.getLogger(__name__)

_NEW_HOSTS_SECONDS = 5.0
_MAX_LOSSES = 3
"""A task whose worker is lost so often fails; nor are workers replaced after so many in a row were lost unloaded."""


@dataclass(eq=False)
class _Job:
    id: int
    task: Task[Any]
    on_event: OnEvent
    future: TaskFuture[Any]
    num_losses: int = 0  # workers that were lost while they ran it
    out_of_memory_on: "WorkerHandle | None" = None  # the first that ran out of memory


@dataclass(eq=False)
class WorkerHandle:
    index: int
    actor: Any
    info: WorkerInfo | None = None  # once it has started
    is_loaded: bool = False
    job: _Job | None = None  # while it runs one

    @property
    def worker(self) -> Worker:
        return self.info.worker if self.info else Worker(self.index, "unknown host", "unknown", 0)


class RayExecutor(Executor):
    """Runs tasks on Ray actors, with a thread here for each that waits for it, calls `on_event`, and replaces it.

    Ray doesn't restart actors (`max_restarts`): a retried generator would repeat its task's events, and a replacement
    may be on another host, so that it must be checked as the first ones were. Nor does its `ActorPool` serve, which
    neither streams events nor runs a lost worker's task again.
    """

    def __init__(self, config: Config, *, measures_speed: bool = False) -> None:
        self._cluster = Cluster(config.engine.ray_address, config.engine.start_seconds)
        self._changed = threading.Condition()  # guards what follows; not held while `on_event` is called
        self._handles: list[WorkerHandle] = []
        self._waiting: deque[_Job] = deque()
        self._incidents: list[Incident] = []
        self._logged: set[str] = set()
        self._failure: Exception | None = None
        self._is_ready = False  # all workers have started, and one has loaded the model
        self._delivery = threading.Lock()  # held while `on_event` is called
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []  # one for each worker, or for the last of it if it isn't replaced
        self._growth = threading.Thread(target=self._add_workers, daemon=True)
        self._indices, self._job_ids = itertools.count(), itertools.count()
        self._measures_speed = measures_speed
        self._cache_marker = config.cache.folder.absolute() / f".{uuid.uuid4().hex}.mark"
        try:
            self._plan = plan_workers(config.engine, config.model.device, self._cluster.nodes)
            self._config = worker_config(config, "cuda" if self._plan.gpus else "cpu")
            write_text(self._cache_marker, "")
            for _ in range(self._plan.num_workers):
                self._keep_worker()
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Workers that have started; some may still load the model."""
        with self._changed:
            return tuple(handle.worker for handle in self._handles if handle.info is not None)

    @property
    def incidents(self) -> tuple[Incident, ...]:
        return tuple(self._incidents)

    def submit(self, task: Task[Result], on_event: OnEvent = ignore) -> TaskFuture[Result]:
        job = _Job(next(self._job_ids), task, on_event, TaskFuture())
        with self._changed:
            if self._failure is not None:
                job.future.set_exception(self._failure)
            else:
                self._waiting.append(job)
                self._changed.notify_all()
        return job.future

    def cancel_all(self) -> None:
        with self._changed:
            for job in self._unfinished():
                self._fail_job(job, CancelledError())

    def close(self) -> None:
        self._closed.set()
        self.cancel_all()
        with self._changed:
            handles, self._handles = self._handles, []
            self._changed.notify_all()
        for handle in handles:
            with contextlib.suppress(RayError):  # the cluster is gone
                ray.kill(handle.actor)
        for thread in (self._growth, *self._threads):
            if thread.is_alive():
                thread.join(timeout=10.0)
        self._cache_marker.unlink(missing_ok=True)
        self._cluster.close()

    def _wait_until_ready(self) -> None:
        def is_ready() -> bool:
            return all(each.info for each in self._handles) and any(each.is_loaded for each in self._handles)

        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or is_ready())
            if self._failure is not None:
                raise self._failure
            self._is_ready = True
        if self._plan.grows:
            self._growth.start()

    def _keep_worker(self) -> None:
        """Start a worker, with a thread that replaces it whenever it is lost."""
        thread = threading.Thread(target=self._run_worker, args=(self._start_worker(),), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _start_worker(self) -> WorkerHandle:
        index = next(self._indices)
        handle = WorkerHandle(index, self._cluster.start_worker(index, self._config, self._plan, self._cache_marker))
        with self._changed:
            self._handles.append(handle)
        return handle

    def _run_worker(self, handle: WorkerHandle | None) -> None:
        """Load the model and run jobs until the executor is closed, or a worker is lost and not replaced."""
        num_failures = 0  # workers in a row that were lost before they had loaded the model
        while handle is not None:
            try:
                self._load(handle)
                while (job := self._next_job(handle)) is not None:
                    self._run_job(handle, job)
                return
            except Exception as error:
                num_failures = 0 if handle.is_loaded else num_failures + 1
                job = handle.job
                try:
                    handle = self._replace(handle, error, num_failures)
                except Exception as failure:  # the cluster itself is gone
                    self._fail(ExecutorError(f"cannot replace a lost worker: {str(failure) or type(failure).__name__}"))
                    if job is not None:
                        self._fail_job(job, failure)
                    return

    def _load(self, handle: WorkerHandle) -> None:
        engine, joins_later, starting = self._config.engine, self._is_ready, handle.actor.info.remote()
        info: WorkerInfo | None = None
        while info is None:
            try:
                info = ray.get(starting, timeout=engine.start_seconds)
            except GetTimeoutError as error:
                if not self._is_ready or not self.workers:  # else it waits for the cluster to have room
                    raise ExecutorError(
                        f"{handle.worker.label} did not start within {engine.start_seconds:g} s; free the cluster's "
                        "resources, lower --workers, or raise engine.start_seconds"
                    ) from error
        with self._changed:
            handle.info = info
            infos = [other.info for other in self._handles if other.info is not None]
            rules = {"measures_speed": self._measures_speed, "mixed_gpus": engine.mixed_gpus}
            for text in check_workers(infos, package_versions(), **rules):
                self._log_once(__name__, logging.WARNING, text)
            self._changed.notify_all()
        if joins_later:
            self._record("joined", handle, "joined")
        try:
            problem = ray.get(handle.actor.load.remote(), timeout=engine.load_seconds)
        except GetTimeoutError as timeout:
            raise ExecutorError(
                f"{handle.worker.label} did not load the model within {engine.load_seconds:g} s; check that its host "
                "can read the weights, download them beforehand, or raise engine.load_seconds"
            ) from timeout
        if problem is not None:
            raise problem
        with self._changed:
            handle.is_loaded = True
            self._changed.notify_all()

    def _next_job(self, handle: WorkerHandle) -> _Job | None:
        """Wait for a job; one that ran out of memory on this worker is left to others, if there are any."""
        with self._changed:
            while handle in self._handles and self._failure is None:
                is_only = len(self.workers) == 1
                job = next((job for job in self._waiting if is_only or job.out_of_memory_on is not handle), None)
                if job is None:
                    self._changed.wait()
                    continue
                self._waiting.remove(job)
                if job.future.running() or job.future.set_running_or_notify_cancel():
                    handle.job, job.future.worker = job, handle.worker
                    return job
        return None

    def _run_job(self, handle: WorkerHandle, job: _Job) -> None:
        stream = handle.actor.run.options(num_returns="streaming").remote(job.id, job.task)
        try:
            while not isinstance(what := ray.get(next(stream)), TaskResult):
                if isinstance(what, logging.LogRecord):
                    self._log_once(what.name, what.levelno, what.getMessage())
                else:
                    self._deliver(job, Event(handle.worker, what))
        except RayTaskError as error:  # such as a value that can't be pickled
            what = TaskResult(error=error)
        retry = isinstance(what.error, OutOfMemoryError) and job.out_of_memory_on is None and len(self._handles) > 1
        if retry:
            job.out_of_memory_on = handle
            self._record("out of memory", handle, "ran out of memory; its task is run again by another worker", job)
        with self._changed:
            handle.job = None
            if job.future.done():
                return
            if retry:
                self._waiting.appendleft(job)
                self._changed.notify_all()
            elif what.error is not None:
                job.future.set_exception(what.error)
            else:
                job.future.set_result(what.value)

    def _replace(self, handle: WorkerHandle, error: Exception, num_failures: int) -> WorkerHandle | None:
        """Stop a worker, and return a new one if it was lost; after another error a new one would fail like it."""
        if self._closed.is_set():
            return None
        ray.kill(handle.actor)
        job, cause = handle.job, ""
        if isinstance(error, RayError | StopIteration) and not isinstance(error, RayTaskError):
            cause = self._cluster.cause_of_loss(error, handle.info.worker.host if handle.info else None)
            again = "; its task is run again by another worker" if job is not None else ""
            self._record("lost", handle, f"was lost ({cause}){again}", job)
        else:
            self._record("refused", handle, f"is not used: {error}")
        with self._changed:
            if self._closed.is_set():
                return None
            self._handles.remove(handle)
            self._changed.notify_all()
            if cause:
                if job is not None and not job.future.done():
                    self._run_again(job, cause)
                if num_failures < _MAX_LOSSES:
                    return self._start_worker()
                cause = cause if handle.info else brief(error)
                text = f"{num_failures} workers in a row were lost before they had loaded the model: {cause}; "
                error = ExecutorError(text + "try `sparsetune doctor` and `--engine local` on their host")
            elif job is not None:
                self._fail_job(job, error)
            if not self._handles or not (cause or self._is_ready):
                self._fail(error)
        return None

    def _run_again(self, job: _Job, cause: str) -> None:
        """Queue the job of a lost worker first, or fail it if it has been lost too often."""
        job.num_losses += 1
        if job.num_losses < _MAX_LOSSES:
            self._waiting.appendleft(job)
        else:
            kind = OutOfMemoryError if "memory" in cause else GenerationError
            job.future.set_exception(kind(f"{job.num_losses} workers were lost while rendering: {cause}"))

    def _unfinished(self) -> list[_Job]:
        jobs = [*(handle.job for handle in self._handles if handle.job is not None), *self._waiting]
        return [job for job in jobs if not job.future.done()]

    def _fail_job(self, job: _Job, error: BaseException) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            for handle in self._handles:
                if handle.job is job:
                    handle.actor.stop.remote(job.id)
            if not job.future.done():
                job.future.set_exception(error)

    def _fail(self, error: Exception) -> None:
        """Fail all unfinished and future tasks."""
        self._failure = self._failure or error
        for job in self._unfinished():
            self._fail_job(job, self._failure)

    def _deliver(self, job: _Job, event: Event) -> None:
        with self._delivery:
            if not job.future.done():
                try:
                    job.on_event(event)
                except BaseException as error:
                    self._fail_job(job, error)

    def _record(self, change: Change, handle: WorkerHandle, what: str, job: _Job | None = None) -> None:
        """Record an incident, and deliver it to the callback of a job, or of any unfinished one."""
        text = f"{handle.worker.label} {what}"
        logger.info("%s", text)
        incident = Incident(change, handle.worker.label, text, datetime.now(UTC).isoformat(timespec="seconds"))
        with self._changed:
            self._incidents.append(incident)
            job = job or next(iter(self._unfinished()), None)
        if job is not None:
            self._deliver(job, Event(handle.worker, incident))

    def _log_once(self, name: str, level: int, text: str) -> None:
        with self._changed:
            is_new = text not in self._logged
            self._logged.add(text)
        if is_new:
            logging.getLogger(name).log(level, "%s", text)

    def _add_workers(self) -> None:
        """Start workers on hosts that join."""
        while not self._closed.wait(_NEW_HOSTS_SECONDS):
            for _ in range(len(self._threads), self._plan.capacity(self._cluster.nodes)):
                self._keep_worker()
