import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsetune import signals
from sparsetune.signals import deferring_interrupts, raising_interrupts

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")
ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Catch a signal that nobody takes, which would end the tests."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_interrupts_and_tells_the_exit_status(number: signal.Signals) -> None:
    with raising_interrupts(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert signals.exit_status() == 128 + number
    assert signal.getsignal(number) is signal.default_int_handler


def test_further_signals_dont_interrupt_the_work_of_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    with raising_interrupts():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
        monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


HELD = """
import contextlib, hashlib
from sparsetune.signals import raising_interrupts
def answer():
    print("stopping", flush=True)
    return True
with raising_interrupts(answer):
    with contextlib.suppress(KeyboardInterrupt):  # where it comes before the call
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)
"""
"""A program in one long call of C code, in which Python raises nothing."""


def test_the_first_ctrl_c_is_answered_and_the_second_ends_at_once() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(signals.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", HELD], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)  # a copy that a wrapper sends
        assert process.stdout.readline() == "stopping\n"
        time.sleep(2 * signals.AGAIN_SECONDS)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


STARTING = """
import os, signal, sys, types
command = types.ModuleType("sparsetune.cli.main")
command.main = lambda: os.kill(os.getpid(), signal.SIGINT)
sys.modules["sparsetune.cli.main"] = command
from sparsetune.__main__ import run
run()
"""
"""Ctrl-C before the command can answer it."""


def test_ctrl_c_while_the_command_starts_shows_no_traceback() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(signals.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", STARTING], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_deferred_signal_interrupts_after_the_block() -> None:
    done = []
    with raising_interrupts():
        with pytest.raises(KeyboardInterrupt), deferring_interrupts():
            with deferring_interrupts():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        with deferring_interrupts():
            done.append("later")
    assert done == ["inner", "outer", "later"]


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with raising_interrupts():
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
