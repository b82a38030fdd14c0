"""The command line's reference, from the commands themselves.

mkdocs-click finds our lazily loaded commands, but runs a help text's examples together into one paragraph and shows no
default, since ours stand in the help; hence this.
"""

import inspect
import re
from collections.abc import Iterator

import click

_DEFAULT = re.compile(r"\s*\[default: (?P<default>.*)\]$", re.DOTALL)
_TYPES = {"BOOL": "", "STRING": "TEXT", "INT": "INTEGER"}


def reference(group: click.Group, name: str) -> str:
    """Write every command of `group` in Markdown, in the group's own order, a heading of level 2 each."""
    context = click.Context(group, info_name=name)
    lines = [*_options(group, context), ""]
    for command in _subcommands(group, context):
        lines += _command(command, context, level=2)
    return "\n".join(lines)


def _command(command: click.Command, parent: click.Context, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=command.name, parent=parent)
    yield f"{'#' * level} {context.command_path} {{ #{context.command_path.replace(' ', '-')} }}"
    yield ""
    yield from _help(command)
    usage = " ".join(command.collect_usage_pieces(context))
    yield from ("```text", f"{context.command_path} {usage}", "```", "")
    yield from _options(command, context)
    yield ""
    for sub in _subcommands(command, context):
        yield from _command(sub, context, level + 1)


def _subcommands(command: click.Command, context: click.Context) -> list[click.Command]:
    if not isinstance(command, click.Group):
        return []
    found = [command.get_command(context, name) for name in command.list_commands(context)]
    return [sub for sub in found if sub is not None and not sub.hidden]


def _help(command: click.Command) -> Iterator[str]:
    """Give the help's paragraphs; what click wouldn't wrap, our examples, as code."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        if not paragraph.startswith("\b"):
            yield from (paragraph, "")
            continue
        title, *examples = paragraph.removeprefix("\b\n").splitlines()
        yield from (title, "", "```console", *(example.strip() for example in examples), "```", "")


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    options = [param for param in command.get_params(context) if isinstance(param, click.Option) and not param.hidden]
    yield "| option | what it does | default |"
    yield "| --- | --- | --- |"
    for option in options:
        text, default = _parted(option.help or "")
        yield f"| {_names(option, context)} | {_cell(text)} | {_cell(default)} |"


def _names(option: click.Option, context: click.Context) -> str:
    kind = option.make_metavar(context)
    kind = "" if option.is_flag else _TYPES.get(kind, kind)
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return f"{names} {_cell(f'`{kind}`')}" if kind else names


def _parted(help_text: str) -> tuple[str, str]:
    """Take a help apart into what it says and the default at its end."""
    found = _DEFAULT.search(help_text)
    return (help_text, "") if found is None else (help_text[: found.start()], found["default"])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "&#124;" if "`" not in text else "\\|").replace("<", "&lt;")
