"""The command `sparsetune`: its subcommands, loaded when they are used."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click
from click.exceptions import NoSuchCommand

from sparsetune.cli.colour import colour_wanted
from sparsetune.cli.failures import Session, exit_status
from sparsetune.cli.output_options import output_options

# The one-line helps stand here so that `sparsetune --help` imports no command.
COMMANDS = {
    "tune": "Search thresholds for a model; leave the best as a checkpoint.",
    "eval": "Render prompts dense and sparse, and judge the difference.",
    "compare": "Set two evaluations side by side.",
    "report": "Write an evaluation or a tuning as one HTML file.",
    "runs": "List the recorded runs, the best first.",
    "review": "Record a person's look at a run's videos.",
    "promote": "Let a run's checkpoint serve, if it may.",
    "rollback": "Let the checkpoint before the last promotion serve again.",
    "metrics": "Compare existing videos, with no model.",
    "bench": "Time sparse attention on this machine; find the break-even.",
    "generate": "Render one prompt, dense or sparse.",
    "models": "List the packaged models, or show one.",
    "checkpoint": "Show, convert, verify or compare tuned checkpoints.",
    "ui": "Open the MLflow UI on the recorded runs.",
    "sync": "Upload runs recorded while the server was down.",
    "doctor": "Say what this machine can do, and what it lacks.",
    "cache": "List or clear the dense baselines.",
}


class LazyGroup(click.Group):
    """Loads a command's module when the command is used, and turns errors into one line and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Give the names in the order of their use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import `sparsetune.cli.NAME` and give its `command`."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"sparsetune.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without loading them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit with its status: 0, 1 failure, 2 usage, 3 gate not met, 130 Ctrl-C."""
        session = Session()
        try:
            status = super().main(args, prog_name, complete_var, standalone_mode=False, obj=session, **extra)
        except (Exception, KeyboardInterrupt) as error:
            sys.exit(exit_status(error, session))
        sys.exit(status if isinstance(status, int) else 0)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; an unknown one is told with the nearest known."""
        try:
            return super().resolve_command(ctx, args)
        except NoSuchCommand:
            raise NoSuchCommand(args[0], possibilities=COMMANDS, ctx=ctx) from None


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        from sparsetune import __version__

        click.echo(f"sparsetune {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show tracebacks and what the libraries underneath say. [default: off]")
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Print the version")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """Tune sparse attention for video diffusion models, and measure what it does to the videos.

    \b
    Examples:
      sparsetune tune --model demo
      sparsetune eval --model demo --use-tuned
      sparsetune COMMAND --help
    """
    ctx.color = colour_wanted()
    session = ctx.ensure_object(Session)
    session.debug = session.debug or debug


main.params += output_options()
