"""`python -m tests.torture`: damage inputs and kill commands, and print what went wrong."""

import argparse
import logging
import os
import tempfile
import time
from pathlib import Path

from tests.torture.inputs import READERS, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--only", default="", help="readers whose names hold this")
    chosen = parser.parse_args()
    logging.disable(logging.ERROR)
    readers = [reader for reader in READERS if chosen.only in reader.name]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for index, reader in enumerate(readers):
            count = len(range(index, chosen.inputs, len(readers)))
            start = time.monotonic()
            found = list(faults(reader, Path(folder) / "files", chosen.seed, range(count)))
            print(f"| {reader.name} | {count} | {len(found)} | {time.monotonic() - start:.0f} s |", flush=True)
            for fault in found[:20]:
                print(f"    {fault.number}: {fault.text[:200]}", flush=True)


if __name__ == "__main__":
    main()
