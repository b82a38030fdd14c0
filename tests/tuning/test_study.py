"""The search itself, on an objective whose optimum is known, in a real SQLite storage."""

import dataclasses
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy
from optuna.trial import TrialState
from sqlalchemy import event

from sparsetune.errors import GenerationError, TuningError
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.executor import Executor
from sparsetune.metrics import Gate, pooled_psnr
from sparsetune.tuning.events import TrialResult, TuningListener
from sparsetune.tuning.search import run as searches
from sparsetune.tuning.search import study as studies
from sparsetune.tuning.search.objective import Objective, TrialRunner
from sparsetune.tuning.search.ranking import shortfalls
from sparsetune.tuning.search.samplers import SAMPLERS
from sparsetune.tuning.search.space import CALIBRATED, DEFAULT, SearchSpace
from tests.executor.engines import FakeExecutor
from tests.tuning.tables import curves

GATE = Gate(min_frame_cosine=0.95, min_psnr=35.0, min_psnr_worst=30.0)


def judged(sparsity: float, psnr: float, worst: float | None = None) -> PromptResult:
    metrics = {
        "psnr": psnr,
        "frame_cosine": 0.99,
        "frame_l1": 0.01,
        "frame_diff": 0.01,
        "psnr_frame_min": worst or psnr,
    }
    return PromptResult("a prompt", 0, metrics=metrics, sparsity=sparsity, sparsity_active=sparsity)


class Recorder(TuningListener):
    def __init__(self) -> None:
        self.trials: list[TrialResult] = []

    def on_trial(self, result: TrialResult) -> None:
        self.trials.append(result)


@dataclass(frozen=True)
class Known:
    """A simulated prompt whose result is a function of the trial's parameters.

    PSNR falls by 2 dB for each 0.02 of budget and rises with dense steps; sparsity is the budget without them. So with
    the gate at 35 dB the best is l1 = 0.15 with no dense steps.
    """

    params: Mapping[str, object]
    problem: type[BaseException] | None = None

    def run(self, session: object, emit: object) -> PromptResult:
        if self.problem is not None:
            raise self.problem("the video must fit into memory, but it ran out")
        if self.params["thresholds"] == DEFAULT:
            return judged(0.02, 45.0)
        dense = float(self.params["dense_fraction"])
        reach = self.params.get("reach", 0.0) * self.params.get("aim", 0.0) / (1 - dense)
        budget = self.params.get("l1", reach)
        return judged(budget * (1 - dense), 50.0 - 100 * budget + 5 * dense)


class KnownRunner(TrialRunner):
    fail: tuple[int, ...] = ()
    stop_at: int | None = None

    def run(self, number, params, policy, prune=None):
        problem = GenerationError if number in self.fail else KeyboardInterrupt if number == self.stop_at else None
        self.known = {**getattr(self, "known", {}), id(policy): Known(params, problem)}
        return super().run(number, params, policy, prune)

    def task(self, prompt, policy):
        return self.known[id(policy)]


def make(
    tmp_path: Path,
    listeners=(),
    num_prompts: int = 2,
    n_trials: int = 25,
    url: str | None = None,
    engine: Executor | None = None,
    **settings,
):
    """A study with its objective; settings are those of `open_study` and of the objective."""
    space = SearchSpace(curves(), granularity="global", orders=("raster", "tiles"))
    engine = engine or FakeExecutor()
    prompts = ("a prompt",) * num_prompts
    runner = KnownRunner(engine, prompts, None, GATE, listeners, space.predict)
    runner.score = runner.task
    sampler, goal = settings.get("sampler", "tpe"), settings.get("goal", "sparsity")
    aimed = sampler != "random" and goal != "pareto"
    objective = Objective(runner, space, goal, penalised=sampler == "cmaes", aimed=aimed, adaptive=sampler != "random")
    url = url or f"sqlite:///{tmp_path / 'optuna.db'}"
    study = studies.open_study(url, "known", {"space": 1}, 0, n_trials, sampler, goal)
    return study, objective


