"""Project files: citation, licence, code of conduct, extras, shell completion."""

import os
import re
import subprocess
import sys
import tomllib

import yaml

from sparsetune import __version__
from tests.docs.blocks import ROOT


def test_the_citation_file_has_the_required_fields() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    for needed in ("message", "title", "abstract"):
        assert isinstance(citation[needed], str) and citation[needed]
    people = [*citation["authors"], *(author for one in citation["references"] for author in one["authors"])]
    assert people and all(set(person) in ({"name"}, {"family-names", "given-names"}) for person in people)
    assert citation["version"] == __version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert set(citation["keywords"]) <= set(project["keywords"])


def test_licence_and_conduct_are_named() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Contributor Covenant, version 2.1" in (ROOT / "CODE_OF_CONDUCT.md").read_text(encoding="utf-8")


def test_the_documented_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r"^\| `sparsetune\[(\w+)\]`", (ROOT / "docs" / "install.md").read_text("utf-8"), re.MULTILINE)
    assert set(named) == set(extras) - {"dev"}


def test_the_shell_completes_commands_and_choices() -> None:
    def completed(words: str, index: int) -> list[str]:
        variables = {"_SPARSETUNE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(index)}
        code = "from sparsetune.cli.main import main; main(prog_name='sparsetune')"
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True)
        return done.stdout.split()

    assert completed("sparsetune tu", 1) == ["plain,tune"]
    assert completed("sparsetune tune --sampler n", 3) == ["plain,nsga2"]
