"""Tuners that give one policy: searched at a bound for every head, by our search or by SpargeAttn's own."""

from collections.abc import Mapping
from pathlib import Path

from sparsetune.attention.policy import Policy
from sparsetune.tuning.bench import Bench, calibration_signature, digest
from sparsetune.tuning.builtin import run_builtin
from sparsetune.tuning.events import Parameter, TrialResult, tell
from sparsetune.tuning.found import Found
from sparsetune.tuning.preparation import prepare
from sparsetune.tuning.refinement import refined_policy
from sparsetune.tuning.runner import TimeIsUp, TrialRunner


def calibrated(bench: Bench) -> Found:
    """Calibrate, and search the sparsest policy with every head's error within `tune.l1` and `tune.pv_l1`."""
    name = _start(bench)
    tune = bench.config.tune
    try:
        prepared = prepare(bench, probe=False)
        policy = refined_policy(bench, prepared.curves)
        trial = _tried(bench, policy, {"l1": tune.l1, "pv_l1": tune.pv_l1})
    except TimeIsUp:
        return Found(name, (), None)
    return _found(name, trial, prepared.path)


def built_in(bench: Bench) -> Found:
    """Run SpargeAttn's own search with the bounds `tune.l1` and `tune.pv_l1`."""
    name = _start(bench)
    tune = bench.config.tune
    trial = _tried(bench, run_builtin(bench), {"l1": tune.l1, "pv_l1": tune.pv_l1})
    return _found(name, trial, None)


def _start(bench: Bench) -> str:
    config = bench.config
    bounds = {"l1": config.tune.l1, "pv_l1": config.tune.pv_l1}
    name = f"{config.model.name}-{config.tune.tuner}-{digest(calibration_signature(bench) | bounds)[:8]}"
    bench.start(name, storage="", n_trials=1)
    return name


def _tried(bench: Bench, policy: Policy, params: Mapping[str, Parameter]) -> TrialResult:
    """Render the tune prompts under the policy: its one trial."""
    result = TrialRunner.of(bench).run(0, params, policy)
    tell(bench.listeners, lambda listener: listener.on_trial(result))
    return result


def _found(name: str, trial: TrialResult, path: Path | None) -> Found:
    return Found(name, (trial,), trial if trial.state == "complete" and trial.sparsity else None, path)