def search(study, objective, n_trials: int, seconds: float | None = None) -> None:
    study.n_trials = n_trials
    searches.optimize(study, objective, seconds)


def too_late(objective: Objective):
    """Render as the objective does, but with the time up at the first prompt."""
    task = objective.runner.score

    def score(*given):
        objective.runner.deadline = time.perf_counter()
        return task(*given)

    return score


@pytest.fixture(autouse=True, scope="module")
def in_a_hurry():
    """A test's store needs no durability; waiting for the disk at each commit takes minutes."""

    def set_pragma(connection: object, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(sqlalchemy.Engine, "connect", set_pragma)
    yield
    event.remove(sqlalchemy.Engine, "connect", set_pragma)


@pytest.fixture(autouse=True)
def quiet():
    with studies.quiet():
        yield


def test_the_search_finds_the_sparsest_feasible_policy(tmp_path: Path) -> None:
    recorder = Recorder()
    study, objective = make(tmp_path, (recorder,))
    search(study, objective, 12)
    assert len(recorder.trials) == 12
    feasible = [trial for trial in recorder.trials if trial.feasible]
    best = max(feasible, key=lambda trial: trial.sparsity)
    assert 0.13 < best.sparsity <= 0.17
    assert best.psnr >= 35.0
    assert study.best_trial.number == best.number  # Optuna's own constrained optimum is the same trial


def test_the_first_trial_s_outcome_leads_to_the_gate(tmp_path: Path) -> None:
    recorder = Recorder()
    study, objective = make(tmp_path, (recorder,))
    search(study, objective, 6)
    assert [trial.params["thresholds"] for trial in recorder.trials] == [CALIBRATED] * 6
    assert recorder.trials[0].params["l1"] == 0.02
    assert max(trial.sparsity for trial in recorder.trials if trial.feasible) > 0.14  # 0.15 is the best


def test_workers_that_wait_for_the_first_outcome_run_the_default_thresholds_once(tmp_path: Path) -> None:
    recorder = Recorder()
    study, objective = make(tmp_path, (recorder,), engine=FakeExecutor(4))
    search(study, objective, 6)
    defaults = [trial for trial in recorder.trials if trial.params["thresholds"] == DEFAULT]
    assert len(defaults) == 1
    assert {head.simthreshd1 for layer in defaults[0].policy.layers for head in layer.heads} == {0.6}
    assert defaults[0].params["dense_fraction"] == 0.0


def test_hopeless_and_beaten_trials_are_given_up_after_one_prompt(tmp_path: Path) -> None:
    recorder = Recorder()
    study, objective = make(tmp_path, (recorder,), sampler="random")  # the others stay near the gate
    search(study, objective, 15)
    pruned = [trial for trial in recorder.trials if trial.state == "pruned"]
    assert pruned
    assert all(len(trial.prompts) == 1 and trial.reason and not trial.feasible for trial in pruned)
    for trial in pruned:
        assert trial.psnr < GATE.min_psnr or trial.sparsity < 0.17
    assert any("the gate is 35 dB" in trial.reason for trial in pruned)
    assert {trial.state.name for trial in study.trials} == {"COMPLETE", "PRUNED"}


def test_the_same_seed_gives_the_same_trials(tmp_path: Path) -> None:
    outcomes = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        recorder = Recorder()
        study, objective = make(tmp_path / folder, (recorder,))
        search(study, objective, 8)
        outcomes.append([(trial.params, trial.sparsity) for trial in recorder.trials])
    assert outcomes[0] == outcomes[1]


def test_several_workers_run_as_many_trials_and_find_as_much(tmp_path: Path) -> None:
    engine = FakeExecutor(2, random.Random(0).randrange)
    recorder = Recorder()
    study, objective = make(tmp_path, (recorder,), engine=engine)
    search(study, objective, 15)
    assert engine.most_in_flight == 2
    assert sorted(trial.number for trial in recorder.trials) == list(range(15))
    assert [trial.number for trial in searches.results(study, objective)] == list(range(15))
    assert {trial.worker.index for trial in recorder.trials} == {0, 1}
    best = max(trial.sparsity for trial in recorder.trials if trial.feasible)
    assert 0.12 < best <= 0.17


def test_workers_differ_in_speed_and_the_same_asks_give_the_same_outcomes(tmp_path: Path) -> None:
    outcomes = []
    for folder, choose in (("even", lambda in_hand: 0), ("uneven", lambda in_hand: in_hand - 1)):
        (tmp_path / folder).mkdir()
        recorder = Recorder()
        study, objective = make(tmp_path / folder, (recorder,), engine=FakeExecutor(3, choose))
        search(study, objective, 4)  # the four initial trials: the same parameters whichever worker is faster
        outcomes.append({trial.number: (trial.params, trial.sparsity, trial.psnr) for trial in recorder.trials})
    assert outcomes[0] == outcomes[1]


def test_no_budget_is_tried_twice_by_workers_at_a_time(tmp_path: Path) -> None:
    study, objective = make(tmp_path, engine=FakeExecutor(4))
    search(study, objective, 12)
    leads = [trial for trial in study.trials if "lead" in trial.user_attrs]
    budgets = [trial.system_attrs["fixed_params"]["l1"] for trial in leads]
    assert len(budgets) > 1
    starts = [trial.params["l1"] for trial in study.trials[:4]]
    assert len({*budgets, *starts}) == len(budgets) + len(starts)


def test_a_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    study, objective = make(tmp_path)
    search(study, objective, 5)
    recorder = Recorder()
    study, objective = make(tmp_path, (recorder,))
    assert study.num_done() == 5
    search(study, objective, 8)
    assert [trial.number for trial in recorder.trials] == [5, 6, 7]
    everything = searches.results(study, objective)
    assert [trial.number for trial in everything] == list(range(8))
    assert everything[0].prompts == () and everything[0].sparsity == 0.02
    search(study, objective, 8)
    assert study.num_done() == 8 and len(recorder.trials) == 3


def test_a_study_with_other_settings_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(TuningError, match=r"with other settings: space was 1 and is 2; give another --study-name"):
        studies.open_study(f"sqlite:///{tmp_path / 'optuna.db'}", "known", {"space": 2}, 0, 10)


def test_a_storage_that_doesnt_open_is_said(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"--storage must be a database's URL, .*, got nonsense"):
        studies.open_study("nonsense", "known", {}, 0, 10)
    with pytest.raises(TuningError, match="cannot open study storage nothing://here: "):
        studies.open_study("nothing://here", "known", {}, 0, 10)


def test_a_failed_trial_is_kept_with_its_reason_and_the_search_goes_on(tmp_path: Path) -> None:
    recorder = Recorder()
    study, objective = make(tmp_path, (recorder,))
    objective.runner.fail = (1, 3)
    search(study, objective, 6)
    assert [trial.state for trial in recorder.trials if trial.number in (1, 3)] == ["failed", "failed"]
    assert "ran out" in recorder.trials[1].reason
    assert len(recorder.trials) == 6


def test_three_failures_in_a_row_for_one_reason_stop_the_search(tmp_path: Path) -> None:
    study, objective = make(tmp_path)
    objective.runner.fail = (2, 3, 4)
    with pytest.raises(TuningError, match="the last 3 trials failed for the same reason: the video"):
        search(study, objective, 20)
    assert len(study.trials) == 5


def test_three_failures_alike_on_all_workers_stop_the_search(tmp_path: Path) -> None:
    study, objective = make(tmp_path, engine=FakeExecutor(2))
    objective.runner.fail = tuple(range(20))
    with pytest.raises(TuningError, match="the last 3 trials failed for the same reason"):
        search(study, objective, 20)
    assert 3 <= len(objective.results) <= 4  # the other worker may finish one meanwhile


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    study, objective = make(tmp_path)
    objective.runner.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        search(study, objective, 20)
    assert len(searches.results(study, objective)) == 3
    assert any(trial.feasible for trial in searches.results(study, objective))


def test_the_trial_that_ctrl_c_cut_off_is_tried_again(tmp_path: Path) -> None:
    study, objective = make(tmp_path)
    objective.runner.stop_at = 0
    with pytest.raises(KeyboardInterrupt):
        search(study, objective, 5)
    recorder = Recorder()
    study, objective = make(tmp_path, (recorder,))
    assert study.num_done() == 0
    search(study, objective, 5)
    assert len(recorder.trials) == 5
    assert [trial.params["l1"] for trial in recorder.trials].count(0.02) == 1


def test_time_that_is_up_ends_the_trial_in_hand_and_a_later_run_tries_it_again(tmp_path: Path) -> None:
    recorder = Recorder()
    study, objective = make(tmp_path, (recorder,))
    search(study, objective, 2)
    search(study, objective, 8, -1.0)  # up before a trial begins
    task = objective.runner.score
    objective.runner.score = too_late(objective)
    search(study, objective, 8, 60.0)
    objective.runner.score = task
    assert len(recorder.trials) == 2
    waiting = [trial for trial in study.trials if trial.state.name == "WAITING"]
    assert waiting and study.num_done() == 2
    search(study, objective, 8)
    assert study.num_done() == 8
    again = waiting[-1].system_attrs["fixed_params"]["l1"]
    assert [trial.params.get("l1") for trial in recorder.trials].count(again) == 1


def test_a_journal_file_keeps_a_study_too(tmp_path: Path) -> None:
    url = f"journal:{tmp_path / 'new' / 'study.log'}"
    study, objective = make(tmp_path, url=url)
    search(study, objective, 5)
    study, objective = make(tmp_path, url=url)
    assert study.num_done() == 5
    search(study, objective, 6)
    assert [trial.number for trial in searches.results(study, objective)] == list(range(6))


# The Gaussian process takes 10 s to import what it needs.
@pytest.mark.parametrize(
    "sampler", [pytest.param(name, marks=pytest.mark.slow if name == "gp" else ()) for name in sorted(SAMPLERS)]
)
def test_every_sampler_finds_a_feasible_policy_sparser_than_the_starts(tmp_path: Path, sampler: str) -> None:
    study, objective = make(tmp_path, sampler=sampler)
    search(study, objective, 14)
    best = max(trial.sparsity for trial in searches.results(study, objective) if trial.feasible)
    # The others bisect first; random search has the starts, and what it draws.
    assert (0.04 if sampler == "random" else 0.13) <= best <= 0.151


def test_an_unknown_sampler_and_one_that_has_too_few_objectives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="--sampler must be one of tpe, gp, nsga2, cmaes, random, got 'grid'"):
        make(tmp_path, sampler="grid")
    with pytest.raises(TuningError, match="sampler cmaes can't do the two objectives"):
        make(tmp_path, sampler="cmaes", goal="pareto")


