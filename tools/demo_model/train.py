"""Command line for training the demo model: vae, transformer, score, export."""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .build import save_pipeline
from .loop import Budget
from .sampling import contact_sheet, load_model, sample, score
from .transformer import TransformerRecipe, load_pipeline, train_transformer
from .vae import VaeRecipe, train_vae
from .world import held_out_scenes

MAX_BYTES = 16_000_000


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("vae", "transformer"):
        command = commands.add_parser(name, help=f"train the {name}; resumes from --checkpoint")
        command.add_argument("--checkpoint", type=Path, required=True, help="folder of the training's state")
        command.add_argument("--minutes", type=float, required=True, help="time limit of this run, including set-up")
        command.add_argument(
            "--start",
            type=float,
            default=0.0,
            help="progress of the complete training at the start, 0 to 1 (default: 0)",
        )
        command.add_argument(
            "--end",
            type=float,
            default=1.0,
            help="progress at the end; at 1 the learning rate has decayed (default: 1)",
        )
        command.add_argument("--batch", type=int, help="clips per step")
        command.add_argument("--pool", type=int, help="clips in memory from which batches are drawn")
    scoring = commands.add_parser("score", help="render the held-out captions and recognize the attributes")
    scoring.add_argument("--steps", type=int, nargs="+", default=[10, 20], help="denoising steps")
    scoring.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.5], help="guidance scales")
    scoring.add_argument("--seed", type=int, default=0, help="seed of the first video's noise")
    scoring.add_argument("--limit", type=int, default=48, help="held-out captions to render")
    scoring.add_argument("--out", type=Path, required=True, help="folder for scores.json and contact sheets")
    source = scoring.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="folder of the training's state")
    source.add_argument("--model", type=Path, help="folder of an exported model")
    export = commands.add_parser("export", help="write the EMA weights in the Hub's folder layout")
    export.add_argument("--checkpoint", type=Path, required=True, help="folder of the training's state")
    export.add_argument(
        "--out", type=Path, required=True, help="folder of the model; replaced once the new one is complete"
    )
    return parser.parse_args(arguments)


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train the VAE or the transformer."""
    budget = Budget(options.minutes * 60, options.start, options.end)
    overrides = {key: getattr(options, key) for key in ("batch", "pool") if getattr(options, key)}
    if options.command == "vae":
        train_vae(options.checkpoint, budget, VaeRecipe(**overrides), device)
    else:
        train_transformer(options.checkpoint, budget, TransformerRecipe(**overrides), device)


def score_held_out(options: argparse.Namespace, device: torch.device) -> None:
    """Render and score the held-out captions for every pair of steps and guidance."""
    if options.model:
        pipeline = load_model(options.model).to(device)
    else:
        pipeline = load_pipeline(options.checkpoint, averaged=True, device=device)
    scenes = held_out_scenes()[: options.limit]
    captions = [scene.caption() for scene in scenes]
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for steps in options.steps:
        for guidance in options.guidance:
            videos = sample(pipeline, captions, steps, guidance, options.seed)
            rates, readings = score(videos, scenes)
            misread = [f"{c} | read: {r}" for c, r, s in zip(captions, readings, scenes, strict=True) if not r.shows(s)]
            results.append({"steps": steps, "guidance": guidance, **asdict(rates), "misread": misread})
            contact_sheet(videos, captions, options.out / f"held-out-{steps}-{guidance}.png")
            print({key: value for key, value in results[-1].items() if key != "misread"}, flush=True)
    (options.out / "scores.json").write_text(json.dumps(results, indent=2) + "\n")


def export(options: argparse.Namespace) -> None:
    """Write the model to a temporary folder, then replace the target; keep its README.md."""
    pipeline = load_pipeline(options.checkpoint, averaged=True, device=torch.device("cpu"))
    fresh = options.out.with_name(options.out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    num_bytes = save_pipeline(pipeline, fresh)
    if (options.out / "README.md").exists():
        shutil.copy(options.out / "README.md", fresh)
    if num_bytes > MAX_BYTES:
        raise SystemExit(
            f"the model must have at most {MAX_BYTES} bytes, got {num_bytes}; reduce the sizes in build.py"
        )
    for path in fresh.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.rmtree(options.out, ignore_errors=True)
    fresh.rename(options.out)
    print(f"{options.out}: {num_bytes / 1e6:.2f} MB")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = options.command in ("vae", "transformer")
    torch.set_float32_matmul_precision("high")
    if options.command == "score":
        score_held_out(options, device)
    elif options.command == "export":
        export(options)
    else:
        train(options, device)


if __name__ == "__main__":
    main()
