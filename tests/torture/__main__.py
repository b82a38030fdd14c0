"""`python -m tests.torture`: damage inputs, kill commands, fail servers and disks by a seed; print what went wrong."""

import argparse
import logging
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.torture.inputs import READERS, faults
from tests.torture.kills import kill_eval, kill_release, kill_tune
from tests.torture.surroundings import failing_servers, full_disks

SHOWN = 20
"""Faults of one row."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=2000, help="number of damaged inputs")
    parser.add_argument("--kills", type=int, default=100, help="number of killed commands, half of them of `tune`")
    parser.add_argument("--servers", type=int, default=12, help="number of tunings with a failing tracking server")
    parser.add_argument("--disks", type=int, default=16, help="number of tunings with a full disk; needs root")
    parser.add_argument("--only", default="", help="readers whose names hold this")
    chosen = parser.parse_args()
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        num_faults = _damage(Path(folder) / "files", chosen) + _kill(Path(folder), chosen)
    sys.exit(num_faults > 0)


def _damage(folder: Path, chosen: argparse.Namespace) -> int:
    num_faults, readers = 0, [reader for reader in READERS if chosen.only in reader.name and chosen.inputs]
    for index, reader in enumerate(readers):
        count, start = len(range(index, chosen.inputs, len(readers))), time.monotonic()
        found = list(faults(reader, folder, chosen.seed, range(count)))
        _print(reader.name, count, [f"{fault.number}: {fault.text}" for fault in found], start)
        num_faults += len(found)
    return num_faults


def _kill(folder: Path, chosen: argparse.Namespace) -> int:
    num_faults, quarter = 0, chosen.kills // 4
    rows = {
        "kills of tune": (kill_tune, chosen.kills - 2 * quarter),
        "kills of eval": (kill_eval, quarter),
        "kills of review, promote and sync": (kill_release, quarter),
        "failing tracking servers": (failing_servers, chosen.servers),
        "full disks": (full_disks, chosen.disks),
    }
    for name, (disturb, count) in rows.items():
        if count:
            start = time.monotonic()
            found = disturb(folder, count, random.Random(f"{chosen.seed}/{name}"))
            _print(name, count, found, start)
            num_faults += len(found)
    return num_faults


def _print(name: str, count: int, found: list[str], start: float) -> None:
    """Print a row of the table, and the faults below it."""
    print(f"| {name} | {count} | {len(found)} | {time.monotonic() - start:.0f} |", flush=True)
    for text in found[:SHOWN]:
        print(f"    {text[:300]}", flush=True)


if __name__ == "__main__":
    main()
