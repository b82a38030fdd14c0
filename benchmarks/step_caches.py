"""Best sparsity alone, best step cache alone and both together at a PSNR gate on eval prompts, on the demo model.

    python benchmarks/step_caches.py --steps 4 6 8 10 20 50 --seeds 0 1 2 --output caches [--workers 8] [--device cuda]

Each way's result is the policy that computes the fewest attention pairs, of a dense generation's, among those tried
that meet the gate on the eval prompts. Sparsity is the search's own allocation with a bisected error budget; a cache is
every setting of the search's ladder with two shares of first steps; both is that allocation bisected under each of
the cheapest caches that meet the gate on the tune prompts. Videos are compared with dense ones of as many steps.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from frontier import NEAR_DB, Setup, bisected, open_setup

from sparsetune.attention.policy import Policy
from sparsetune.attention.step_cache import StepCache
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.executor import run_one
from sparsetune.files import write_json
from sparsetune.tuning.calibration.bounded_policy import DENSE
from sparsetune.tuning.calibration.step_caches import ProbeCaches
from sparsetune.tuning.events import TrialResult
from sparsetune.tuning.prepare import prepare
from sparsetune.tuning.search.allocation import allocate
from sparsetune.tuning.search.caches import LADDERS, CacheSpace
from sparsetune.tuning.search.candidates import CandidateTable
from sparsetune.tuning.search.objective import PRUNE_BELOW_GATE_DB
from sparsetune.tuning.search.space import BUDGETS, STEEPNESS

FIRST = (0.1, 0.3)
BISECTIONS = 5
NUM_UNDER_CACHES = 2
"""Caches under which sparsity is tried."""

Tried = list[tuple[Policy, TrialResult]]


def pairs(result: TrialResult) -> float:
    """Attention pairs computed, as a fraction of a dense generation's."""
    return mean(prompt.attention_computed or 0.0 for prompt in result.prompts)


def ladders(options: argparse.Namespace, seed: int, steps: int) -> None:
    changes = {"generation.num_inference_steps": steps, "tune.caches": options.caches}
    setup = open_setup(options, seed, changes)
    dense = Policy.uniform(setup.layers, DENSE["cdf"])
    print("| steps | cache | blocks run | PSNR, dB | worst, dB |\n| --- | --- | --- | --- | --- |")
    for cache in caches(setup, (None,)):
        result = setup.eval_runner.run(0, {}, replace(dense, cache=cache))
        print(
            f"| {steps} | {cache} | {result.blocks_run:.2f} | {result.psnr:.1f} | {result.psnr_worst:.1f} |", flush=True
        )


def caches(setup: Setup, first: Sequence[float | None] = FIRST) -> Iterator[StepCache]:
    """Yield every rung of the caches that work, with each share of first steps; None is the search's own."""
    context = setup.context
    task = ProbeCaches(context.prompts[0], context.config.tune.seed, context.cache_kinds, context.config.backend)
    found = run_one(context.executor, task)
    space = CacheSpace(found.kinds, context.config.generation.num_inference_steps, found.ratios)
    for kind, share in itertools.product(found.kinds, first):
        for rung in range(len(LADDERS[kind])):
            cache = space.cache(space.rung(kind, rung) | ({} if share is None else {"cache_first": share}))
            assert cache is not None
            yield cache


def best(setup: Setup, tried: Tried) -> dict[str, object]:
    """Return the figures of the cheapest policy that meets the gate on the eval prompts."""
    gate = setup.context.gate
    near = [each for each in tried if each[1].state == "complete" and (each[1].psnr or 0.0) > gate.min_psnr - NEAR_DB]
    for policy, _ in sorted(near, key=lambda each: pairs(each[1])):
        result = setup.on_eval(policy)
        worst = gate.min_psnr_worst or 0.0
        if result.state == "complete" and (result.psnr or 0.0) >= gate.min_psnr and (result.psnr_worst or 0.0) >= worst:
            return {"pairs": pairs(result), "blocks": result.blocks_run, "psnr": result.psnr,
                    "worst": result.psnr_worst, "cache": str(policy.cache)}  # fmt: skip
    return {"pairs": None}