@pytest.mark.parametrize("goal", ["speed", "pareto"])
def test_other_goals_run_and_keep_the_gate(tmp_path: Path, goal: str) -> None:
    study, objective = make(tmp_path, goal=goal)
    search(study, objective, 10)
    trials = searches.results(study, objective)
    assert len(trials) == 10 and any(trial.feasible for trial in trials)
    assert all(trial.psnr >= 35.0 for trial in trials if trial.feasible)
    complete = next(trial for trial in study.trials if trial.state.name == "COMPLETE")
    assert len(complete.values) == (2 if goal == "pareto" else 1)


KILLED = """
import os, signal, sys, time
from pathlib import Path
from tests.tuning.test_study import Known, make, search
from sparsetune.tuning.search.study import quiet
from tests.executor.engines import FakeExecutor
workers = int(sys.argv[2])
with quiet():
    study, objective = make(Path(sys.argv[1]), engine=FakeExecutor(workers))
    run = objective.runner.run
    def die(number, *rest):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(number, *rest)
    objective.runner.run = die
    if workers > 1:  # the others render yet
        Known.run = lambda self, place, emit: time.sleep(60)
    search(study, objective, 6)
"""


def test_a_killed_run_loses_no_trial(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), "1"], check=False)
    assert killed.returncode == -signal.SIGKILL
    recorder = Recorder()
    study, objective = make(tmp_path, (recorder,))
    assert study.num_done() == 2
    cut_off = study.trials[2]
    search(study, objective, 6)
    assert study.num_done() == 6
    # Tried again first, so that a search of few trials ends with those of an undisturbed one.
    assert recorder.trials[0].params["l1"] == cut_off.params["l1"]


