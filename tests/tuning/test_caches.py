"""Step caches in the search: which settings are tried first, and joint trials with sparsity, on simulated videos."""

import math
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from sparsetune.attention.step_cache import CACHE_KINDS, CacheKind, StepCache
from sparsetune.bench.step_time import StepSeconds
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.metrics import Gate
from sparsetune.tuning.search import run as searches
from sparsetune.tuning.search import study as studies
from sparsetune.tuning.search import warm_start
from sparsetune.tuning.search.caches import LADDERS, CacheSpace, has_slack
from sparsetune.tuning.search.objective import Objective, TrialRunner
from sparsetune.tuning.search.ranking import winner
from sparsetune.tuning.search.space import BUDGETS, DENSE, THRESHOLDS, SearchSpace
from sparsetune.tuning.search.warm_start import enqueue_next
from tests.executor.engines import FakeExecutor
from tests.tuning.tables import curves

GATE = Gate(min_frame_cosine=0.95, min_psnr=35.0)
RATIOS = ((1.0, 0.9),)
STEP = StepSeconds(rest=0.3, dense=0.01, overhead=0.001, pairs=0.008, order=0.0, num_layers=2)


def space(kinds=("first_block", "mag", "taylorseer"), num_steps: int = 10) -> CacheSpace:
    return CacheSpace(kinds, num_steps, RATIOS)


def test_each_ladder_is_bisected_from_its_middle_and_the_kinds_take_turns() -> None:
    caches, known = space(("taylorseer", "mag")), []
    allowed = {"taylorseer": 1, "mag": 4}  # the most aggressive rung that passes
    while (wanted := caches.next_rung(known)) is not None:
        kind, rung = wanted
        known.append((kind, rung, rung <= allowed[kind]))
    assert known == [
        ("taylorseer", 2, False), ("mag", 2, True), ("taylorseer", 1, True), ("mag", 4, True),
    ]  # fmt: skip


@pytest.mark.parametrize(("num_steps", "first"), [(10, 0.3), (30, 0.2), (50, 0.1)])
def test_a_rung_is_a_cache_and_with_few_steps_more_of_them_run(num_steps: int, first: float) -> None:
    caches = space(num_steps=num_steps)
    assert caches.cache(caches.rung("taylorseer", 1)) == StepCache("taylorseer", max_skips=2, first=first)
    assert caches.cache(caches.rung("mag", 0)) == StepCache("mag", 0.06, 1, first=first, ratios=RATIOS)
    assert caches.cache(caches.rung("first_block", 2)) == StepCache("first_block", 0.25, first=first)
    assert caches.cache(caches.rung("sea", 2)) == StepCache("sea", 0.35, 3, first=first)
    assert caches.cache({"cache": "none"}) is None
    assert caches.cache({}) is None


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_the_sampler_may_choose_every_rung(kind: CacheKind) -> None:
    caches = space((kind,))
    for rung in range(len(LADDERS[kind])):
        params = caches.rung(kind, rung)
        wanted = {name: value for name, value in params.items() if name != "cache"}
        assert caches.suggest(optuna.trial.FixedTrial(wanted), optional=False) == params


def test_the_cheapest_with_slack_is_chosen() -> None:
    assert has_slack([5.0, 2.5, 0.1], [0.9, 0.7, 0.5], 2.0) == 1
    assert has_slack([1.0, 0.1], [0.7, 0.5], 2.0) == 1
    assert has_slack([], [], 2.0) is None


class Simulated:
    """A prompt whose error is that of its cache and of its budget; sparsity and skipped blocks save seconds."""

    def __init__(self, policy, params) -> None:
        cache = policy.cache
        self.skipped = 0.0 if cache is None else min(0.9, 0.1 * (cache.max_skips or 10 * cache.threshold))
        self.sparsity = 0.0 if policy.is_dense else min(0.9, 4.0 * float(params.get("l1", 0.002)))
        self.has_cache = cache is not None

    def run(self, session, emit) -> PromptResult:
        error = 10 ** (0.1 * (-52 + 40 * self.skipped)) + 10 ** (0.1 * (-52 + 25 * self.sparsity))
        metrics = {"psnr": -10 * math.log10(error), "frame_cosine": 0.99, "frame_l1": 0.01, "frame_diff": 0.01}
        seconds = (1 - self.skipped) * (0.4 + 0.6 * (1 - self.sparsity))
        return PromptResult(
            "a prompt", 0, metrics={**metrics, "psnr_frame_min": metrics["psnr"]}, sparsity=self.sparsity,
            blocks_run=1 - self.skipped, denoising_dense=1.0, denoising_sparse=seconds,
        )  # fmt: skip


