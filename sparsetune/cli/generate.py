"""`sparsetune generate`: one prompt rendered to a video file."""

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsetune.cli import options
from sparsetune.cli.console import current_log, log_loading, log_note, only_results_on_stdout
from sparsetune.cli.main import Command

if TYPE_CHECKING:
    from sparsetune.checkpoint import Checkpoint
    from sparsetune.config import Config
    from sparsetune.models.generation import Frames
    from sparsetune.models.prompts import Prompt


@click.command(cls=Command, name="generate", shows_progress=True)
@click.argument("prompt")
@options.config_options
@click.option("--use-tuned", is_flag=True, help="Render with results/MODEL/checkpoint.  [default: off, dense]")
@options.checkpoint_option("render with", "none, dense")
@options.sparsity_option
@click.option("--dense", is_flag=True, help="Render dense regardless of a checkpoint, for comparison.  [default: off]")
@options.output_option("Video file to write.  [default: results/MODEL/generated.mp4]")
@click.option(
    "--image",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Image that an image-to-video model starts from.  [default: none]",
)
@options.setting("eval.seed", "--seed", help="Seed of the video")
@options.generation_options
@options.model_options
@options.setting("break_even")
@click.pass_context
def command(
    ctx: click.Context,
    prompt: str,
    use_tuned: bool,
    checkpoint: str | None,
    sparsity: float | None,
    dense: bool,
    output: Path | None,
    image: Path | None,
) -> None:
    """Render PROMPT to a video file, dense or with a tuned checkpoint.

    \b
    Examples:
      sparsetune generate "a red circle moving right over a grey background"
      sparsetune generate "a panda eats bamboo" --model cogvideox-2b --use-tuned -o panda.mp4
      sparsetune generate "a panda eats bamboo" --checkpoint models:/cogvideox-2b-sparse@champion --dense
    """
    from sparsetune.models.prompts import Prompt

    described = Prompt(prompt, image)
    config = options.build_config(ctx)
    target = output or config.model.results_folder / "generated.mp4"
    checkpoint = None if dense else options.local_checkpoint(checkpoint, config, use_tuned)
    options.check_inputs(config, checkpoint=checkpoint)
    from sparsetune.cli.tables import clock_text
    from sparsetune.video import write_video

    tuned = None if dense else options.at_sparsity(checkpoint, sparsity)
    frames, seconds, sparsity = _render(config, described, tuned)
    write_video(target, frames, config.generation.fps)
    how = "dense" if sparsity is None else f"at sparsity {sparsity:.3f}"
    log_note(f"rendered {how} in {clock_text(seconds)}")
    click.echo(target)


def _render(
    config: "Config", prompt: "Prompt", checkpoint: "Checkpoint | str | None"
) -> "tuple[Frames, float, float | None]":
    from sparsetune.checkpoint import load_checkpoint
    from sparsetune.cli.progress import ProgressDisplay
    from sparsetune.models.generation import Renderer
    from sparsetune.models.loading import load_pipeline
    from sparsetune.models.sparsify import sparsify

    with only_results_on_stdout(), contextlib.ExitStack() as stack:
        log_loading(config.model.source)
        renderer = Renderer(load_pipeline(config.model), config.generation)
        handle = None
        if checkpoint is not None:
            loaded = load_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
            handle = stack.enter_context(sparsify(renderer.loaded.pipe, loaded, config.backend, config.break_even))
        progress = ProgressDisplay(current_log(), f"generate {config.model.name}", {"render": ""})
        stack.enter_context(contextlib.closing(progress))
        progress.start_phase("render", config.generation.num_inference_steps)
        progress.start()
        rendering = renderer.render(prompt, config.eval.seed, functools.partial(progress.on_progress, "render"))
        return rendering.frames, rendering.seconds, None if handle is None else handle.stats().sparsity