@pytest.mark.slow
def test_a_killed_run_loses_none_of_the_trials_that_were_under_way(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), "3"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    recorder = Recorder()
    study, objective = make(tmp_path, (recorder,), engine=FakeExecutor(3))
    assert study.num_done() == 0
    cut_off = [trial.params.get("l1") for trial in study.trials[:3]]
    search(study, objective, 6)
    assert study.num_done() == 6 == len(recorder.trials)
    assert set(cut_off) <= {trial.params.get("l1") for trial in recorder.trials}
    assert [trial.params.get("l1") for trial in recorder.trials].count(0.02) == 1


def test_time_that_is_up_cuts_off_all_trials_in_hand_and_all_are_tried_again(tmp_path: Path) -> None:
    study, objective = make(tmp_path, engine=FakeExecutor(3))
    search(study, objective, 6, 0.0)
    assert study.num_done() == 0
    objective.runner.score = too_late(objective)
    search(study, objective, 6, 60.0)
    waiting = [trial for trial in study.trials if trial.state == TrialState.WAITING]
    assert study.num_done() == 0 and len(waiting) == 3


def test_shortfalls_measure_every_bound_of_the_gate() -> None:
    gate = dataclasses.replace(GATE, min_psnr_frame=20.0)
    missing = shortfalls([judged(0.1, 40.0, 25.0), judged(0.1, 28.0, 18.0)], gate)
    assert missing == pytest.approx(
        {
            "mean frame_cosine": -0.04,
            "mean psnr": 1.0,
            "pooled psnr": 35.0 - pooled_psnr([40.0, 28.0]),
            "worst prompt's psnr": 2.0,
            "worst frame's psnr": 2.0,
        }
    )
    assert all(np.isinf(value) for value in shortfalls([], gate).values())


