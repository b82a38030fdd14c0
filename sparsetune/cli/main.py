"""The command `sparsetune`: subcommands imported on use, errors as one line with an exit status."""

import contextlib
import errno
import sys
import traceback
from collections.abc import Collection
from importlib import import_module
from typing import Any

import click
from click.exceptions import NoSuchCommand

from sparsetune import __version__, signals
from sparsetune.cli.console import GlobalOptions, colour_wanted, global_options, quiet_libraries
from sparsetune.cli.log_schema import SCHEMA_VERSION
from sparsetune.cli.options import HELP_ALL, grouped, help_all_option, output_options
from sparsetune.cli.script_options import translated
from sparsetune.errors import SparsetuneError, message_line

_SURROUNDINGS = frozenset(
    (
        errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ELOOP, errno.EMFILE, errno.ENAMETOOLONG, errno.ENFILE,
        errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
    )
)  # fmt: skip
"""Errors of the file system that no code of ours can cause; others are unexpected."""

# The short helps are listed here so that `sparsetune --help` imports no command.
COMMANDS = {
    "tune": "Search thresholds for a model and save the best as a checkpoint.",
    "eval": "Render prompts dense and sparse, and measure the difference.",
    "compare": "Compare two evaluations.",
    "report": "Write an evaluation or a tuning as one HTML file.",
    "runs": "List the recorded runs, the best first.",
    "review": "Record a human review of a run's videos.",
    "promote": "Promote a run's checkpoint if it passes the checks.",
    "rollback": "Restore the version before the last promotion.",
    "metrics": "Compare existing videos, without a model.",
    "bench": "Time sparse attention and find its break-even sparsity.",
    "generate": "Render one prompt, dense or sparse.",
    "models": "List the packaged models, or show one.",
    "checkpoint": "Show, convert, verify or compare tuned checkpoints.",
    "ui": "Open the MLflow UI on the recorded runs.",
    "sync": "Upload runs recorded while the server was down.",
    "doctor": "Check what this machine can run, and what is missing.",
    "cache": "List or clear the dense baselines.",
}


class CommandGroup(click.Group):
    """A group of subcommands that accepts the global options too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += output_options(hidden=True)


class Command(click.Command):
    """A subcommand that accepts the options of SpargeAttn-style scripts, and the global options.

    The help lists the global options only where it `shows_progress`. Where some options are `essential`, given by
    their names, it lists only these, in groups, and --help-all the others too.
    """

    def __init__(
        self, *args: Any, shows_progress: bool = False, essential: Collection[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.shows_progress, self.essential = shows_progress, essential
        self.params += output_options(hidden=not shows_progress)
        if essential:
            self.params.append(help_all_option())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if not self.essential:
            super().format_options(ctx, formatter)
            return
        known = [param for param in self.get_params(ctx) if param.get_help_record(ctx) is not None]
        shown = known if HELP_ALL in ctx.meta else [one for one in known if {*one.opts} & {*self.essential, "--help"}]
        for heading, params in grouped(shown).items():
            with formatter.section(heading):
                formatter.write_dl([record for param in params if (record := param.get_help_record(ctx))])
        if len(shown) < len(known):
            formatter.write_paragraph()
            formatter.write_text(f"{len(known) - len(shown)} more options: {ctx.command_path} --help-all")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {option for param in self.params for option in (*param.opts, *param.secondary_opts)}
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [*translated(self.name, args[:end], known), *args[end:]])

    def invoke(self, ctx: click.Context) -> Any:
        options = global_options(ctx)
        if self.shows_progress:
            options.answer = lambda: "stopping, which takes some seconds"
            name = str(ctx.info_name)
            options.log.event(
                "start", f"sparsetune {name}", command=name, version=__version__, schema_version=SCHEMA_VERSION
            )
        with contextlib.nullcontext() if options.debug else quiet_libraries():
            return super().invoke(ctx)


class LazyGroup(click.Group):
    """Imports a command's module on use, and turns errors into one line and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = ("promote", "rollback_command") if cmd_name == "rollback" else (cmd_name, "command")
        command: click.Command = getattr(import_module(f"sparsetune.cli.{module}"), name)
        command.short_help = COMMANDS[cmd_name]
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line and exit with its status: 0, 1 failure, 2 usage, 3 gate not met, 130 Ctrl-C.

        SIGTERM and SIGHUP end it as Ctrl-C does, with 143 and 129. A second Ctrl-C ends long commands at once.
        """
        given = kwargs.get("args") or (args[0] if args else sys.argv[1:])
        options = GlobalOptions(arguments=tuple(given))
        with signals.raising_interrupts(options.on_interrupt):
            try:
                status = super().main(*args, **kwargs | {"standalone_mode": False, "obj": options})
            except (Exception, KeyboardInterrupt) as error:
                sys.exit(exit_status(error, options))
            sys.exit(status if isinstance(status, int) else 0)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except NoSuchCommand:
            raise NoSuchCommand(args[0], possibilities=COMMANDS, ctx=ctx) from None


def exit_status(error: BaseException, options: GlobalOptions) -> int:
    """Log an error on stderr, in one line unless debugging, and return the exit status."""
    if isinstance(error, click.ClickException):
        object.__setattr__(error, "message", message_line(error.message))  # Final, but it may echo 100,000 characters
        if options.log.format == "json":
            return _log_error(error, error.format_message(), error.exit_code, options)
        error.show()
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | click.Abort):
        about = str(error) or "no incomplete files were left"
        if options.answer is not None:
            about += f"; go on with: {options.command}"
        return _log_error(error, f"interrupted; {about}", signals.exit_status(), options)
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()  # the reader of our output is gone
        return 1
    if options.debug:
        options.log.event("output", "".join(traceback.format_exception(error)).rstrip(), "error")
    if isinstance(error, SparsetuneError):
        return _log_error(error, str(error), error.exit_code, options)
    if isinstance(error, OSError) and error.errno in _SURROUNDINGS:
        place = f"cannot use {error.filename}: " if error.filename else ""
        return _log_error(
            error, f"{place}{error.strerror}; check the path, its permissions and the free space", 1, options
        )
    if signals.is_interrupted():
        return exit_status(KeyboardInterrupt(), options)
    advice = "" if options.debug else "; run it again as `sparsetune --debug ...` for the traceback"
    return _log_error(error, f"unexpected {type(error).__name__}: {error}{advice}", 1, options)


def _log_error(error: BaseException, message: str, status: int, options: GlobalOptions) -> int:
    line = message_line(message)
    options.log.event("error", line, "error", error_type=type(error).__name__, exit_code=status)
    return status


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(prog)s %(version)s", prog_name="sparsetune", help="Print the version")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Tune sparse attention for video diffusion models, and measure its effect on the videos.

    \b
    Examples:
      sparsetune tune --model demo
      sparsetune eval --model demo --use-tuned
      sparsetune COMMAND --help
    """
    ctx.color = colour_wanted()


main.params += output_options()
