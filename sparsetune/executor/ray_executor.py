"""The engine whose workers are Ray actors."""

import logging
import time
import uuid
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from sparsetune.config import Config
from sparsetune.errors import ExecutorError, GenerationError, OutOfMemoryError
from sparsetune.executor.base import Executor, OnEvent, Task, TaskResult
from sparsetune.executor.events import Change, Event, Incident, Worker
from sparsetune.executor.ray_cluster import Cluster
from sparsetune.executor.ray_worker import WorkerHandle
from sparsetune.executor.remote_worker import Ended, LogRecord, absolute, deciding_versions
from sparsetune.executor.worker_plan import WorkerInfo, WorkerPlan, check_workers, plan
from sparsetune.files import write_text

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_LOOK_FOR_HOSTS_SECONDS = 5.0
_PATIENCE_SECONDS = 300.0
"""How long work waits where no worker is left: a cluster may be starting a host."""

_MOST_DEATHS = 3
"""A task that so many workers died of is taken for the cause; and where so many in a row don't live to load the model,
no more are hired in their place."""


@dataclass
class _Work:
    """A task, with what befell it so far."""

    ticket: int
    task: Task[Any]
    deaths: int = 0
    short_of_memory: WorkerHandle | None = None


class RayExecutor(Executor):
    """Hands tasks to actors, one each; a task whose worker is lost goes to the next that is free.

    Args:
        cluster: where they run; closed with the engine.
        config: what workers load and render; paths are absolute.
        staffing: how many there are, and what each gets.
        measures_speed: whether policies compete in measured speed.
    """

    def __init__(self, cluster: Cluster, config: Config, staffing: WorkerPlan, *, measures_speed: bool) -> None:
        self._cluster, self._config, self._staffing = cluster, config, staffing
        self._measures_speed = measures_speed
        self._hands: list[WorkerHandle] = []
        self._hired = self._tickets = self._refused = self._stillborn = self._turn = 0
        self._waiting: deque[_Work] = deque()
        self._running: dict[int, _Work] = {}
        self._incidents: list[Incident] = []
        self._untold: list[tuple[Worker, Incident]] = []
        self._said: set[tuple[str, str]] = set()
        self._alive_at = self._looked_at = time.monotonic()
        self._mark = config.cache.folder / f".{uuid.uuid4().hex}.mark"  # which hosts share the folder?
        write_text(self._mark, "")
        for _ in range(staffing.num_workers):
            self._hire()

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Those that said hello and weren't lost."""
        return tuple(hand.hello.worker for hand in self._hands if hand.hello is not None)

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """Workers that were lost, that joined or were refused, and tasks that ran out of memory."""
        return tuple(self._incidents)

    def start(self, seconds: float) -> None:
        """Wait until every worker said hello and the first has its model.

        Raises:
            ExecutorError: too few did in time, or they don't suit each other or this process.
            SparsetuneError: the model can't be loaded.
        """
        hellos = [hand.awaited for hand in self._hands]
        ready, _ = ray.wait(hellos, num_returns=len(hellos), timeout=seconds)
        if len(ready) < len(hellos):
            raise ExecutorError(
                f"{len(hellos)} workers must start within {seconds:g} s, but {len(ready)} did; free the cluster's "
                "resources, lower --workers, or raise engine.start_seconds"
            )
        for hand in self._hands:
            try:
                hand.hello = hand.hear()
            except RayError as error:
                raise ExecutorError(f"workers must start, but one failed: {_brief(error)}") from error
        self._check([hand.hello for hand in self._hands if hand.hello is not None])
        for hand in self._hands:
            hand.load()
        while not any(hand.loaded for hand in self._hands):
            self._listen(lambda event: None)

    def submit(self, task: Task[Any]) -> int:
        """Put a task behind those that wait."""
        self._tickets += 1
        self._waiting.append(_Work(self._tickets, task))
        return self._tickets

    def wait(self, on_event: OnEvent) -> TaskResult:
        """Let workers work until one ends a task."""
        while True:
            for worker, incident in self._untold:
                on_event(Event(None, worker, incident))
            self._untold.clear()
            self._assign()
            outcome = self._listen(on_event)
            if outcome is not None:
                return outcome
            self._look_for_hosts()

    def abandon(self) -> None:
        """Forget all tasks; their workers stop at the next step."""
        self._waiting.clear()
        self._running.clear()
        for hand in self._hands:
            hand.leave()

    def leave_out(self, worker: Worker, why: str) -> None:
        """Give a worker no more work, and hire no other: what ails its host would ail that one too."""
        for hand in [hand for hand in self._hands if hand.hello is not None and hand.worker == worker]:
            if hand.ticket is not None:
                self._waiting.appendleft(self._running.pop(hand.ticket))
            self._refuse(hand, why)

    def close(self) -> None:
        """End the workers."""
        for hand in self._hands:
            hand.dismiss()
        self._hands.clear()
        self._mark.unlink(missing_ok=True)
        self._cluster.close()

    def _hire(self) -> None:
        self._hands.append(WorkerHandle.hire(self._hired, self._config, self._staffing, self._mark))
        self._hired += 1

    def _assign(self) -> None:
        """Give tasks that wait to idle workers, in order; one that ran out of memory goes to another than before."""
        for hand in [hand for hand in self._hands if hand.is_idle]:
            alone = len(self.workers) == 1
            work = next((one for one in self._waiting if alone or one.short_of_memory is not hand), None)
            if work is None:
                continue
            self._waiting.remove(work)
            self._running[work.ticket] = work
            hand.begin(work.ticket, work.task)

    def _listen(self, on_event: OnEvent) -> TaskResult | None:
        """Hear what workers have to say; gives the first outcome, and leaves the rest for the next time."""
        awaiting = {hand.awaited: hand for hand in self._hands if hand.awaited is not None}
        if any(hand.hello is not None for hand in self._hands):
            self._alive_at = time.monotonic()
        elif time.monotonic() - self._alive_at > _PATIENCE_SECONDS:
            raise ExecutorError(
                f"work must have a worker, but none was left for {_PATIENCE_SECONDS:g} s; mend the cluster"
            )
        order = deque(awaiting)
        order.rotate(self._turn)  # of several that are ready Ray gives the first in order: let it be another each time
        self._turn += 1
        ready, _ = ray.wait(list(order), num_returns=1, timeout=_POLL_SECONDS)
        for answered in ready:
            outcome = self._hear(awaiting[answered], on_event)
            if outcome is not None:
                return outcome
        self._leave_out_stuck()
        return None

    def _leave_out_stuck(self) -> None:
        """Leave out workers that take too long to load the model; no others are hired, who would hang there too."""
        limit = self._config.engine.load_seconds
        for hand in [hand for hand in self._hands if not hand.loaded and time.monotonic() - hand.loads_since > limit]:
            problem = ExecutorError(
                f"a worker must load the model within {limit:g} s, but {hand.worker.label} didn't; look whether its "
                "host reaches the weights, load them there beforehand, or raise engine.load_seconds"
            )
            self._refuse(hand, problem)
            if not self._hands:
                raise problem

    def _hear(self, hand: WorkerHandle, on_event: OnEvent) -> TaskResult | None:
        began = hand.hello is not None and hand.loaded
        try:
            what = hand.hear()
        except RayTaskError:
            raise
        except (RayError, StopIteration) as error:
            return self._lost(hand, error)
        if not began:
            self._joined(hand, what)
            return None
        if isinstance(what, Ended):
            return self._ended(hand, what)
        if isinstance(what, LogRecord):
            self._repeat(what)
        else:
            on_event(Event(hand.ticket, hand.worker, what))
        return None

    def _joined(self, hand: WorkerHandle, what: Any) -> None:
        """Take in that a worker said hello, or loaded the model or couldn't."""
        if isinstance(what, WorkerInfo):
            hand.hello = what
            try:
                self._check([other.hello for other in self._hands if other.hello is not None])
            except ExecutorError as error:
                return self._refuse(hand, error)
            hand.load()
            return self._note("joined", hand, f"{hand.worker.label} joined")
        if what is None:
            hand.loaded, self._stillborn = True, 0
            return None
        if not any(other.loaded for other in self._hands):
            raise what
        return self._refuse(hand, what)

    def _ended(self, hand: WorkerHandle, ended: Ended) -> TaskResult | None:
        ticket, hand.ticket, hand.awaited = hand.ticket, None, None
        assert ticket is not None
        work, worker = self._running.pop(ticket), hand.worker
        if ended.crash is not None:
            raise RuntimeError(f"{worker.label} failed: {ended.crash}")
        if isinstance(ended.error, OutOfMemoryError) and work.short_of_memory is None and len(self._hands) > 1:
            work.short_of_memory = hand
            self._waiting.appendleft(work)
            self._note("out of memory", hand, f"{worker.label} ran out of memory; its task goes to another")
            return None
        return TaskResult(ticket, worker, ended.value, ended.error)

    def _lost(self, hand: WorkerHandle, error: Exception) -> TaskResult | None:
        """Take in that a worker is no more: another is hired, and its task waits at the head of the line."""
        ticket, worker = hand.ticket, hand.worker
        self._hands.remove(hand)
        hand.dismiss()
        why = _why(error, hand.hello is None or self._cluster.is_alive(worker.host))
        self._replace(hand, why)
        work = self._running.pop(ticket) if ticket is not None else None
        again = "; its task is done again by another" if work is not None else ""
        self._note("lost", hand, f"{worker.label} was lost ({why}){again}")
        if work is None or ticket is None:
            return None
        work.deaths += 1
        if work.deaths < _MOST_DEATHS:
            self._waiting.appendleft(work)
            return None
        kind = OutOfMemoryError if "memory" in why else GenerationError
        problem = kind(f"a rendering must leave its worker alive, but {work.deaths} died of it: {why}")
        return TaskResult(ticket, worker, error=problem)

    def _replace(self, lost: WorkerHandle, why: str) -> None:
        self._stillborn = 0 if lost.loaded else self._stillborn + 1
        if self._stillborn < _MOST_DEATHS:
            self._hire()
        elif self._hands:
            self._refused += 1
        else:
            raise ExecutorError(
                f"workers must live to load the model, but {self._stillborn} in a row didn't: {why}; "
                "try `sparsetune doctor` and `--engine local` on their host"
            )

    def _refuse(self, hand: WorkerHandle, why: object) -> None:
        self._hands.remove(hand)
        hand.dismiss()
        self._refused += 1
        self._note("refused", hand, f"{hand.worker.label} is not used: {why}")

    def _check(self, hellos: list[WorkerInfo]) -> None:
        mixed = self._config.engine.mixed_gpus
        notes = check_workers(hellos, deciding_versions(), measures_speed=self._measures_speed, mixed_gpus=mixed)
        for level, text in notes:
            self._repeat(LogRecord(__name__, level, text))

    def _look_for_hosts(self) -> None:
        """Hire for hosts that joined the cluster, where the number of workers isn't fixed."""
        now = time.monotonic()
        if not self._staffing.grows or now - self._looked_at < _LOOK_FOR_HOSTS_SECONDS:
            return
        self._looked_at = now
        room = self._staffing.capacity(self._cluster.nodes) - self._refused
        for _ in range(len(self._hands), room):
            self._hire()

    def _repeat(self, said: LogRecord) -> None:
        """Log what is said of or by workers, once however many of them it is true of."""
        if (said.logger, said.message) not in self._said:
            self._said.add((said.logger, said.message))
            logging.getLogger(said.logger).log(said.level, "%s", said.message)

    def _note(self, change: Change, hand: WorkerHandle, text: str) -> None:
        incident = Incident(change, hand.worker.label, text, datetime.now(UTC).isoformat(timespec="seconds"))
        self._incidents.append(incident)
        self._untold.append((hand.worker, incident))
        logger.info("%s", text)  # listeners tell it to people


