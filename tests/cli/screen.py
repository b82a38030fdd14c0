"""A pseudo-terminal, and what is on its screen: as much of a terminal as Rich's live display uses."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
from typing import TextIO

_CONTROL = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])")


class Screen:
    """A screen that breaks lines at its width, and breaks them anew when it is made narrower, as tmux does."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.lines = [""]
        self.row = self.column = 0
        self.raw = ""

    def feed(self, text: str) -> None:
        self.raw += text
        place = 0
        while place < len(text):
            control = _CONTROL.match(text, place)
            if control:
                self._control(control[2], control[1])
                place = control.end()
                continue
            self._put(text[place])
            place += 1

    def narrow(self, width: int) -> None:
        """Make it narrower; the cursor stays with its text, at the end of the last line."""
        broken = []
        for line in self.lines:
            broken += [line[at : at + width] for at in range(0, len(line), width)] or [""]
        self.width, self.lines = width, broken
        self.row, self.column = len(broken) - 1, len(broken[-1])

    @property
    def text(self) -> list[str]:
        """The lines that aren't blank."""
        return [line.rstrip() for line in self.lines if line.strip()]

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._down()
        elif character >= " ":
            if self.column >= self.width:
                self._down()
                self.column = 0
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")

    def _control(self, name: str, argument: str) -> None:
        if name == "A":
            self.row = max(0, self.row - int(argument or 1))
        elif name == "K":
            self.lines[self.row] = ""
        else:
            assert name == "m", f"no terminal state may be changed, but {name}{argument} was sent"


class PseudoTerminal:
    """A pseudo-terminal with a screen; `stream` is the end that a program writes to."""

    def __init__(self, width: int = 80, height: int = 24) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(width, height)
        self.stream: TextIO = os.fdopen(self.slave, "w", encoding="utf-8", closefd=False)
        self.screen = Screen(width)

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def read(self, seconds: float = 0.0) -> Screen:
        """Take what was written onto the screen, after so many seconds at most without any."""
        while select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux raises it when the last writer has closed the terminal
                break
            if not data:
                break
            self.screen.feed(data.decode(errors="replace"))
        return self.screen

    def close(self) -> None:
        self.stream.close()
        os.close(self.slave)
        os.close(self.master)