class Runner(TrialRunner):
    def run(self, number, params, policy, prune=None):
        self.score = lambda prompt, policy: Simulated(policy, params)
        return super().run(number, params, policy, prune)


def searched(tmp_path: Path, searched_space: SearchSpace, n_trials: int):
    runner = Runner(FakeExecutor(), ("a prompt",) * 2, None, GATE, (), searched_space.predict)
    objective = Objective(runner, searched_space, "speed", aimed=True)
    with studies.quiet():
        study = studies.open_study(f"sqlite:///{tmp_path / 'a.db'}", "a", {}, 0, n_trials, "tpe", "speed")
        searches.optimize(study, objective)
    return searches.results(study, objective)


def test_caches_alone_are_searched_where_sparsity_saves_no_seconds(tmp_path: Path) -> None:
    trials = searched(tmp_path, SearchSpace(None, caches=space(), dense_layers=(("a", 2), ("b", 2))), 12)
    assert len(trials) == 12
    assert all(trial.policy.is_dense and trial.policy.cache is not None for trial in trials)
    best = winner("speed", trials)
    assert best is not None
    assert best.sparsity == 0.0
    assert best.blocks_run < 0.75
    assert best.speedup == pytest.approx(1 / best.blocks_run)
    assert all(trial.params[THRESHOLDS] == DENSE for trial in trials)


def test_both_together_beat_either_alone(tmp_path: Path) -> None:
    trials = searched(tmp_path, SearchSpace(curves(), granularity="global", caches=space(), step=STEP), 40)
    best = winner("speed", trials)
    assert best is not None
    alone = [trial for trial in trials if trial.feasible and (trial.policy.cache is None or trial.policy.is_dense)]
    assert any(trial.policy.cache is None for trial in alone)
    assert any(trial.policy.is_dense for trial in alone)
    assert best.policy.cache is not None
    assert best.sparsity > 0
    assert best.speedup > max(trial.speedup for trial in alone)


def test_a_budget_with_a_cache_is_never_below_those_that_are_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_start, "JOINT_FACTOR", 1e-4)
    trials = searched(tmp_path, SearchSpace(curves(), granularity="global", caches=space(), step=STEP), 20)
    joint = [trial.params["l1"] for trial in trials if trial.policy.cache is not None and "l1" in trial.params]
    assert joint[0] == BUDGETS[0]


def test_a_resumed_study_rebuilds_its_policies(tmp_path: Path) -> None:
    whole = SearchSpace(None, caches=space(), dense_layers=(("a", 2),))
    first = searched(tmp_path, whole, 5)
    again = searched(tmp_path, whole, 7)
    assert [trial.policy for trial in again[:5]] == [trial.policy for trial in first]
    assert [trial.blocks_run for trial in again[:5]] == [trial.blocks_run for trial in first]


def enqueued(tmp_path: Path, whole: SearchSpace, states):
    """Ask a study for its next trials, after trials that were enqueued, in the states given, were left behind."""
    with studies.quiet():
        study = studies.open_study(f"sqlite:///{tmp_path / 'b.db'}", "b", {}, 0, 20, "tpe", "speed")
        found = []
        for state in states:
            enqueue_next(study, study.get_trials(), whole, GATE, adaptive=True, aimed=True)
            trial = study.ask()
            found.append(whole.suggest(trial))
            if state == "interrupted":
                study.tell(trial, state=TrialState.FAIL)
        return found


def test_an_interrupted_rung_is_tried_again(tmp_path: Path) -> None:
    whole = SearchSpace(None, caches=space(("taylorseer",)), dense_layers=(("a", 2),))
    first, again = enqueued(tmp_path, whole, ("interrupted", "running"))
    assert first == again == whole.caches.rung("taylorseer", 2) | {THRESHOLDS: DENSE}
