"""How much sparsity each way of choosing thresholds reaches at a given PSNR on eval prompts, on the demo model.

    python benchmarks/frontier.py --seeds 0 1 2 --gates 35 30 --output frontier [--workers 3] [--device cuda --gpus 2]

Every method spends at most as many renderings as the grid (20 pairs times the tune prompts), probes counted in; dense
videos are shared. Of what a method tried, the sparsest policy counts whose eval prompts, which it never saw, hold
the gate; those that came near it on tune prompts are judged, the sparsest first. The searches spend the last four
trials' worth on less sparsity than their best, as much as a margin above the gate would leave: a grid has such pairs
anyway. The ablation bisects one number per variant, at the first gate.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from sparsetune.tuning.search.allocation import CandidateTable, allocate, best_order
from sparsetune.tuning.search.objective import METRICS, TrialRunner
from sparsetune.tuning.search.ranking import shortfalls
from sparsetune.tuning.search.space import NUM_GROUPS, STEEPNESS
from sparsetune.tuning.tune import search_policy

SIMS, CDFS = (-1.0, 0.0, 0.3, 0.6, 0.8), (0.9, 0.95, 0.98, 0.99)
MARGIN_DB = 0.0
NEAR_DB = 3.0
STEPS_DOWN = (0.96, 0.92, 0.86, 0.8)
HIGH_DB = 45.0
"""No sparse video of a prompt at the edge of the gate was seen above this."""
MANY_TRIALS = 60
BISECTIONS = 6
PROBE_PROMPTS = 4
WORST_FROM = 35.0
ABLATION_PARTS = 13


@dataclass(frozen=True)
class Tries:
    """What a method tried: policies with their results on the tune prompts, and renderings spent on anything else."""

    tried: tuple[tuple[Policy, TrialResult], ...]
    extra: int = 0

    @property
    def renderings(self) -> int:
        return self.extra + sum(len(result.prompts) for _, result in self.tried)


@dataclass
class Spender(TuningListener):
    """Ends a search, as Ctrl-C does, where another trial might take more renderings in all; keeps what trials were."""

    renderings: int
    prompts: int
    tried: list[tuple[Policy, TrialResult]] = field(default_factory=list)

    def on_trial(self, result: TrialResult) -> None:
        self.tried.append((result.policy, result))
        if Tries(tuple(self.tried)).renderings > self.renderings - self.prompts:
            raise KeyboardInterrupt


@dataclass
class Field:
    """One seed's prompts and a gate, and how policies are judged on the tune and on the eval prompts, once each."""

    bench: TuningContext
    tune: TrialRunner
    judge: TrialRunner
    tuned: dict[Policy, TrialResult] = field(default_factory=dict)
    judged: dict[Policy, TrialResult] = field(default_factory=dict)

    @property
    def layers(self) -> list[tuple[str, int]]:
        return [(name, heads) for name, heads, _ in self.bench.renderer.loaded.identity.layers]

    def at(self, options: argparse.Namespace, gate: float) -> "Field":
        """The same prompts under another gate."""
        worst = options.worst if gate >= WORST_FROM else None
        bench = replace(self.bench, gate=replace(self.bench.gate, min_psnr=gate, min_psnr_worst=worst))
        return replace(self, bench=bench)

    def on_tune(self, policy: Policy) -> tuple[Policy, TrialResult]:
        if policy not in self.tuned:
            self.tuned[policy] = self.tune.run(len(self.tuned), {}, policy)
        return policy, self.tuned[policy]

    def passes(self, result: TrialResult) -> bool:
        """Whether a policy's tune prompts meet the gate that the search asks."""
        return all(missing <= 0 for missing in shortfalls(result.prompts, self.bench.search_gate).values())

    def on_eval(self, policy: Policy) -> TrialResult:
        """Judge a policy; it is given up at the first prompt under the bound, or where the mean is out of reach."""
        worst, gate = self.bench.gate.min_psnr_worst, self.bench.gate.min_psnr

        def fails(results: Sequence[PromptResult]) -> str | None:
            if worst is not None and results[-1].metrics["psnr"] < worst:
                return "a prompt under the bound"
            best = sum(each.metrics["psnr"] for each in results) + HIGH_DB * (len(self.judge.prompts) - len(results))
            return "the gate is out of reach" if best < gate * len(self.judge.prompts) else None

        known = self.judged.get(policy)
        if known is None or (known.state == "pruned" and worst is None):
            self.judged[policy] = self.judge.run(len(self.judged), {}, policy, fails)
        return self.judged[policy]


