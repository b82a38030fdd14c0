"""Sparsity that each search method reaches at a given PSNR on eval prompts, on the demo model.

    python benchmarks/frontier.py --seeds 0 1 2 --gates 35 30 --output frontier [--workers 3] [--device cuda --gpus 2]

Every method may render at most as often as the grid (20 pairs times the tune prompts), sensitivity included; dense
videos are shared. The result of a method is its sparsest policy that meets the gate on the eval prompts, which are not
used for tuning. Only policies that came near the gate on the tune prompts are evaluated, sparsest first. The searches
use their last four trials for policies less sparse than their best, as a safety margin above the gate would; the grid
contains such pairs anyway. The ablation bisects one number per variant, at the first gate.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.files import write_json
from sparsetune.models.pipelines import demo_config
from sparsetune.models.prompts import load_prompts
from sparsetune.models.sparsify import default_policy
from sparsetune.tuning.calibration.bounded_policy import bounded_policy
from sparsetune.tuning.calibration.sensitivity import count_phases
from sparsetune.tuning.context import TuningContext, open_context
from sparsetune.tuning.events import TrialResult, TuningListener
from sparsetune.tuning.prepare import Prepared, prepare
from sparsetune.tuning.search.allocation import allocate, best_order
from sparsetune.tuning.search.candidates import CandidateTable
from sparsetune.tuning.search.objective import METRICS, Prune, TrialRunner
from sparsetune.tuning.search.ranking import shortfalls
from sparsetune.tuning.search.space import NUM_GROUPS, STEEPNESS
from sparsetune.tuning.tune import search_policy

SIMS, CDFS = (-1.0, 0.0, 0.3, 0.6, 0.8), (0.9, 0.95, 0.98, 0.99)
MARGIN_DB = 0.0
NEAR_DB = 3.0
STEPS_DOWN = (0.96, 0.92, 0.86, 0.8)
HIGH_DB = 45.0
"""PSNR that no prompt of a policy near the gate exceeded; an upper bound for the prompts not rendered yet."""
MANY_TRIALS = 60
BISECTIONS = 6
PROBE_PROMPTS = 4
WORST_FROM = 35.0
ABLATION_PARTS = 13


@dataclass(frozen=True)
class Tries:
    """Policies that a method tried, with their results on the tune prompts, and its other renderings."""

    tried: tuple[tuple[Policy, TrialResult], ...]
    extra: int = 0

    @property
    def renderings(self) -> int:
        return self.extra + sum(len(result.prompts) for _, result in self.tried)


@dataclass
class RenderingLimit(TuningListener):
    """Record a search's trials, and stop it like Ctrl-C if another trial could exceed the budget of renderings."""

    renderings: int
    prompts: int
    tried: list[tuple[Policy, TrialResult]] = field(default_factory=list)

    def on_trial(self, result: TrialResult) -> None:
        self.tried.append((result.policy, result))
        if Tries(tuple(self.tried)).renderings > self.renderings - self.prompts:
            raise KeyboardInterrupt


@dataclass
class Setup:
    """One seed's prompts and a gate, with cached results of policies on the tune and on the eval prompts."""

    context: TuningContext
    tune_runner: TrialRunner
    eval_runner: TrialRunner
    tuned: dict[Policy, TrialResult] = field(default_factory=dict)
    evaluated: dict[Policy, TrialResult] = field(default_factory=dict)

    @property
    def layers(self) -> list[tuple[str, int]]:
        return [(name, heads) for name, heads, _ in self.context.renderer.loaded.identity.layers]

    def at(self, options: argparse.Namespace, gate: float) -> "Setup":
        """Return this set-up with another gate."""
        worst = options.worst if gate >= WORST_FROM else None
        context = replace(self.context, gate=replace(self.context.gate, min_psnr=gate, min_psnr_worst=worst))
        return replace(self, context=context)

    def on_tune(self, policy: Policy, prune: Prune | None = None) -> tuple[Policy, TrialResult]:
        if policy not in self.tuned:
            self.tuned[policy] = self.tune_runner.run(len(self.tuned), {}, policy, prune)
        return policy, self.tuned[policy]

    def passes(self, result: TrialResult) -> bool:
        """Return whether a policy's tune prompts meet the gate of the search."""
        return all(missing <= 0 for missing in shortfalls(result.prompts, self.context.search_gate).values())

    def on_eval(self, policy: Policy) -> TrialResult:
        """Evaluate a policy; stop at the first prompt below the bound, or once the mean can't reach the gate."""
        worst, gate = self.context.gate.min_psnr_worst, self.context.gate.min_psnr

        def fails(results: Sequence[PromptResult]) -> str | None:
            if worst is not None and results[-1].metrics["psnr"] < worst:
                return "a prompt is below the bound"
            count = len(self.eval_runner.prompts)
            best = sum(each.metrics["psnr"] for each in results) + HIGH_DB * (count - len(results))
            return "the mean can't reach the gate" if best < gate * count else None

        known = self.evaluated.get(policy)
        if known is None or (known.state == "pruned" and worst is None):
            self.evaluated[policy] = self.eval_runner.run(len(self.evaluated), {}, policy, fails)
        return self.evaluated[policy]