def part(options: argparse.Namespace, seed: int, steps: int) -> None:
    changes = {"generation.num_inference_steps": steps, "tune.caches": options.caches}
    setup = open_setup(options, seed, changes).at(options, options.gates[0])
    started, rows = time.perf_counter(), []

    def add(way: str, tried: Tried) -> None:
        rows.append({"way": way, "seed": seed, "steps": steps} | best(setup, tried) | {"tried": len(tried)})
        rows[-1]["seconds"] = time.perf_counter() - started
        write_json(options.output / f"rows-{steps}-{seed}.json", rows)

    prepared = prepare(setup.context)
    candidates = CandidateTable(prepared.curves, prepared.sensitivity)

    def allocated(cache: StepCache | None) -> Callable[[float], Policy]:
        return lambda budget: replace(allocate(candidates, budget, steepness=STEEPNESS), cache=cache)

    lowest = setup.context.search_gate.min_psnr - PRUNE_BELOW_GATE_DB

    def hopeless(results: Sequence[PromptResult]) -> str | None:
        return "far below the gate" if results[-1].metrics["psnr"] < lowest else None

    def bisected_under(cache: StepCache | None) -> Tried:
        return [*bisected(setup, allocated(cache), *BUDGETS, BISECTIONS, hopeless).tried]

    sparse = bisected_under(None)
    add("sparsity", sparse)
    dense = Policy.uniform(setup.layers, DENSE["cdf"])
    cached = [setup.on_tune(replace(dense, cache=cache), hopeless) for cache in caches(setup)]
    for kind in LADDERS:
        if of_kind := [each for each in cached if each[0].cache is not None and each[0].cache.kind == kind]:
            add(kind, of_kind)
    cheap = sorted((each for each in cached if setup.passes(each[1])), key=lambda each: pairs(each[1]))
    both: Tried = []
    for policy, _ in cheap[:NUM_UNDER_CACHES]:
        both += bisected_under(policy.cache)
    add("both", [*both, *sparse, *cached])


def launch(options: argparse.Namespace) -> None:
    running: list[subprocess.Popen[bytes]] = []
    for steps, seed in itertools.product(options.steps, options.seeds):
        while sum(process.poll() is None for process in running) >= options.workers:
            time.sleep(0.5)
        command = [sys.executable, __file__, "--part", "--steps", str(steps), "--seeds", str(seed),
                   "--gates", str(options.gates[0]), "--worst", str(options.worst), "--device", options.device,
                   "--tune-prompts", str(options.tune_prompts), "--eval-prompts", str(options.eval_prompts),
                   "--caches", *options.caches,
                   "--output", str(options.output)]  # fmt: skip
        with (options.output / f"log-{steps}-{seed}.txt").open("w") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log))
    for process in running:
        process.wait()


def table(options: argparse.Namespace) -> None:
    rows = [row for path in sorted(options.output.glob("rows-*.json")) for row in json.loads(path.read_text())]
    columns = (
        "steps",
        "way",
        "attention pairs (by seed)",
        "mean",
        "blocks run",
        "PSNR, dB",
        "worst, dB",
        "first cache",
    )
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    for steps, way in itertools.product(sorted(options.steps), ("sparsity", *LADDERS, "both")):
        mine = sorted((row for row in rows if (row["steps"], row["way"]) == (steps, way)), key=lambda row: row["seed"])
        passed = [row for row in mine if row["pairs"] is not None]
        each = ", ".join("-" if row["pairs"] is None else f"{row['pairs']:.2f}" for row in mine)
        if not passed:
            print(f"| {steps} | {way} | {each or 'not measured'} | | | | | |")
            continue
        figures = [f"{mean(row[name] for row in passed):.2f}" for name in ("pairs", "blocks")]
        psnr = f"{mean(row['psnr'] for row in passed):.1f} | {min(row['worst'] for row in passed):.1f}"
        print(f"| {steps} | {way} | {each} | {' | '.join(figures)} | {psnr} | {passed[0]['cache']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50], help="numbers of denoising steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to average over")
    parser.add_argument("--gates", type=float, nargs=1, default=[35.0], help="minimum mean PSNR in dB")
    parser.add_argument("--worst", type=float, default=28.0, help="minimum PSNR in dB of each prompt")
    parser.add_argument("--tune-prompts", type=int, default=4, help="per seed")
    parser.add_argument("--eval-prompts", type=int, default=8, help="per seed")
    parser.add_argument("--caches", nargs="+", default=["auto"], help="kinds of cache, as for tune (default: auto)")
    parser.add_argument("--ladders", action="store_true", help="print every rung of a cache, on the eval prompts alone")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=1, help="parallel processes")
    parser.add_argument("--output", type=Path, required=True, help="folder for results, logs and cached videos")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.ladders:
        for steps, seed in itertools.product(options.steps, options.seeds):
            ladders(options, seed, steps)
        return
    if options.part:
        part(options, options.seeds[0], options.steps[0])
        return
    launch(options)
    table(options)


if __name__ == "__main__":
    main()
