"""Dockerfile and .dockerignore: rules that hadolint doesn't know."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def stages() -> dict[str, list[str]]:
    """Return the instructions of each stage, by its name, the one that begins it first."""
    text = re.sub(r"^#.*\n|\\\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, list[str]] = {}
    for line in filter(None, text.splitlines()):
        if line.startswith("FROM "):
            found[line.rpartition(" AS ")[2]] = []
        list(found.values())[-1].append(line)
    return found


def test_the_images_run_as_a_user() -> None:
    for name in ("cpu", "cuda"):
        *_, user = [line for line in stages()[name] if line.startswith("USER ")]
        assert int(user.removeprefix("USER ")) > 0, name


def test_pip_installs_the_pinned_versions_and_its_configuration_stays_out_of_the_layers() -> None:
    lines = [line for stage in stages().values() for line in stage]
    installs = [line for line in lines if "pip install" in line]
    assert installs and all("-c /constraints.txt" in line or "--no-deps" in line for line in installs)
    fetching = [line for line in installs if "--no-deps" not in line]
    assert all("--mount=type=secret,id=pip" in line for line in fetching)
    assert [line for line in lines if re.match(r"(ARG|ENV) .*(TOKEN|SECRET|PASSWORD|INDEX_URL)", line)] == []


def test_sources_from_elsewhere_are_pinned() -> None:
    for stage in stages().values():
        image = stage[0].split()[1]
        assert image in stages() or re.fullmatch(r"[\w/]+:\d+\.\d+\.\d+-[\w.-]+", image), image
        for line in stage:
            assert not line.startswith("ADD ") or re.search(r"\.git#[0-9a-f]{40} ", line), line


def test_the_build_context_has_what_the_wheel_is_built_of() -> None:
    kept = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    wheel, project = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"], PROJECT["project"]
    needed = {*wheel["packages"], *wheel["force-include"], project["readme"], *project["license-files"]}
    assert needed | {"pyproject.toml", "constraints.txt"} == set(kept)
