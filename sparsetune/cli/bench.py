"""`sparsetune bench`: latency of dense and sparse attention on this machine."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsetune.cli import options
from sparsetune.cli.console import current_log, log_loading, print_json
from sparsetune.cli.main import Command

if TYPE_CHECKING:
    from sparsetune.attention.breakeven import BreakEvenTable
    from sparsetune.bench.step_time import StepTimes


@click.command(cls=Command, name="bench", shows_progress=True)
@options.config_options
@click.option("--e2e", is_flag=True, help="Also time whole denoising steps, at fixed sparsities.  [default: off]")
@click.option(
    "--repeats",
    default=10,
    type=click.IntRange(1),
    help="Repetitions of each timing; the median is reported.  [default: 10]",
)
@options.output_option("File of the break-even table.  [default: results/MODEL/break-even.json]")
@options.json_option("the figures")
@options.generation_options
@options.model_options
@click.pass_context
def command(ctx: click.Context, e2e: bool, repeats: int, output: Path | None, as_json: bool) -> None:
    """Time dense and sparse attention for the model's own shapes, and find the sparsity from which sparse is faster.

    Pass the written table to `eval` and `generate` as --break-even: layers that would not gain then run dense. With
    --e2e it also times whole steps, which bounds the speed-up of any policy.

    \b
    Examples:
      sparsetune bench --model demo
      sparsetune bench --model cogvideox-2b --random-weights --e2e
      sparsetune eval --use-tuned --break-even results/demo/break-even.json
    """
    from sparsetune.attention.backends import backend_choice
    from sparsetune.attention.breakeven import save_table
    from sparsetune.bench.break_even import backends_to_time, time_table
    from sparsetune.bench.step import capture_step
    from sparsetune.bench.step_time import StepTime, time_step
    from sparsetune.models.generation import Renderer
    from sparsetune.models.loading import load_pipeline
    from sparsetune.models.prompts import load_prompts

    config = options.build_config(ctx)
    log_loading(config.model.source)
    loaded = load_pipeline(config.model)
    choice = backend_choice(config.backend, loaded.device)
    prompt = load_prompts(config.eval.prompt_file, 1)[0]
    step = capture_step(Renderer(loaded, config.generation), prompt, config.eval.seed)
    shapes = step.shapes()

    def log_time(name: str, milliseconds: float) -> None:
        current_log().event("timing", f"  {name}: {milliseconds:.2f} ms", name=name, milliseconds=milliseconds)

    def log_step(row: StepTime) -> None:
        log_time(f"step, {row.name}", row.ms)

    backends = backends_to_time(config.backend, loaded.device)
    table = time_table(tuple(shapes), backends, loaded.device, repeats=repeats, on_time=log_time)
    times = None
    if e2e:
        times = time_step(step, choice.backend, loaded.device, ordered=True, repeats=repeats, on_time=log_step)
    path = output or config.model.results_folder / "break-even.json"
    save_table(table, path)
    if as_json:
        print_json(_figures(table, choice.backend.name, choice.reason, times))
        return
    _print_table(table, list(shapes.values()))
    if times is not None:
        _print_steps(times)
    click.echo(f"backend {choice.backend.name} ({choice.reason})")
    if loaded.device.type != "cuda":
        click.echo("warning: times of the plain PyTorch reference on a CPU; they do not predict GPU kernels")
    click.echo(f"break-even table: {path}")


def _print_table(table: "BreakEvenTable", calls: list[int]) -> None:
    from sparsetune.cli.tables import print_table

    for shape, count in zip(table.shapes, calls, strict=True):
        size = f"{shape.batch} x {shape.heads} heads x {shape.tokens} tokens x {shape.head_dim}"
        click.echo(f"{table.device}: {size}, {shape.dtype}, {count} calls a step")
        sdpa = shape.dense_ms["sdpa"]
        rows = [[f"dense {name}", "-", f"{ms:.3f}", f"{sdpa / ms:.2f}x"] for name, ms in shape.dense_ms.items()]
        for one in sorted(shape.sparse, key=lambda one: (one.kernel, one.sparsity)):
            ratio = f"{sdpa / one.latency_ms:.2f}x"
            rows.append([f"{one.kernel} {one.rule}", f"{one.sparsity:.3f}", f"{one.latency_ms:.3f}", ratio])
        print_table((("kernel", "sparsity", "ms", "against dense"), rows))
        for kernel in shape.kernels:
            limit = shape.break_even(kernel)
            click.echo(f"{kernel}: {'never faster' if limit is None else f'faster from sparsity {limit:.3f}'}")
        click.echo()


def _print_steps(times: "StepTimes") -> None:
    from sparsetune.cli.tables import number_text, print_table

    rows = []
    for row in times.rows:
        extremes, ratio = f"{row.fastest_ms:.1f} .. {row.slowest_ms:.1f}", f"{times.dense.ms / row.ms:.2f}x"
        peak = number_text(row.peak_gib, ".2f")
        rows.append([row.name, f"{row.sparsity:.3f}", f"{row.ms:.1f}", extremes, ratio, peak])
    print_table((("one denoising step", "sparsity", "ms", "range", "speed-up", "peak GiB"), rows))
    click.echo(
        f"self-attention is {times.attention_share:.1%} of a dense step: the maximum speed-up of any sparse attention "
        f"is {times.ceiling:.2f}x"
    )
    for reason, count in times.fallbacks.items():
        click.echo(f"fell back to dense: {count} calls, {reason}")
    click.echo()


def _figures(table: "BreakEvenTable", backend: str, reason: str, times: "StepTimes | None") -> dict[str, Any]:
    shapes = [
        shape.model_dump(mode="json") | {"break_even": {kernel: shape.break_even(kernel) for kernel in shape.kernels}}
        for shape in table.shapes
    ]
    figures = table.model_dump(mode="json") | {"shapes": shapes, "backend": {"name": backend, "reason": reason}}
    if times is not None:
        figures["step"] = {
            "rows": [asdict(row) for row in times.rows],
            "attention_share": times.attention_share,
            "ceiling": times.ceiling,
            "fallbacks": times.fallbacks,
        }
    return figures
