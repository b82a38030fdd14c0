"""The generated reference covers all commands, settings, metrics and schemas."""

import json
import re
from collections.abc import Iterator

import click
import pytest

import sparsetune
from sparsetune import metrics
from sparsetune.cli.main import COMMANDS, main
from sparsetune.config.resolver import config_fields
from tests.docs.blocks import ROOT
from tools.docs.cli_reference import PAGES, overview, reference
from tools.docs.metrics_tables import metrics_table, score_tables
from tools.docs.python_names import names_table
from tools.docs.root_files import as_page
from tools.docs.schema_tables import NAMES, schema_tables, schemas
from tools.docs.settings_table import settings_tables


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield all commands and subcommands with their full names."""
    context = click.Context(group, info_name=path)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")


def test_every_command_has_a_heading_its_examples_and_every_option_with_its_default() -> None:
    text = "\n".join(reference(main, "sparsetune", page) for page in PAGES)
    sections = dict(re.findall(r"^##+ (sparsetune[ \w]+?) \{.*?\}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    assert {name for name in sections if name.count(" ") == 1} == {f"sparsetune {name}" for name in COMMANDS}
    assert sum(map(len, PAGES.values())) == len(COMMANDS)
    for name, command in commands(main, "sparsetune"):
        section = sections[name]
        assert "Example" in section and f"```console\n{name}" in section, name
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                row = re.search(rf"^\| `{option.opts[0]}`.*\|$", section, re.MULTILINE)
                assert row is not None, f"{name} {option.opts[0]}"
                assert row[0].count("|") == 4, row[0]
    sampler = "| `--sampler` `tpe`, `gp`, `nsga2`, `cmaes`, `random` | Optuna's sampler. | tpe |"
    assert sampler in sections["sparsetune tune"]


def test_the_overview_links_each_command_to_its_page() -> None:
    rows = re.compile(r"^\| \[`sparsetune (\S+)`\]\(([\w-]+)\.md#(\S+)\)\{ #(\S+) \}", re.MULTILINE)
    links = rows.findall(overview(main, "sparsetune"))
    assert [name for name, *_ in links] == list(COMMANDS)
    for name, page, target, anchor in links:
        assert target == anchor == f"sparsetune-{name}" and f"{{ #{anchor} }}" in reference(main, "sparsetune", page)
        assert f"<!-- generate: {page} -->" in (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def test_every_public_name_is_linked_to_its_page() -> None:
    linked = re.findall(r"\[`(\w+)`\]\((python-\w+\.md)#([\w.]+)\)", names_table(ROOT / "docs"))
    for name, page, path in linked:
        assert path.endswith(f".{name}") and f"\n::: {path}\n" in (ROOT / "docs" / page).read_text(encoding="utf-8")
    others = {"SparsetuneError", "Config", "resolve", "__version__", "metrics"}  # on python.md itself, and a module
    assert set(sparsetune.__all__) - others <= {name for name, *_ in linked}


def test_every_setting_is_in_a_table() -> None:
    assert set(re.findall(r"^\| `([\w.]+)` \|", settings_tables(), re.MULTILINE)) == set(config_fields())


def test_every_metric_of_sparsetune_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", metrics_table(), re.MULTILINE)
    assert tuple(rows[:4]) == metrics.BASE_METRICS
    assert sorted(rows) == sorted(metrics.names())


def test_the_score_s_tables_are_the_score() -> None:
    tables = score_tables()
    assert "| `psnr` | > 40 dB: 40, > 35 dB: 30, > 30 dB: 20, otherwise 0 |" in tables
    assert metrics.score(0.985, 37.82, 0.0457) == 40 + 30 + 15
    assert "from 80 **good**" in tables


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_s_table_has_its_fields_and_those_of_its_parts(name: str) -> None:
    schema = schemas()[name]
    table = schema_tables(schema)
    fields = {field for part in (schema, *schema.get("$defs", {}).values()) for field in part.get("properties", {})}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == fields
    json.dumps(schema)


def test_a_schema_s_table_has_the_descriptions_that_several_fields_share() -> None:
    table = schema_tables(schemas()["manifest"])
    assert (
        "| `base_revision` | string or null | name, hub id or folder, and revision of the model tuned for. |" in table
    )
    assert "| `git_commit` | string or null | from `versions()` and `git_commit()`. |" in table


def test_links_of_a_root_file_lead_to_pages() -> None:
    warnings: list[str] = []
    text = as_page(ROOT / "CHANGELOG.md", {}, warnings.append)
    assert "](models.md)" in text and "](docs/" not in text and "](https://semver.org)" in text
    assert warnings == []
    as_page(ROOT / "CONTRIBUTING.md", {}, warnings.append)
    assert warnings == ["CONTRIBUTING.md links to CODE_OF_CONDUCT.md, which is not a page of the site"]
