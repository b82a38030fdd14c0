"""Command-line reference, generated from the click commands.

mkdocs-click merges the examples of a help text into one paragraph and shows no defaults, since ours are part of the
help text.
"""

import inspect
import re
from collections.abc import Iterator

import click

PAGES = {
    "cli-tune": ("tune",),
    "cli-eval": ("eval", "generate"),
    "cli-results": ("compare", "metrics", "report", "runs", "ui", "sync"),
    "cli-checkpoints": ("review", "promote", "rollback", "checkpoint"),
    "cli-machine": ("models", "bench", "doctor", "cache"),
}
"""Pages, each with its commands; together they have all."""

_DEFAULT = re.compile(r"\s*\[default: (?P<default>.*)\]$", re.DOTALL)


def overview(group: click.Group, name: str) -> str:
    """Return Markdown for the options of `group` and a table of its commands, with links to their pages."""
    context = _context(group, name)
    page_of = {command: page for page, commands in PAGES.items() for command in commands}
    lines = [*_options(group, context), "", "| command | what it does |", "| --- | --- |"]
    for command in _subcommands(group, context):
        path = f"{name} {command.name}"
        # The identifier is that of the command's heading, which links to this page used before there were several.
        link = f"[`{path}`]({page_of[command.name]}.md#{_slug(path)}){{ #{_slug(path)} }}"
        lines.append(f"| {link} | {_cell(command.get_short_help_str(limit=200))} |")
    return "\n".join(lines)


def reference(group: click.Group, name: str, page: str) -> str:
    """Return Markdown for the commands of a page, each with a heading of level 2."""
    context = _context(group, name)
    found = {command.name: command for command in _subcommands(group, context)}
    return "\n".join(line for command in PAGES[page] for line in _command(found[command], context, level=2))


def _context(group: click.Group, name: str) -> click.Context:
    return click.Context(group, info_name=name, help_option_names=["-h", "--help"])


def _slug(path: str) -> str:
    return path.replace(" ", "-")


def _command(command: click.Command, parent: click.Context, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=command.name, parent=parent)
    yield f"{'#' * level} {context.command_path} {{ #{_slug(context.command_path)} }}"
    usage = " ".join(command.collect_usage_pieces(context))
    yield from ("", "```text", f"{context.command_path} {usage}", "```", "")
    yield from _help(command)
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
    """Yield the paragraphs of the help; those that click must not wrap are examples, shown as code."""
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
        text, default = _split_default(option.help or "")
        yield f"| {_names(option, context)} | {_cell(text)} | {_cell(default)} |"


def _names(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if option.is_flag:
        return names
    if isinstance(option.type, click.Choice):
        return f"{names} {', '.join(f'`{choice}`' for choice in option.type.choices)}"
    return f"{names} `{option.make_metavar(context)}`"


def _split_default(help_text: str) -> tuple[str, str]:
    """Split a help text into its description and the default at its end."""
    found = _DEFAULT.search(help_text)
    return (help_text, "") if found is None else (help_text[: found.start()], found["default"])


def _cell(text: str) -> str:
    """Escape a text for a table cell; add spaces after commas, so that lists can wrap."""
    text = re.sub(r",(?=\w)", ", ", " ".join(text.split()))
    return text.replace("|", "&#124;").replace("<", "&lt;")
