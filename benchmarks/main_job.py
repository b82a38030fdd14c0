"""The main job with fixed prompts and seeds, as one JSON and one Markdown row of docs/benchmarks.md.

    python benchmarks/main_job.py --model cogvideox-2b      (or: make figures MODEL=cogvideox-2b)

Tunes the model as its packaged configuration says and evaluates the winner; the environment's settings don't count.
What `--set` or `--random-weights` change is in the row. It writes OUTPUT/figures.json and OUTPUT/figures.md: whoever
has a GPU and the weights can send both, with a pull request that adds the row to the table.
"""

import argparse
from pathlib import Path
from typing import Any

from sparsetune.checkpoint.manifest import git_commit, utc_now, versions
from sparsetune.config import Config, resolve
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.files import write_json, write_text
from sparsetune.notebook import tune
from sparsetune.tuning.events import TuningResult

COLUMNS = (
    "model", "frames × size, steps", "GPU", "torch, diffusers, commit", "trials, time by phase", "sparsity, blocks run",
    "denoising, s: dense / sparse", "times as fast (95% interval)", "PSNR mean / worst, dB", "gate",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|\n"
VERSIONS = ("python", "torch", "diffusers", "transformers", "triton", "spas-sage-attn", "sparsetune")


def figures(config: Config, result: TuningResult, changed: list[str]) -> dict[str, Any]:
    """Return all that a row needs, as JSON values; `tuned` is null where no policy won, with the reason."""
    judged = result.before if result.evaluation is None else result.evaluation
    installed, size = versions(), config.generation
    return {
        "schema_version": 1,
        "created": utc_now(),
        "model": config.model.name,
        "source": config.model.source,
        "revision": config.model.revision,
        "random_weights": config.model.random_weights,
        "changed": changed,
        "num_frames": size.num_frames,
        "height": size.height,
        "width": size.width,
        "num_inference_steps": size.num_inference_steps,
        "seeds": {"tune": config.tune.seed, "eval": config.eval.seed},
        "device": None if judged is None else judged.environment.device_name,
        "backend": None if judged is None else judged.config.backend,
        "commit": git_commit(),
        "versions": {name: installed[name] for name in VERSIONS if name in installed},
        "num_trials": len(result.trials),
        "seconds": result.seconds,
        "seconds_by_phase": dict(result.seconds_by_phase),
        "tuned": None if result.evaluation is None else quality(result.evaluation),
        "defaults": None if result.before is None else quality(result.before),
        "reason": None if result.best is not None else result.dense_because or "no trial meets the gate",
    }


def quality(result: EvaluationResult) -> dict[str, Any]:
    """Sparsity, quality, and seconds of the denoising, which are null where the kernel computes every pair."""
    psnr, seconds = result.statistics.get("psnr"), result.seconds
    return {
        "sparsity": result.sparsity.overall,
        "blocks_run": result.sparsity.blocks_run,
        "policy": result.config.policy.digest,
        "cache": result.config.policy.cache,
        "seconds": None if seconds is None else seconds.model_dump(mode="json"),
        "psnr": None if psnr is None else psnr.mean,
        "psnr_worst": None if psnr is None else psnr.min,
        "means": {name: one.mean for name, one in result.statistics.items()},
        "score": result.overall_score,
        "gate": result.gate.passed,
        "num_prompts": result.config.num_prompts,
    }


def row(found: dict[str, Any]) -> str:
    """Format figures as a row below `HEAD`."""
    tuned, installed = found["tuned"] or {}, found["versions"]
    seconds = tuned.get("seconds") or {}
    weights = "" if found["random_weights"] == "no" else f", {found['random_weights']} random weights"
    changed = f", {' '.join(f'`{one}`' for one in found['changed'])}" if found["changed"] else ""
    phases = ", ".join(f"{phase} {clock(value)}" for phase, value in found["seconds_by_phase"].items())
    commit = found["commit"] or "no checkout"
    commit = f"{commit[:7]}{'-dirty' if commit.endswith('-dirty') else ''}" if found["commit"] else commit
    interval = "-"
    if seconds:
        ends = [seconds["ci95_low"], seconds["ci95_high"]]
        interval = f"{seconds['speedup']:.2f}" + ("" if None in ends else f" ({ends[0]:.2f} to {ends[1]:.2f})")
    cells = (
        f"{found['model']}{weights}{changed}",
        f"{found['num_frames']} × {found['height']} × {found['width']}, {found['num_inference_steps']}",
        f"{found['device'] or '-'}, {found['backend'] or '-'}",
        f"{installed.get('torch')}, {installed.get('diffusers')}, {commit}",
        f"{found['num_trials']}, {phases}",
        f"{number(tuned.get('sparsity'), '.3f')}, {number(tuned.get('blocks_run'), '.2f')}",
        f"{number(seconds.get('dense'), '.2f')} / {number(seconds.get('sparse'), '.2f')}",
        interval,
        f"{number(tuned.get('psnr'), '.1f')} / {number(tuned.get('psnr_worst'), '.1f')}",
        found["reason"] or ("met" if tuned.get("gate") else "missed"),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def main(arguments: list[str] | None = None) -> None:
    """Run the job and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--random-weights", choices=("no", "full", "tiny"), default="no")
    parser.add_argument("--output", type=Path, help="default: results/MODEL/figures")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    config = resolve(
        None, options.set, {}, {"model.source": options.model, "model.random_weights": options.random_weights}
    )
    output = options.output or config.model.results_folder / "figures"
    result = tune(config, output_dir=output)
    found = figures(config, result, options.set)
    write_json(output / "figures.json", found)
    write_text(output / "figures.md", row(found))
    print(f"{HEAD}{row(found)}\n{output / 'figures.json'} and {output / 'figures.md'}: please send both")


if __name__ == "__main__":
    main()
