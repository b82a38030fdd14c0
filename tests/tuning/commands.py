"""The command line in several processes at once: `python -m tests.tuning.commands FOLDER COUNT ARGUMENTS`.

Imports, which take longest, are done once; then each process is forked and runs the complete command. Prints the
process ids first and their exit statuses at the end, each as a line of JSON. Process N writes to FOLDER/N.out and
FOLDER/N.err.
"""

import atexit
import json
import os
import sys
import traceback
from pathlib import Path

import diffusers
import mlflow

from sparsetune.cli import tune  # noqa: F401
from sparsetune.cli.main import main
from sparsetune.models.loading import load_pipeline
from sparsetune.models.pipelines import demo_config
from sparsetune.tracking import TrackingListener  # noqa: F401


def warm_up() -> None:
    """Import modules that are loaded lazily."""
    assert diffusers.CogVideoXPipeline and mlflow.MlflowClient
    load_pipeline(demo_config({"model.device": "cpu"}).model)


def run(folder: Path, number: int, arguments: list[str]) -> None:
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
    try:
        main(arguments)
    except SystemExit as left:
        atexit._run_exitfuncs()  # as an interpreter that ends does: they release the process's lock
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(left.code if isinstance(left.code, int) else 0)
    except BaseException:
        traceback.print_exc()
    os._exit(99)


if __name__ == "__main__":
    folder, count, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    warm_up()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            run(folder, number, arguments)
        children.append(child)
    print(json.dumps(children), flush=True)
    ended = dict(os.wait() for _ in children)
    print(json.dumps([os.waitstatus_to_exitcode(ended[child]) for child in children]), flush=True)
