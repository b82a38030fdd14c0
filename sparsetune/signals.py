"""Signals that end a command: Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt; a second Ctrl-C ends it at once."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

REPEAT_SECONDS = 5.0
"""Further signals within this time of one that interrupted are those of an impatient user, and don't stop the work of
ending: runs are closed, children are stopped."""


AGAIN_SECONDS = 0.5
"""A Ctrl-C this long after a signal is a second one; earlier ones are copies, which some wrappers of commands send."""


_ANSWER_SECONDS = 1.0
"""An answer that takes longer waits for something itself, and isn't waited for."""


class _Interruption:
    def __init__(self) -> None:
        self.number: int | None = None
        self.answered = threading.Event()
        self._since = 0.0
        self._num_deferring, self._is_pending = 0, False

    def handle(self, number: int, frame: FrameType | None) -> None:
        is_repeated = self.number is not None and time.monotonic() - self._since < REPEAT_SECONDS
        self.number = number
        if is_repeated:
            return
        self._since = time.monotonic()
        if self._num_deferring:
            self._is_pending = True
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._num_deferring += 1
        try:
            yield
        finally:
            self._num_deferring -= 1
            if self._is_pending and not self._num_deferring:
                self._is_pending = False
                raise KeyboardInterrupt


_interruption = _Interruption()


@contextlib.contextmanager
def raising_interrupts(answer: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Let the signals that end a command raise KeyboardInterrupt; those that are ignored (nohup, `&`) stay ignored.

    `answer` is called at the first one, in a thread of its own: KeyboardInterrupt waits for a kernel or a library's
    call to return, which may take seconds. Where it returns True, a second Ctrl-C ends the process there and then, as
    SIGKILL would, with status 130; not so where a server has to be stopped first. Does nothing in another thread than
    the main one, where no handler can be set.
    """
    global _interruption
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _interruption = _Interruption()
    taken = {number: signal.getsignal(number) for number in _ENDING}
    taken = {number: before for number, before in taken.items() if before not in (signal.SIG_IGN, None)}
    received, sent = os.pipe()
    os.set_blocking(sent, False)
    woken_before = signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
    arguments = (received, answer, frozenset(taken), _interruption.answered)
    threading.Thread(target=_watch, args=arguments, name="signals", daemon=True).start()
    for number in taken:
        signal.signal(number, _interruption.handle)
    try:
        yield
    finally:
        for number, before in taken.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(woken_before)
        os.close(sent)


def _watch(received: int, answer: Callable[[], bool], ending: frozenset[int], answered: threading.Event) -> None:
    """Read the numbers of signals as they come, until the pipe is closed."""
    first: float | None = None  # when it was answered: copies of it that came meanwhile are read only then
    may_end = False
    with os.fdopen(received, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] not in ending:
                continue
            if first is None:
                try:
                    may_end = answer()
                finally:
                    first = time.monotonic()
                    answered.set()
            elif may_end and number[0] == signal.SIGINT and time.monotonic() - first > AGAIN_SECONDS:
                os._exit(128 + signal.SIGINT)


def deferring_interrupts() -> contextlib.AbstractContextManager[None]:
    """Keep the block whole: a signal in it interrupts after it. For the main thread, within `raising_interrupts`."""
    is_main = threading.current_thread() is threading.main_thread()
    return _interruption.deferred() if is_main else contextlib.nullcontext()


def wait_for_answer() -> None:
    """Let the answer to a signal that interrupted be printed before what follows, which it would overwrite."""
    if is_interrupted():
        _interruption.answered.wait(_ANSWER_SECONDS)


def is_interrupted() -> bool:
    """Whether a signal interrupted: a library may turn its KeyboardInterrupt into an error of its own."""
    return _interruption.number is not None


def exit_status() -> int:
    """Return a shell's status of a command that a signal ended: 130 for Ctrl-C."""
    return 128 + int(_interruption.number or signal.SIGINT)
