"""Start-up time of `sparsetune COMMAND --help`, as a multiple of `python -c "import click"`, for every command.

    python benchmarks/help.py --repeats 15

The two run alternately, so that other load on the machine affects both equally; the ratio is that of their medians.
"""

import argparse
import statistics
import subprocess
import sys
import time

import click

from sparsetune.cli.main import main as sparsetune

LIMIT = 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="runs of each command (default: 15)")
    repeats = parser.parse_args().repeats
    ratios = {" ".join(path): ratio(path, repeats) for path in ((), *commands(sparsetune))}
    for name, value in ratios.items():
        print(f"{f'sparsetune {name}'.rstrip():<30} {value:.2f}x{'' if value <= LIMIT else f'  above {LIMIT}x'}")
    sys.exit(max(ratios.values()) > LIMIT)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
    return found


def ratio(path: tuple[str, ...], repeats: int) -> float:
    """Return the median time of a command's help over the median time of importing click."""
    program = "from sparsetune.cli.main import main; main()"
    calls = (["-c", program, *path, "--help"], ["-c", "import click"])
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for call, seconds in zip(calls, times, strict=True):
            started = time.perf_counter()
            subprocess.run([sys.executable, *call], stdout=subprocess.DEVNULL, check=True)
            if repeat:  # the first run fills the file cache
                seconds.append(time.perf_counter() - started)
    return statistics.median(times[0]) / statistics.median(times[1])


if __name__ == "__main__":
    main()