def open_field(options: argparse.Namespace, seed: int, **tune: object) -> Field:
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
        "gate.min_frame_cosine": 0.9,
        "tracking.root": options.output / f"mlruns-{seed}",
        "cache.dir": options.output / "cache",
    }
    config = demo_config(settings | {f"tune.{key}": value for key, value in tune.items()})
    bench = open_context(config, options.output / "out")
    bench = replace(bench, prompts=tuple(bench.prompts[index] for index in order[: options.tune_prompts]))

    def runner(prompts: Sequence[object]) -> TrialRunner:
        return TrialRunner(
            bench.executor, tuple(prompts), functools.partial(bench.score, metrics=METRICS), bench.search_gate
        )

    return Field(bench, runner(bench.prompts), runner(bench.eval_prompts))


def bisected(place: Field, policy_of: Callable[[float], Policy], low: float, high: float) -> Tries:
    """Bisect the logarithm of one number that gives more sparsity and less quality the larger it is."""
    tried = []
    for _ in range(BISECTIONS):
        middle = float(np.sqrt(low * high))
        tried.append(place.on_tune(policy_of(middle)))
        low, high = (middle, high) if place.passes(tried[-1][1]) else (low, middle)
    return Tries(tuple(tried))


def grid(place: Field) -> Tries:
    pairs = [HeadThresholds(sim, cdf) for sim in SIMS for cdf in CDFS]
    return Tries(tuple(place.on_tune(Policy.uniform(place.layers, pair)) for pair in pairs))


def defaults(place: Field) -> Tries:
    return Tries((place.on_tune(default_policy(place.bench.renderer.loaded.pipe)),))


def calibrate(place: Field) -> Tries:
    curves = prepare(place.bench, probe=False).curves
    return bisected(place, lambda bound: bounded_policy(curves, bound), 0.01, 1.0)


def searched(place: Field, seed: int, sampler: str) -> Tries:
    """Search as `sparsetune tune` does, then step down from the best, with as many renderings as the grid has."""
    gate, config, prompts = place.bench.gate.min_psnr, place.bench.config, len(place.bench.prompts)
    probes = PROBE_PROMPTS * (count_phases(config.generation.num_inference_steps) + NUM_GROUPS)
    spender = Spender((len(SIMS) * len(CDFS) - len(STEPS_DOWN)) * prompts - probes, prompts)
    changes = {"sampler": sampler, "n_trials": MANY_TRIALS, "study_name": f"{sampler}-{seed}-{gate:g}"}
    tune = config.tune.model_copy(update=changes)
    bench = replace(place.bench, config=config.model_copy(update={"tune": tune}), listeners=(spender,))
    with contextlib.suppress(KeyboardInterrupt):
        search_policy(bench)
    tried = spender.tried
    complete = [result for _, result in tried if result.state == "complete" and result.sparsity]
    best = max(complete, key=lambda result: (result.feasible, result.sparsity if result.feasible else result.psnr))
    prepared = prepare(bench)
    candidates = CandidateTable(prepared.curves, prepared.sensitivity)
    for step in STEPS_DOWN:
        lower = allocate(candidates, sparsity=step * best.sparsity, steepness=STEEPNESS)
        tried.append(place.on_tune(lower))
    return Tries(tuple(tried), probes)


METHODS: dict[str, Callable[[Field, int], Tries]] = {
    "defaults": lambda place, _: defaults(place),
    "grid": lambda place, _: grid(place),
    "calibrate": lambda place, _: calibrate(place),
    "random": lambda place, seed: searched(place, seed, "random"),
    "optuna": lambda place, seed: searched(place, seed, "tpe"),
}


def reached(place: Field, tries: Tries) -> dict[str, object]:
    """The sparsest of what was tried whose eval prompts hold the gate."""
    gate = place.bench.gate.min_psnr
    complete = [(policy, result) for policy, result in tries.tried if result.state == "complete"]
    near = [(policy, result) for policy, result in complete if (result.psnr or 0.0) >= gate - NEAR_DB]
    for policy, result in sorted(near, key=lambda each: -(each[1].sparsity or 0.0)):
        judged = place.on_eval(policy)
        worst = place.bench.gate.min_psnr_worst
        if judged.state == "complete" and judged.psnr >= gate and (worst is None or judged.psnr_worst >= worst):
            return {"sparsity": judged.sparsity, "psnr": judged.psnr, "worst": judged.psnr_worst,
                    "tune_psnr": result.psnr, "renderings": tries.renderings}  # fmt: skip
    return {"sparsity": None, "psnr": None, "worst": None, "renderings": tries.renderings}


Variant = tuple[str, Callable[[float], Policy], float]