def _why(error: Exception, host_is_there: bool) -> str:
    """Say in a few words why a worker is no more."""
    # Of any death Ray says that the kernel may have been short of memory; these are its own monitor's words.
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "running low on memory" in str(error):
        return "its host ran out of memory"
    left = not host_is_there or "node has died" in str(error)  # a host of the same name may have joined since
    return "its host left" if left else "its process ended"


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def open_ray(config: Config, *, measures_speed: bool = False) -> RayExecutor:
    """Connect to Ray, or start one, and hire the workers that the configuration asks for.

    Raises:
        ExecutorError: no Ray answers, it has too little, or its workers don't suit each other or this process.
        ModelError: the model can't be loaded.
    """
    settings = config.engine
    cluster = Cluster(settings.ray_address, settings.start_seconds)
    try:
        staffing = plan(settings, config.model.device, cluster.nodes)
        here = absolute(config)
        model = here.model.model_copy(update={"device": "cuda" if staffing.gpus else "cpu"})
        placed = here.model_copy(update={"model": model})
        engine = RayExecutor(cluster, placed, staffing, measures_speed=measures_speed)
    except BaseException:
        cluster.close()
        raise
    try:
        engine.start(settings.start_seconds)
    except BaseException:
        engine.close()
        raise
    return engine