def open_setup(options: argparse.Namespace, seed: int, changes: Mapping[str, object] | None = None) -> Setup:
    order = np.random.default_rng(seed).permutation(16)
    settings = {
        "model.device": options.device,
        "backend": "reference",
        "tune.num_prompts": 16,
        "eval.num_prompts": options.eval_prompts,
        "eval.save_videos": False,
        "tune.seed": 42 + seed,
        "eval.seed": 42 + seed,
        "tune.margin_db": MARGIN_DB,
        "tune.probe_prompts": PROBE_PROMPTS,
        "tune.caches": "none",
        "gate.min_frame_cosine": 0.9,
        "tracking.root": options.output / f"mlruns-{seed}",
        "cache.dir": options.output / "cache",
    }
    config = demo_config(settings | (changes or {}))
    context = open_context(config, options.output / "out")
    context = replace(context, prompts=tuple(context.prompts[index] for index in order[: options.tune_prompts]))

    def runner(prompts: Sequence[object]) -> TrialRunner:
        return TrialRunner(
            context.executor, tuple(prompts), functools.partial(context.score, metrics=METRICS), context.search_gate
        )

    return Setup(context, runner(context.prompts), runner(context.eval_prompts))


def bisected(
    setup: Setup, policy_of: Callable[[float], Policy], low: float, high: float, count: int = BISECTIONS,
    prune: Prune | None = None,
) -> Tries:  # fmt: skip
    """Bisect the logarithm of a number; larger values mean more sparsity and lower quality."""
    tried = []
    for _ in range(count):
        middle = float(np.sqrt(low * high))
        tried.append(setup.on_tune(policy_of(middle), prune))
        low, high = (middle, high) if setup.passes(tried[-1][1]) else (low, middle)
    return Tries(tuple(tried))


def grid(setup: Setup) -> Tries:
    pairs = [HeadThresholds(sim, cdf) for sim in SIMS for cdf in CDFS]
    return Tries(tuple(setup.on_tune(Policy.uniform(setup.layers, pair)) for pair in pairs))


def defaults(setup: Setup) -> Tries:
    return Tries((setup.on_tune(default_policy(setup.context.renderer.loaded.pipe)),))


def calibrate(setup: Setup) -> Tries:
    curves = prepare(setup.context, probe=False).curves
    return bisected(setup, lambda bound: bounded_policy(curves, bound), 0.01, 1.0)


def searched(setup: Setup, seed: int, sampler: str) -> Tries:
    """Search as `sparsetune tune` does, then try less sparse policies than the best, within the grid's renderings."""
    gate, config, prompts = setup.context.gate.min_psnr, setup.context.config, len(setup.context.prompts)
    probes = PROBE_PROMPTS * (count_phases(config.generation.num_inference_steps) + NUM_GROUPS)
    limit = RenderingLimit((len(SIMS) * len(CDFS) - len(STEPS_DOWN)) * prompts - probes, prompts)
    changes = {"sampler": sampler, "n_trials": MANY_TRIALS, "study_name": f"{sampler}-{seed}-{gate:g}"}
    tune = config.tune.model_copy(update=changes)
    context = replace(setup.context, config=config.model_copy(update={"tune": tune}), listeners=(limit,))
    with contextlib.suppress(KeyboardInterrupt):
        search_policy(context)
    tried = limit.tried
    complete = [result for _, result in tried if result.state == "complete" and result.sparsity]
    best = max(complete, key=lambda result: (result.feasible, result.sparsity if result.feasible else result.psnr))
    prepared = prepare(context)
    candidates = CandidateTable(prepared.curves, prepared.sensitivity)
    for step in STEPS_DOWN:
        lower = allocate(candidates, sparsity=step * best.sparsity, steepness=STEEPNESS)
        tried.append(setup.on_tune(lower))
    return Tries(tuple(tried), probes)