def variants(place: Field, prepared: Prepared, plain: Prepared) -> Iterator[Variant]:
    """Each part of the search alone, all together, and all but one; the number is the drop or the budget."""
    layers, sensitivity = place.layers, prepared.sensitivity
    scale = sensitivity.schedule(0.0, STEEPNESS)
    order = best_order(prepared.curves, place.bench.config.tune.orders, True)

    def pair(**how: object) -> Callable[[float], Policy]:
        return lambda drop: Policy.uniform(layers, HeadThresholds(-1.0, 1.0 - drop), **how)

    def shared(curves: object, **how: object) -> Callable[[float], Policy]:
        candidates = CandidateTable(curves, sensitivity)
        return lambda budget: allocate(candidates, budget, **({"steepness": STEEPNESS} | how))

    yield "one pair, raster", pair(), 0.5
    yield "+ text kept", pair(keep_text=True), 0.5
    yield "+ partial blocks chosen", pair(select_partial=True), 0.5
    yield f"+ order ({order})", pair(order=order), 0.5
    yield "+ steps", pair(schedule=scale), 0.5
    yield "+ budgets by head", shared(plain.curves, orders=("raster",), steepness=0.0), 1.0
    yield "all", shared(prepared.curves), 1.0
    whole = shared(prepared.curves)
    yield "all but text kept", lambda budget: replace(whole(budget), keep_text=False), 1.0
    yield "all but partial blocks", shared(plain.curves), 1.0
    yield "all but orders", shared(prepared.curves, orders=("raster",)), 1.0
    yield f"all but orders by head ({order})", shared(prepared.curves, orders=(order,)), 1.0
    yield "all but steps", shared(prepared.curves, steepness=0.0), 1.0
    yield "all but budgets by head", pair(schedule=scale, order=order, select_partial=True, keep_text=True), 0.5


def part(options: argparse.Namespace) -> None:
    """One seed and method at its gates, or some variants of the ablation at the first; writes its rows as they come."""
    seed, started = options.seeds[0], time.perf_counter()
    rows: list[dict[str, object]] = []
    place = open_field(options, seed)

    def add(name: str, here: Field, tries: Tries) -> None:
        row = {"method": name} | reached(here, tries) | {"seed": seed, "gate": here.bench.gate.min_psnr}
        rows.append(row | {"seconds": time.perf_counter() - started})
        write_json(options.output / f"rows-{options.part}-{seed}-{options.number}.json", rows)

    if options.part in METHODS:
        for here in [place.at(options, gate) for gate in options.gates]:
            add(options.part, here, METHODS[options.part](here, seed))
        return
    here = place.at(options, options.gates[0])
    prepared = prepare(here.bench)
    plain = prepare(open_field(options, seed, select_partial=False).bench, probe=False)
    listed = list(variants(here, prepared, plain))
    for name, policy_of, high in listed[options.number :: ABLATION_PARTS]:
        add(f"ablation: {name}", here, bisected(here, policy_of, 0.002, high))


def launch(options: argparse.Namespace) -> None:
    """Run every part as a process of its own, `workers` at a time, spread over the visible GPUs.

    The grid is rendered once for all gates; the other methods begin anew for each.
    """
    parts: list[tuple[int, str, list[float]]] = []
    for seed in options.seeds:
        for method in options.methods:
            gates = [options.gates[:1]] * ABLATION_PARTS if method == "ablation" else [[gate] for gate in options.gates]
            parts += [(seed, method, each) for each in ([options.gates] if method == "grid" else gates)]
    parts.sort(key=lambda each: ("optuna", "random", "ablation", "grid", "calibrate", "defaults").index(each[1]))
    running: list[subprocess.Popen[bytes]] = []
    for place, (seed, method, gates) in enumerate(parts):
        while sum(process.poll() is None for process in running) >= options.workers:
            time.sleep(0.5)
        number = sum(each[:2] == (seed, method) for each in parts[:place])
        command = [sys.executable, __file__, "--part", method, "--number", str(number), "--seeds", str(seed),
                   "--gates", *map(str, gates), "--output", str(options.output),
                   "--device", options.device, "--worst", str(options.worst),
                   "--tune-prompts", str(options.tune_prompts),
                   "--eval-prompts", str(options.eval_prompts)]  # fmt: skip
        environment = dict(os.environ)
        if options.gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(place % options.gpus)
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
            held = [row for row in mine if row["sparsity"] is not None]
            if not mine:
                continue
            each = ", ".join("-" if row["sparsity"] is None else f"{row['sparsity']:.3f}" for row in mine)
            if not held:
                print(f"| {method} | {each} | - | - | - | - | |")
                continue
            ratios = [row["sparsity"] / grids[row["seed"]] for row in held if grids.get(row["seed"])]
            mean = np.mean([row["sparsity"] for row in held])
            print(f"| {method} | {each} | {mean:.3f} | {np.mean(ratios) if ratios else float('nan'):.2f}x | "
                  f"{np.mean([row['psnr'] for row in held]):.1f} | {min(row['worst'] for row in held):.1f} | "
                  f"{np.mean([row['renderings'] for row in held]):.0f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--gates", type=float, nargs="+", default=[35.0, 30.0])
    parser.add_argument("--tune-prompts", type=int, default=8)
    parser.add_argument("--eval-prompts", type=int, default=16)
    parser.add_argument("--worst", type=float, default=28.0, help="least PSNR of any prompt at gates from 35 dB, in dB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
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
