"""Seconds that each way of choosing thresholds saves at a quality, on a GPU whose kernel skips work.

    python benchmarks/seconds.py --model demo-xl --output seconds [--compile] [--methods defaults topk calibrate optuna]

Every method chooses one policy on the tune prompts, which is then evaluated on the eval prompts with dense steps timed
beside each rendering. `topk` is what a person would set by hand: the fastest of a grid of one topk for all heads and a
number of dense first steps that meets the gate on the tune prompts, with the margin that `tune` keeps too. `caches`
searches step caches together with sparsity, and has three rows: the best of its trials with sparsity alone, with a
cache alone, and with both, each of which meets the gate on the validation prompts too. `--seed` chooses other noise
and, for topk and caches, other tune and validation prompts of the file; the eval prompts stay.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparsetune.attention.device import device_name, device_of
from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.checkpoint import git_commit
from sparsetune.config import Config, resolve
from sparsetune.evaluation.evaluate import evaluate
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.files import write_json
from sparsetune.models.prompts import load_prompts
from sparsetune.models.sparsify import default_policy
from sparsetune.tuning import TrialResult, tune
from sparsetune.tuning.context import TuningContext, open_context
from sparsetune.tuning.search.objective import TrialRunner
from sparsetune.tuning.search.ranking import winner
from sparsetune.tuning.search.validation import validated_winner
from sparsetune.tuning.tune import search_policy

TOPK = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
DENSE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
METRICS = ("frame_cosine", "psnr", "frame_l1", "frame_diff", "ssim", "vmaf")


def by_hand(context: TuningContext) -> Policy | None:
    """Return the fastest uniform topk with dense first steps that meets the gate on the tune prompts, if any does."""
    runner, trials = TrialRunner.of(context), list[TrialResult]()

    def missed(results: Sequence[PromptResult]) -> str | None:
        gate = context.search_gate
        worst = gate.min_psnr_worst
        too_low = worst is not None and results[-1].metrics["psnr"] < worst
        return "a prompt is below the bound" if too_low else None

    for dense in DENSE:
        for topk in TOPK:  # more sparsity from one to the next: the rest misses the gate too
            policy = Policy.uniform(
                context.runtime.layers, HeadThresholds(-1.0, topk=topk), schedule=DenseSchedule(dense)
            )
            trials.append(runner.run(len(trials), {"topk": topk, "dense": dense}, policy, missed))
            print(f"  topk {topk:g}, {dense:.0%} dense: {described(trials[-1])}", flush=True)
            if not trials[-1].feasible:
                break
    best = winner("speed", trials)
    return None if best is None else best.policy


def described(trial: TrialResult) -> str:
    figures = f"sparsity {trial.sparsity or 0:.3f}, psnr {trial.psnr or 0:.2f} dB, speed-up {trial.speedup or 0:.2f}x"
    return f"{figures}, {'meets the gate' if trial.feasible else trial.reason or 'misses the gate'}"


def chosen(context: TuningContext, method: str, folder: Path) -> dict[str, Policy | None]:
    """Return the policies that a method chooses on the tune prompts, None where none meets the gate."""
    if method == "defaults":
        return {method: default_policy(context.renderer.loaded.pipe)}
    if method == "topk":
        return {method: by_hand(context)}
    if method == "caches":
        return by_kind(context)
    changes = {"tuner": method, "caches": ("none",)}
    changed = context.config.model_copy(update={"tune": context.config.tune.model_copy(update=changes)})
    result = tune(changed, output_dir=folder / method, loaded=context.renderer.loaded)
    print(f"  {method}: {len(result.trials)} trials; {result.dense_because or result.seconds_by_phase}", flush=True)
    return {method: None if result.best is None else result.best.policy}


def by_kind(context: TuningContext) -> dict[str, Policy | None]:
    """Search sparsity and caches together, and return the best policy of each kind."""
    result = search_policy(context)
    for trial in result.trials:
        speed = f"{trial.number:3} {trial.speedup or 0:.2f} {trial.blocks_run or 1:.2f} {trial.sparsity or 0:.3f}"
        quality = f"{trial.psnr or 0:.1f} {trial.psnr_worst or 0:.1f} {trial.feasible} {trial.policy.cache}"
        print(f"  {speed} {quality}", flush=True)

    def best(cached: bool, sparse: bool) -> Policy | None:
        kinds = [(trial.policy.cache is not None, not trial.policy.is_dense) for trial in result.trials]
        of_kind = [trial for trial, kind in zip(result.trials, kinds, strict=True) if kind == (cached, sparse)]
        found, validations, _ = validated_winner(context, of_kind)
        print(f"  {[(one.number, one.psnr, one.feasible) for one in validations]}", flush=True)
        return None if found is None else found.policy

    return {"sparsity alone": best(False, True), "cache alone": best(True, False), "both": best(True, True)}


def opened(config: Config, folder: Path, seed: int) -> TuningContext:
    context = open_context(config, folder / "out")
    order = np.random.default_rng(seed).permutation(len(every := load_prompts(config.tune.prompt_file)))
    shuffled = tuple(every[index] for index in order) if seed else every
    ends = config.tune.num_prompts, config.tune.num_prompts + config.tune.validation_prompts
    return replace(context, prompts=shuffled[: ends[0]], validation_prompts=shuffled[slice(*ends)])


def measured(context: TuningContext, policy: Policy, metrics: Sequence[str]) -> EvaluationResult:
    return evaluate(
        context.executor, policy, context.eval_prompts, cache=context.cache, seed=context.config.eval.seed,
        metrics=metrics, gate=context.gate, backend=context.config.backend,
    )  # fmt: skip


def row(method: str, result: EvaluationResult | None, seconds: float) -> dict[str, object]:
    if result is None or result.seconds is None:
        return {"method": method, "search_seconds": seconds}
    psnr, found = result.statistics["psnr"], result.statistics
    return {
        "method": method, "blocks": result.sparsity.blocks_run, "sparsity": result.sparsity.overall,
        "psnr": psnr.mean, "psnr_worst": psnr.min,
        "ssim": found["ssim"].mean, "vmaf": found["vmaf"].mean if "vmaf" in found else None,
        "gate": result.gate.passed, "dense": result.seconds.dense, "sparse": result.seconds.sparse,
        "speedup": result.seconds.speedup, "low": result.seconds.ci95_low, "high": result.seconds.ci95_high,
        "noise": result.seconds.noise, "share": result.seconds.attention_share, "search_seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-xl")
    parser.add_argument("--compile", action="store_true")
    methods = ("defaults", "topk", "calibrate", "optuna", "caches", "builtin")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods[:4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--metrics", nargs="+", default=METRICS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    fixed = {"tracking.root": options.output / "mlruns", "cache.dir": options.output / "cache",
             "tune.seed": 42 + options.seed, "eval.seed": 42 + options.seed}  # fmt: skip
    config = resolve(
        options.model, options.set, None, fixed | {"model.compile": options.compile, "eval.save_videos": False}
    )
    rows: list[dict[str, object]] = []
    context = opened(config, options.output, options.seed)
    for method in options.methods:
        started = time.perf_counter()
        policies = chosen(context, method, options.output)
        seconds = time.perf_counter() - started
        for name, policy in policies.items():
            result = None if policy is None else measured(context, policy, options.metrics)
            rows.append(row(name, result, seconds) | {"cache": str(policy.cache) if policy else None})
            write_json(options.output / "seconds.json", {"commit": git_commit(), "rows": rows})
    context.executor.close()
    machine = f"{device_name(device_of('auto'))}, compiled: {options.compile}"
    print(f"{options.model}, seed {options.seed}, {machine}, commit {git_commit()}")
    columns = ("method", "cache", "blocks run", "sparsity", "PSNR mean / worst", "SSIM", "VMAF", "gate", "dense s",
               "sparse s", "speed-up", "search s")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for one in rows:
        print("| " + " | ".join(cells(one)) + " |")


def cells(one: dict[str, object]) -> list[str]:
    def text(name: str, form: str) -> str:
        value = one.get(name)
        return "-" if value is None else format(value, form)

    interval = f"{text('speedup', '.2f')} ({text('low', '.2f')} to {text('high', '.2f')})"
    gate = {True: "met", False: "missed"}.get(one.get("gate"), "none met it")  # type: ignore[call-overload]
    return [
        str(one["method"]), str(one["cache"]), text("blocks", ".2f"), text("sparsity", ".3f"),
        f"{text('psnr', '.1f')} / {text('psnr_worst', '.1f')}",
        text("ssim", ".4f"), text("vmaf", ".1f"), gate, text("dense", ".2f"), text("sparse", ".2f"), interval,
        text("search_seconds", ".0f"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
