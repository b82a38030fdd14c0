"""The class of every subcommand."""

import contextlib
from typing import Any

import click

from sparsetune.cli.failures import Session
from sparsetune.cli.output_options import output_options
from sparsetune.cli.terminal import quiet_libraries


class Command(click.Command):
    """A command whose options may also be spelled with underscores, as SpargeAttn-style scripts spell theirs.

    It takes the options of the whole program after its name too.

    Args:
        args: see `click.Command`.
        shows_progress: list --quiet and --log-format in its help.
        kwargs: see `click.Command`.
    """

    def __init__(self, *args: Any, shows_progress: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shows_progress = shows_progress
        self.params += output_options(hidden=not shows_progress)
        self.params.append(
            click.Option(["--debug"], is_flag=True, hidden=True, expose_value=False, callback=_set_debug)
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, after `--num_prompts` and the like became `--num-prompts`."""
        known = {option for param in self.params for option in (*param.opts, *param.secondary_opts)}
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [*(_dashed(arg, known) for arg in args[:end]), *args[end:]])

    def invoke(self, ctx: click.Context) -> Any:
        """Run with the libraries underneath kept quiet, unless debugging."""
        session = ctx.find_object(Session) or Session()
        if self.shows_progress:
            _say_start(ctx, session)
        with contextlib.nullcontext() if session.debug else quiet_libraries(session.log):
            return super().invoke(ctx)


def _say_start(ctx: click.Context, session: Session) -> None:
    from sparsetune import __version__
    from sparsetune.cli.log_events import SCHEMA_VERSION

    name = str(ctx.info_name)
    session.log.say("start", f"sparsetune {name}", command=name, version=__version__, schema_version=SCHEMA_VERSION)


def _dashed(arg: str, known: set[str]) -> str:
    name, separator, value = arg.partition("=")
    dashed = name.replace("_", "-")
    return dashed + separator + value if name.startswith("--") and dashed in known else arg


def _set_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    session = ctx.find_object(Session)
    if value and session is not None:
        session.debug = True
