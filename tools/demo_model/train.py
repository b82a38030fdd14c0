"""Command line for training the demo model: vae, import, transformer, score, export."""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from .build import save_pipeline
from .checkpoint import State, save_state, save_weights
from .drawing import draw
from .loop import Budget
from .sampling import contact_sheet, load_model, sample, score
from .scenes import SceneSampler
from .transformer import Batch, TransformerRecipe, load_pipeline, train_transformer
from .vae import VaeRecipe, reconstruction_psnr, train_vae
from .world import BASE_SIZE, Size, held_out_scenes

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
            "--from",
            type=float,
            default=0.0,
            dest="start",
            help="progress of the complete training at the start, 0 to 1 (default: 0)",
        )
        command.add_argument(
            "--until",
            type=float,
            default=1.0,
            dest="end",
            help="progress at the end; at 1 the learning rate has decayed (default: 1)",
        )
        command.add_argument("--pool", type=int, help="clips in memory from which batches are drawn")
    commands.choices["vae"].add_argument("--batch", type=int, help="clips per step")
    commands.choices["transformer"].add_argument(
        "--batches",
        type=Batch.parse,
        nargs="+",
        metavar="SIZE:CLIPS[:SHARE]",
        help="clips of each size in a step of one process, e.g. 17x64x64:8 49x240x360:1:0.5, "
        "where half of the steps have the second (default: 17x64x64:96)",
    )
    commands.choices["transformer"].add_argument(
        "--lr-factor", type=float, default=1.0, help="factor on the recipe's learning rates (default: 1)"
    )
    importing = commands.add_parser("import", help="start a checkpoint from an exported model, to train it further")
    importing.add_argument("--model", type=Path, required=True, help="folder of the exported model")
    importing.add_argument("--checkpoint", type=Path, required=True, help="folder of the training's state")
    scoring = commands.add_parser("score", help="render the held-out captions and recognize the attributes")
    scoring.add_argument("--steps", type=int, nargs="+", default=[10, 20], help="denoising steps")
    scoring.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.5], help="guidance scales")
    scoring.add_argument("--seed", type=int, default=0, help="seed of the first video's noise")
    scoring.add_argument("--first", type=int, default=0, help="first held-out caption to render")
    scoring.add_argument("--limit", type=int, default=48, help="held-out captions to render")
    scoring.add_argument("--size", type=Size.parse, default=BASE_SIZE, help="frames x height x width")
    scoring.add_argument("--batch", type=int, default=48, help="videos rendered at once")
    scoring.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all weights")
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
    overrides = {key: getattr(options, key, None) for key in ("batch", "batches", "pool")}
    overrides = {key: value for key, value in overrides.items() if value}
    if options.command == "vae":
        train_vae(options.checkpoint, budget, VaeRecipe(**overrides), device)
    else:
        recipe = TransformerRecipe(**overrides)
        lrs = {"muon_lr": recipe.muon_lr * options.lr_factor, "adam_lr": recipe.adam_lr * options.lr_factor}
        train_transformer(options.checkpoint, budget, replace(recipe, **lrs), device)


def score_held_out(options: argparse.Namespace, device: torch.device) -> None:
    """Render and score the held-out captions for every pair of steps and guidance."""
    if options.model:
        pipeline = load_model(options.model).to(device)
    else:
        pipeline = load_pipeline(options.checkpoint, averaged=True, device=device)
    pipeline.to(dtype=getattr(torch, options.dtype))
    clips = draw(SceneSampler(999).sample(4), device, size=options.size).video.to(pipeline.vae.dtype)
    psnr = reconstruction_psnr(pipeline.vae, clips)
    print(f"VAE: {psnr:.1f} dB on {len(clips)} unseen clips of {options.size}", flush=True)
    scenes = held_out_scenes()[options.first : options.first + options.limit]
    captions = [scene.caption() for scene in scenes]
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for steps in options.steps:
        for guidance in options.guidance:
            seed = options.seed + options.first
            videos = sample(pipeline, captions, steps, guidance, seed, options.size, options.batch)
            rates, readings = score(videos, scenes)
            misread = [f"{c} | read: {r}" for c, r, s in zip(captions, readings, scenes, strict=True) if not r.shows(s)]
            about = {"size": str(options.size), "vae_psnr_db": round(psnr, 2), "steps": steps, "guidance": guidance}
            results.append({**about, **asdict(rates), "misread": misread})
            contact_sheet(videos, captions, options.out / f"held-out-{steps}-{guidance}.png")
            print({key: value for key, value in results[-1].items() if key != "misread"}, flush=True)
    (options.out / "scores.json").write_text(json.dumps(results, indent=2) + "\n")


def import_model(options: argparse.Namespace) -> None:
    """Write the weights of an exported model as those of a checkpoint and as their averages."""
    pipeline = load_model(options.model)
    modules = {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder}
    save_weights(options.checkpoint, "vae-ema", {"vae": pipeline.vae})
    save_weights(options.checkpoint, "transformer", modules)
    save_weights(options.checkpoint, "transformer-ema", modules)
    save_state(options.checkpoint, State(scaling_factor=pipeline.vae.config.scaling_factor))


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
    if "LOCAL_RANK" in os.environ:  # started by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.backends.cudnn.benchmark = options.command in ("vae", "transformer")
    torch.backends.cudnn.benchmark_limit = 3  # algorithms tried for each of the many shapes
    torch.set_float32_matmul_precision("high")
    if options.command == "score":
        score_held_out(options, device)
    elif options.command == "import":
        import_model(options)
    elif options.command == "export":
        export(options)
    else:
        train(options, device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
