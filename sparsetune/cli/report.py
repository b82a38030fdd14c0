"""`sparsetune report`: an evaluation or a tuning as one HTML file."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsetune.cli import completion
from sparsetune.cli.main import Command
from sparsetune.cli.options import (
    build_config,
    language_option,
    model_name_option,
    open_store,
    output_option,
    short_name,
    store_options,
)
from sparsetune.files import scratch_folder

if TYPE_CHECKING:
    from sparsetune.report.source import Source


@click.command(cls=Command, name="report")
@click.argument("run", metavar="RUN|FOLDER", shell_complete=completion.run_or_file)
@language_option("the report")
@click.option(
    "--videos",
    type=click.Choice(["embed", "beside"]),
    default="embed",
    help="Embed the videos in the file, or put them beside it, as when it would exceed 25 MB.  [default: embed]",
)
@click.option(
    "--before",
    metavar="OTHER",
    help="Run or folder of the evaluation to compare with; a tuning has its own.  [default: none]",
)
@output_option("The HTML file.  [default: report.html in FOLDER, or report-RUN.html here]")
@click.option(
    "--figures",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also write the figures as PNGs to this folder, with English texts.  [default: none]",
)
@model_name_option("any; matters for `latest` only")
@store_options
@click.pass_context
def command(
    ctx: click.Context,
    run: str,
    lang: str,
    videos: str,
    before: str | None,
    output: Path | None,
    figures: Path | None,
    model: str | None,
) -> None:
    """Write a report with verdict, synchronised players, prompts, heat maps, thresholds, search and environment.

    Its subject is a FOLDER written by `sparsetune eval` or `sparsetune tune`, or a RUN: its id or first characters,
    `latest`, runs:/ID or models:/NAME@ALIAS. The file opens from disk and needs no network.

    \b
    Examples:
      sparsetune report results/demo
      sparsetune report results/demo/after --before results/demo/before --lang zh
      sparsetune report latest --videos beside
    """
    from sparsetune.report.build import build_report, check_extra

    check_extra()
    with scratch_folder() as folder:
        source, path = _source(ctx, run, model, folder / "after")
        if before is not None:
            source = source.beside(_source(ctx, before, model, folder / "before")[0])
        path = output or (path if lang == "en" else path.with_suffix(f".{lang}.html"))
        report = build_report(source, path, "zh" if lang == "zh" else "en", "beside" if videos == "beside" else "embed")
        if figures is not None:
            _write_figures(source, figures)
    if report.note:
        click.echo(f"note: {report.note}", err=True)
    click.echo(f"{report.path} ({report.num_bytes / 1e6:.1f} MB)")


def _source(ctx: click.Context, run: str, model: str | None, folder: Path) -> "tuple[Source, Path]":
    """Return what to report on and the report's default path; a run's files are downloaded to `folder`."""
    from sparsetune.report.source import from_folder
    from sparsetune.tracking.results import is_run

    if is_run(run):
        from sparsetune.tracking.log_report import source_of

        _, client = open_store(build_config(ctx))
        source = source_of(client, run, folder, short_name(model))
        return source, Path(f"report-{source.name}.html")
    path = Path(run)
    return from_folder(path), (path if path.is_dir() else path.parent) / "report.html"


def _write_figures(source: "Source", folder: Path) -> None:
    from sparsetune.report.figures import figures
    from sparsetune.report.pictures import save_pictures
    from sparsetune.report.words import words

    written = save_pictures(figures(source, words("en")), folder)
    click.echo(f"{len(written)} figures: {folder}", err=True)