METHODS: dict[str, Callable[[Setup, int], Tries]] = {
    "defaults": lambda setup, _: defaults(setup),
    "grid": lambda setup, _: grid(setup),
    "calibrate": lambda setup, _: calibrate(setup),
    "random": lambda setup, seed: searched(setup, seed, "random"),
    "optuna": lambda setup, seed: searched(setup, seed, "tpe"),
}


def reached(setup: Setup, tries: Tries) -> dict[str, object]:
    """Return the sparsest policy tried that meets the gate on the eval prompts."""
    gate = setup.context.gate.min_psnr
    complete = [(policy, result) for policy, result in tries.tried if result.state == "complete"]
    near = [(policy, result) for policy, result in complete if (result.psnr or 0.0) >= gate - NEAR_DB]
    for policy, result in sorted(near, key=lambda each: -(each[1].sparsity or 0.0)):
        evaluated = setup.on_eval(policy)
        worst = setup.context.gate.min_psnr_worst
        if (
            evaluated.state == "complete"
            and evaluated.psnr >= gate
            and (worst is None or evaluated.psnr_worst >= worst)
        ):
            return {"sparsity": evaluated.sparsity, "psnr": evaluated.psnr, "worst": evaluated.psnr_worst,
                    "tune_psnr": result.psnr, "renderings": tries.renderings}  # fmt: skip
    return {"sparsity": None, "psnr": None, "worst": None, "renderings": tries.renderings}


Variant = tuple[str, Callable[[float], Policy], float]


def variants(setup: Setup, prepared: Prepared, plain: Prepared) -> Iterator[Variant]:
    """Yield each part of the search alone, all together, and all but one; the number is the drop or the budget."""
    layers, sensitivity = setup.layers, prepared.sensitivity
    scale = sensitivity.schedule(0.0, STEEPNESS)
    order = best_order(prepared.curves, setup.context.config.tune.orders, True)

    def pair(**changes: object) -> Callable[[float], Policy]:
        return lambda drop: Policy.uniform(layers, HeadThresholds(-1.0, 1.0 - drop), **changes)

    def allocated(curves: object, **changes: object) -> Callable[[float], Policy]:
        candidates = CandidateTable(curves, sensitivity)
        return lambda budget: allocate(candidates, budget, **({"steepness": STEEPNESS} | changes))

    yield "one pair, raster", pair(), 0.5
    yield "+ text kept", pair(keep_text=True), 0.5
    yield "+ partial blocks chosen", pair(select_partial=True), 0.5
    yield f"+ order ({order})", pair(order=order), 0.5
    yield "+ steps", pair(schedule=scale), 0.5
    yield "+ budgets by head", allocated(plain.curves, orders=("raster",), steepness=0.0), 1.0
    yield "all", allocated(prepared.curves), 1.0
    everything = allocated(prepared.curves)
    yield "all but text kept", lambda budget: replace(everything(budget), keep_text=False), 1.0
    yield "all but partial blocks", allocated(plain.curves), 1.0
    yield "all but orders", allocated(prepared.curves, orders=("raster",)), 1.0
    yield f"all but orders by head ({order})", allocated(prepared.curves, orders=(order,)), 1.0
    yield "all but steps", allocated(prepared.curves, steepness=0.0), 1.0
    yield "all but budgets by head", pair(schedule=scale, order=order, select_partial=True, keep_text=True), 0.5


def part(options: argparse.Namespace) -> None:
    """Run one seed and method at its gates, or one share of the ablation; write rows as they are measured."""
    seed, started = options.seeds[0], time.perf_counter()
    rows: list[dict[str, object]] = []
    setup = open_setup(options, seed)

    def add(name: str, at_gate: Setup, tries: Tries) -> None:
        row = {"method": name} | reached(at_gate, tries) | {"seed": seed, "gate": at_gate.context.gate.min_psnr}
        rows.append(row | {"seconds": time.perf_counter() - started})
        write_json(options.output / f"rows-{options.part}-{seed}-{options.number}.json", rows)

    if options.part in METHODS:
        for at_gate in [setup.at(options, gate) for gate in options.gates]:
            add(options.part, at_gate, METHODS[options.part](at_gate, seed))
        return
    setup = setup.at(options, options.gates[0])
    prepared = prepare(setup.context)
    plain = prepare(open_setup(options, seed, {"tune.select_partial": False}).context, probe=False)
    listed = list(variants(setup, prepared, plain))
    for name, policy_of, high in listed[options.number :: ABLATION_PARTS]:
        add(f"ablation: {name}", setup, bisected(setup, policy_of, 0.002, high))


