import sys
from collections.abc import Iterator, Sequence

import pytest
from rich.console import Console, ConsoleDimensions, RenderableType
from rich.text import Text

from sparsetune.cli.live.view import LiveView
from sparsetune.cli.log import TextLog
from sparsetune.cli.terminal import stderr_console
from tests.cli.live.screen import PseudoTerminal

ROWS = ["tune demo", "x" * 60, "left 1:00"]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[PseudoTerminal]:
    """A terminal of 80 columns."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = PseudoTerminal()
    yield terminal
    terminal.close()


def console_on(terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch) -> Console:
    """Let stderr be the terminal; here, since pytest puts its own in place before the test's body."""
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    console = stderr_console()
    console.size = ConsoleDimensions(80, 24)
    return console


def draw(width: int, height: int) -> Sequence[RenderableType]:
    return [Text(row, no_wrap=True, overflow="crop") for row in ROWS]


def test_it_is_drawn_in_its_place_and_gone_in_the_end(
    terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = LiveView(console_on(terminal, monkeypatch), draw)
    view.start()
    for _ in range(3):
        view.refresh()
    assert terminal.read().text == ROWS
    view.stop()
    assert terminal.read().text == []


def test_what_it_showed_last_stays_where_it_is_to_be_kept(
    terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = LiveView(console_on(terminal, monkeypatch), draw)
    view.start()
    view.stop(keep=True)
    view.stop()
    assert terminal.read().text == ROWS
    assert terminal.screen.column == 0  # what follows begins a line of its own


def test_lines_of_the_log_stand_above_it(terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch) -> None:
    view = LiveView(console_on(terminal, monkeypatch), draw)
    view.start()
    TextLog().say("log", "the cache is full", "warning", logger="sparsetune")
    TextLog().say("note", "and on")
    view.refresh()
    assert terminal.read().text == ["warning: the cache is full", "and on", *ROWS]
    view.stop()
    assert sys.stderr is terminal.stream


def test_a_terminal_made_narrower_keeps_nothing_of_the_broken_lines(
    terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = console_on(terminal, monkeypatch)
    view = LiveView(console, draw)
    TextLog().say("note", "before it")
    view.start()
    terminal.read().narrow(40)
    console.size = ConsoleDimensions(40, 24)
    view.refresh()
    view.refresh()
    assert terminal.read().text == ["before it", ROWS[0], "x" * 39, ROWS[2]]
    view.stop()
    assert terminal.read().text == ["before it"]


def test_an_error_while_drawing_leaves_stderr_as_it_was(
    terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(width: int, height: int) -> Sequence[RenderableType]:
        raise ZeroDivisionError

    view = LiveView(console_on(terminal, monkeypatch), fail)
    with pytest.raises(ZeroDivisionError):
        view.start()
    assert sys.stderr is terminal.stream