def test_a_trial_has_the_video_of_its_worst_prompt_and_one_of_the_best_three_has_all(tmp_path: Path) -> None:
    def with_videos(known: Known) -> Known:
        prompt = iter(range(2))
        done = Known.run

        class Filmed(Known):
            def run(self, session: object, emit: object) -> PromptResult:
                index = next(prompt)
                result = done(self, session, emit)
                psnr = result.metrics["psnr"] - index
                return dataclasses.replace(result, metrics={**result.metrics, "psnr": psnr}, video=b"%d" % index)

        return Filmed(known.params, known.problem)

    recorder = Recorder()
    study, objective = make(tmp_path, (recorder,))
    known, filmed = objective.runner.task, {}
    objective.runner.score = lambda prompt, policy: filmed.setdefault(id(policy), with_videos(known(prompt, policy)))
    search(study, objective, 16)
    found = {trial.number: dict(trial.videos) for trial in recorder.trials}
    complete = [trial.number for trial in recorder.trials if trial.state == "complete"]
    assert all(found[number] == {0: b"0", 1: b"1"} for number in complete[:3])
    assert {1: b"1"} in found.values(), "only the worst prompt of a trial that isn't among the best three so far"
    pruned = [trial.number for trial in recorder.trials if trial.state == "pruned"]
    assert pruned and all(found[number] == {0: b"0"} for number in pruned if len(found[number]) == 1)
    best = max((trial for trial in recorder.trials if trial.feasible), key=lambda trial: trial.sparsity)
    assert len(found[best.number]) == 2
    assert not any(result.videos for result in objective.results.values()), "videos aren't kept in memory"
    objective.trial_videos = "all"
    search(study, objective, 18)
    assert all(len(trial.videos) == len(trial.prompts) for trial in recorder.trials[16:])