def launch(options: argparse.Namespace) -> None:
    """Run each part in its own process, at most `workers` at a time, spread over the visible GPUs.

    The grid is rendered once for all gates; the other methods start again for each gate.
    """
    parts: list[tuple[int, str, list[float]]] = []
    for seed in options.seeds:
        for method in options.methods:
            gates = [options.gates[:1]] * ABLATION_PARTS if method == "ablation" else [[gate] for gate in options.gates]
            parts += [(seed, method, each) for each in ([options.gates] if method == "grid" else gates)]
    parts.sort(key=lambda each: ("optuna", "random", "ablation", "grid", "calibrate", "defaults").index(each[1]))
    running: list[subprocess.Popen[bytes]] = []
    for index, (seed, method, gates) in enumerate(parts):
        while sum(process.poll() is None for process in running) >= options.workers:
            time.sleep(0.5)
        number = sum(each[:2] == (seed, method) for each in parts[:index])
        command = [sys.executable, __file__, "--part", method, "--number", str(number), "--seeds", str(seed),
                   "--gates", *map(str, gates), "--output", str(options.output),
                   "--device", options.device, "--worst", str(options.worst),
                   "--tune-prompts", str(options.tune_prompts),
                   "--eval-prompts", str(options.eval_prompts)]  # fmt: skip
        environment = dict(os.environ)
        if options.gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(index % options.gpus)
        with (options.output / f"log-{method}-{seed}-{number}.txt").open("w") as log:
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    for process in running:
        process.wait()


def table(options: argparse.Namespace) -> None:
    rows = [row for path in sorted(options.output.glob("rows-*.json")) for row in json.loads(path.read_text())]
    for gate in options.gates:
        of_gate = [row for row in rows if row["gate"] == gate]
        grids = {row["seed"]: row["sparsity"] for row in of_gate if row["method"] == "grid"}
        columns = ("sparsity (by seed)", "mean", "against the grid", "psnr", "worst prompt", "renderings")
        print(f"\n| PSNR >= {gate:g} dB | {' | '.join(columns)} |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for method in dict.fromkeys([*METHODS, *(row["method"] for row in of_gate)]):
            mine = sorted((row for row in of_gate if row["method"] == method), key=lambda row: row["seed"])
            passing = [row for row in mine if row["sparsity"] is not None]
            if not mine:
                continue
            each = ", ".join("-" if row["sparsity"] is None else f"{row['sparsity']:.3f}" for row in mine)
            if not passing:
                print(f"| {method} | {each} | - | - | - | - | |")
                continue
            ratios = [row["sparsity"] / grids[row["seed"]] for row in passing if grids.get(row["seed"])]
            mean = np.mean([row["sparsity"] for row in passing])
            print(f"| {method} | {each} | {mean:.3f} | {np.mean(ratios) if ratios else float('nan'):.2f}x | "
                  f"{np.mean([row['psnr'] for row in passing]):.1f} | {min(row['worst'] for row in passing):.1f} | "
                  f"{np.mean([row['renderings'] for row in passing]):.0f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to average over (default: 0 1 2)"
    )
    parser.add_argument("--gates", type=float, nargs="+", default=[35.0, 30.0], help="minimum mean PSNR in dB")
    parser.add_argument("--tune-prompts", type=int, default=8, help="per seed (default: 8)")
    parser.add_argument("--eval-prompts", type=int, default=16, help="per seed (default: 16)")
    parser.add_argument(
        "--worst", type=float, default=28.0, help="minimum PSNR in dB of each prompt, at gates from 35 dB"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to use (default: 1)")
    parser.add_argument("--workers", type=int, default=1, help="parallel processes (default: 1)")
    parser.add_argument("--output", type=Path, required=True, help="folder for results, logs and cached videos")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "ablation"], default=[*METHODS, "ablation"])
    parser.add_argument("--part", choices=[*METHODS, "ablation"], help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.part:
        part(options)
        return
    assert len(load_prompts(demo_config({}).tune.prompt_file, None)) >= 16
    launch(options)
    table(options)


if __name__ == "__main__":
    main()
