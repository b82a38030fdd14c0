"""A whole tuning: policies found by one of the tuners, the winner saved and judged on other prompts."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sparsetune.config import Config
from sparsetune.evaluation.compare import compare
from sparsetune.tuning.bench import Bench
from sparsetune.tuning.builtin import check_builtin
from sparsetune.tuning.events import TuningListener, TuningResult, tell
from sparsetune.tuning.found import Found
from sparsetune.tuning.opening import open_bench
from sparsetune.tuning.phases import PhaseClock
from sparsetune.tuning.record import RECORD_NAME, TuningRecord, save_record
from sparsetune.tuning.search import search
from sparsetune.tuning.single import built_in, calibrated
from sparsetune.tuning.winner import judge, save

_TUNERS = {"optuna": search, "calibrate": calibrated, "builtin": built_in}


def tune(config: Config, *, output_dir: Path, listeners: Sequence[TuningListener] = ()) -> TuningResult:
    """Find a policy with the configuration's tuner, save it as a checkpoint and judge it.

    `optuna` searches for the sparsest policy whose videos pass the gate on the tune prompts; `calibrate` and `builtin`
    give the policy within `tune.l1` and `tune.pv_l1`. The winner and SpargeAttn's default thresholds are judged on the
    eval prompts, which no tuner saw.

    Args:
        config: the configuration; its `tune` section says how to search.
        output_dir: gets `checkpoint/`, the winner's evaluation in `evaluation/`, the defaults' in `before/`, and all
            of the tuning as `tuning.json`.
        listeners: told what happens, in order.

    Returns:
        All trials and the winner. Where no trial of a search meets the gate there is no winner and nothing is saved;
        `closest` is then the trial that misses it by the least. Ctrl-C while trials run ends the search with the best
        so far. The one policy of the other tuners is the winner whatever the gate says.

    Raises:
        PromptError, ModelError, BackendError, TuningError, GenerationError: what was asked for can't be done.
    """
    if config.tune.tuner == "builtin":
        check_builtin()
    clock = PhaseClock()
    bench = open_bench(config, output_dir, (clock, *listeners))
    clock.restart(bench.started)
    try:
        result = _judged(bench, _TUNERS[config.tune.tuner](bench))
        result = replace(result, seconds_by_phase=clock.stop(), record_path=output_dir / RECORD_NAME)
        save_record(TuningRecord.of(result, config), output_dir / RECORD_NAME)
    except BaseException as error:
        failure = error
        tell(bench.listeners, lambda listener: listener.on_failure(failure))
        raise
    tell(bench.listeners, lambda listener: listener.on_study_end(result))
    return result


def _judged(bench: Bench, found: Found) -> TuningResult:
    """Save the winner, and judge it and SpargeAttn's default thresholds on the eval prompts."""
    best, result = found.best, found.result(time.perf_counter() - bench.started)
    if best is None:
        return result
    saved = save(bench, found.study_name, best)
    tell(bench.listeners, lambda listener: listener.on_winner(best, saved))
    before = judge(bench, None, "before")
    after = judge(bench, best.policy, "evaluation", saved)
    return replace(
        result,
        checkpoint_path=saved,
        before=before,
        evaluation=after,
        comparison=compare(before, after),
        seconds=time.perf_counter() - bench.started,
    )
