"""Processes that search one study together: `python -m tests.tuning.processes URL FOLDER COUNT N_TRIALS [DIES_AT]`.

The outcome of a trial is known from its parameters, as in `test_study`, and takes some simulated milliseconds. Each
process notes every trial that it begins in FOLDER/ID.begun and, in the end, what it came to in FOLDER/ID.ended. The
first process kills itself in the middle of its trial DIES_AT, counted from 0.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from sparsetune.tuning.search import study as studies
from tests.executor.engines import FakeExecutor
from tests.tuning.test_study import Recorder, make


class SlowEngine(FakeExecutor):
    """Takes its time for each prompt, some more than others; dies in the middle of one where it is told to."""

    dies = False
    done = 0

    def end(self, job):
        time.sleep(random.Random(os.getpid() + self.done).uniform(0.002, 0.02))
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        self.done += 1
        super().end(job)


def work(url: str, folder: Path, n_trials: int, dies_at: int | None) -> None:
    engine, recorder = SlowEngine(), Recorder()
    with studies.quiet(), (folder / f"{os.getpid()}.begun").open("a") as begun:
        study, objective = make(folder, (recorder,), n_trials=n_trials, url=url, engine=engine)
        begin, mine = objective.begin, []

        def noted(trial):
            begun.write(f"{trial.number}\n")
            begun.flush()
            engine.dies = len(mine) == dies_at
            mine.append(trial.number)
            begin(trial)

        objective.begin = noted
        studies.search(study, objective, n_trials, None)
        found = [[trial.number, trial.state, trial.sparsity] for trial in studies.results(study, objective)]
    ended = {"own": [trial.number for trial in recorder.trials], "all": found, "elsewhere": study.num_running()}
    (folder / f"{os.getpid()}.ended").write_text(json.dumps(ended))


def main(url: str, folder: str, count: str, n_trials: str, *dies_at: str) -> None:
    children = set()
    for index in range(int(count)):
        child = os.fork()  # what takes seconds, the imports, is done
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
