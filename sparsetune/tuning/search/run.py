"""The search with Optuna: policies tried on rendered video until trials or time are used up."""

import logging

from sparsetune.errors import TuningError
from sparsetune.tuning.context import TuningContext, signature
from sparsetune.tuning.prepare import prepare
from sparsetune.tuning.search import study as studies
from sparsetune.tuning.search.objective import Objective
from sparsetune.tuning.search.ranking import insight, winner
from sparsetune.tuning.search.runner import TimeIsUp, TrialRunner
from sparsetune.tuning.search.shared import SharedStudy
from sparsetune.tuning.search.space import SearchSpace
from sparsetune.tuning.winner import Found

logger = logging.getLogger(__name__)


def search(bench: TuningContext) -> Found:
    """Search with Optuna; a study of the same name and settings goes on where it ended.

    Raises:
        TuningError: the study can't be opened or is another one, or trials keep failing alike.
        KeyboardInterrupt: Ctrl-C before any trial met the gate.
    """
    with studies.quiet():
        return _search(bench)


def _search(bench: TuningContext) -> Found:
    config = bench.config
    shared = signature(bench)
    name = config.tune.study_name or studies.default_name(config.model.name, shared)
    storage = config.tune.storage or f"sqlite:///{config.tracking.root / 'optuna.db'}"
    config.tracking.root.mkdir(parents=True, exist_ok=True)
    study = studies.open_study(
        storage, name, shared, config.tune.seed, config.tune.n_trials, config.tune.sampler, config.tune.objective
    )
    bench.start(name, storage, config.tune.n_trials, study)
    try:
        prepared = prepare(bench)
    except TimeIsUp:
        return Found(name, (), None)
    space = SearchSpace(
        prepared.curves,
        prepared.sensitivity,
        config.tune.space,
        config.tune.granularity,
        config.tune.orders,
        config.tune.rules,
        bench.keep_text,
        config.tune.skip_pv,
        config.tune.schedule,
    )
    objective, interrupted = _run_trials(bench, study, space)
    trials = studies.results(study, objective)
    return Found(
        name,
        trials,
        winner(config.tune.objective, trials),
        prepared.path,
        interrupted,
        insight(study, trials, config.tune.objective),
        study.num_running(),
    )


def _run_trials(bench: TuningContext, study: SharedStudy, space: SearchSpace) -> tuple[Objective, bool]:
    tune, runner = bench.config.tune, TrialRunner.of(bench, space.predict)
    objective = Objective(
        runner,
        space,
        tune.objective,
        penalised=tune.sampler == "cmaes",
        # A Pareto front is wanted over all sparsities, and who asks for random trials gets them.
        aimed=tune.objective != "pareto" and tune.sampler != "random",
    )
    try:
        studies.search(study, objective, tune.n_trials, bench.seconds_left)
    except KeyboardInterrupt:
        if not studies.has_feasible(study):
            raise
        return objective, True
    except TuningError as error:
        if not studies.has_feasible(study):
            raise
        logger.warning("the search stops with the best so far: %s", error)
    _check_ran_sparse(objective)
    return objective, False


def _check_ran_sparse(objective: Objective) -> None:
    """Check that not every call of this run's trials fell back to dense."""
    stats = [prompt.stats for trial in objective.runner.results.values() for prompt in trial.prompts if prompt.stats]
    reasons = sorted({reason for each in stats for reason in each.fallbacks})
    if stats and reasons and not any(each.num_calls["sparse"] for each in stats):
        raise TuningError(
            f"some attention calls must run sparse, but all fell back to dense: {'; '.join(reasons)}; "
            "try another --backend or --dtype"
        )
