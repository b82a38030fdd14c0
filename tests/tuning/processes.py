"""Processes that search one study together: `python -m tests.tuning.processes URL FOLDER COUNT N_TRIALS [DIES_AT]`.

The outcome of a trial is known from its parameters, as in `test_study`, and takes about a tenth of a second. Each
process notes every trial that it begins in FOLDER/ID.begun and, in the end, its results in FOLDER/ID.ended. The first
process kills itself in the middle of its trial DIES_AT, counted from 0.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from sparsetune.tuning.search.run import results
from sparsetune.tuning.search.study import quiet
from tests.tuning.test_study import Known, Recorder, make, search


def work(url: str, folder: Path, n_trials: int, dies_at: int | None) -> None:
    recorder, mine, known = Recorder(), [], Known.run

    def slow(self, place, emit):
        """Sleep for each prompt, longer than a lock is polled, and kill the process during one of them."""
        time.sleep(random.Random(f"{os.getpid()} {time.monotonic()}").uniform(0.05, 0.15))
        if dies_at is not None and len(mine) == dies_at + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return known(self, place, emit)

    Known.run = slow
    with quiet(), (folder / f"{os.getpid()}.begun").open("a") as begun:
        study, objective = make(folder, (recorder,), n_trials=n_trials, url=url)
        run = objective.runner.run

        def noted(number, *rest):
            begun.write(f"{number}\n")
            begun.flush()
            mine.append(number)
            return run(number, *rest)

        objective.runner.run = noted
        search(study, objective, n_trials)
        found = [[trial.number, trial.state, trial.sparsity] for trial in results(study, objective)]
    ended = {
        "own": [trial.number for trial in recorder.trials], "all": found, "elsewhere": study.num_running_elsewhere()
    }  # fmt: skip
    (folder / f"{os.getpid()}.ended").write_text(json.dumps(ended))


def main(url: str, folder: str, count: str, n_trials: str, *dies_at: str) -> None:
    children = set()
    for index in range(int(count)):
        child = os.fork()  # the imports, which take seconds, are done
        if child == 0:
            try:
                work(url, Path(folder), int(n_trials), int(dies_at[0]) if dies_at and index == 0 else None)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.add(child)
        if dies_at and index == 0:
            print(child, flush=True)
    ends = dict(os.wait() for _ in children)
    assert sorted(ends.values()) == [0] * (int(count) - len(dies_at)) + [signal.SIGKILL] * len(dies_at), ends


if __name__ == "__main__":
    main(*sys.argv[1:])
