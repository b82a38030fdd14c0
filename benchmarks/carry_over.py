"""Predicted and rendered PSNR of a checkpoint's dial, at the settings that it was tuned for and at others.

    python benchmarks/carry_over.py CHECKPOINT --sparsity 0.1 0.2 --at 9x64x64x6 17x64x64x6 --prompts 2

Each setting is FRAMESxHEIGHTxWIDTHxSTEPS. The predictions are of the tune prompts, as is what is rendered with --tune;
else eval prompts are rendered, which the search never saw.
"""

import argparse
import logging
from pathlib import Path

from sparsetune import load_checkpoint, resolve
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.evaluate import evaluate
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import load_pipeline
from sparsetune.models.prompts import load_prompts

NAMES = ("num_frames", "height", "width", "num_inference_steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sparsity", type=float, nargs="+", required=True)
    parser.add_argument("--at", nargs="+", required=True, metavar="FRAMESxHEIGHTxWIDTHxSTEPS")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path("results/carry_over/baselines"))
    args = parser.parse_args()
    logging.getLogger("sparsetune").setLevel(logging.ERROR)  # each policy warns that it wasn't rendered
    config, tuned = resolve(flags={"model.source": args.model}), load_checkpoint(args.checkpoint)
    loaded = load_pipeline(config.model)
    prompts = load_prompts(config.tune.prompt_file if args.tune else config.eval.prompt_file, args.prompts)
    print("| frames × height × width, steps | sparsity predicted / rendered | PSNR predicted / rendered, dB |")
    print("| --- | --- | --- |")
    for setting in args.at:
        sizes = dict(zip(NAMES, map(int, setting.split("x")), strict=True))
        renderer = Renderer(loaded, config.generation.model_copy(update=sizes))
        for sparsity in args.sparsity:
            changed = tuned.with_sparsity(sparsity)
            assert changed.prediction is not None
            cache = BaselineCache(args.cache, config.cache.max_gb)
            result = evaluate(renderer, changed.policy, prompts, cache=cache, metrics=("psnr",), backend=config.backend)
            print(
                f"| {sizes['num_frames']} × {sizes['height']} × {sizes['width']}, {sizes['num_inference_steps']} "
                f"| {changed.prediction.sparsity:.3f} / {result.sparsity.overall:.3f} "
                f"| {changed.prediction.psnr or 0.0:.1f} / {result.statistics['psnr'].mean:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
