"""`python -m tests.torture.at_statement N COMMAND ...` kills sparsetune at its Nth database statement.

With 0 it runs to its end, and the number of its statements is written to the file `statements`.
"""

import atexit
import itertools
import os
import signal
import sys
from pathlib import Path

from sqlalchemy import Engine, event

from sparsetune.cli.main import main

killed_at, counter = int(sys.argv[1]), itertools.count(1)


def at_statement(*_: object) -> None:
    if next(counter) == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)


event.listen(Engine, "before_cursor_execute", at_statement)
atexit.register(lambda path: path.write_text(str(next(counter) - 1)), Path("statements").absolute())
main(sys.argv[2:])
