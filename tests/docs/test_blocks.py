"""Every code block of the documentation runs in a test, or states why not."""

from pathlib import Path

import pytest

from tests.docs.blocks import COMMANDS, ROOT, SHOWN, Block, all_blocks, blocks_of, pages

BLOCKS = all_blocks()

REASONS = (
    "needs a GPU",
    "needs an NVIDIA H100, and trains for half an hour",
    "needs four NVIDIA H200, and trains for a quarter of an hour",
    "needs a cluster",
    "needs Docker",
    "needs an account on the Hub",
    "names a model that doesn't exist",
    "needs fish",
    "needs zsh",
    "a test installs the wheel without downloading gigabytes of dependencies",
)


@pytest.mark.parametrize("page", pages())
def test_a_block_names_a_known_language(page: str) -> None:
    unknown = [str(block) for block in blocks_of(page) if block.language not in (*COMMANDS, *SHOWN)]
    assert unknown == [], f"name one of {', '.join((*COMMANDS, *SHOWN))}"


def test_a_block_that_is_not_run_has_a_known_reason() -> None:
    unknown = [f"{block}: {block.not_run}" for block in BLOCKS if block.not_run not in (None, *REASONS)]
    assert unknown == []


def test_the_start_pages_show_the_main_command() -> None:
    for page in ("README.md", "README.zh-CN.md", "docs/index.md", "docs/tutorial.md", "docs/examples.md"):
        assert any(block.text == "make tune && make eval\n" for block in blocks_of(page)), page


def test_an_example_is_shown_and_run() -> None:
    commands = "".join(block.text for block in BLOCKS if block.is_command)
    shown = {block.shows for block in BLOCKS} - {None}
    examples = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py")}
    assert shown == examples
    assert [name for name in examples if f"python {name}" not in commands] == []


def test_markers_indentation_and_titles_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.md").write_text(
        "<!-- not run: needs a GPU -->\n```sh\nnvidia-smi\n```\n\n"
        "- a list\n\n    ```python\n    if True:\n        print(1)\n    ```\n\n"
        '<!-- runs until Ctrl-C -->\n```sh\nserve\n```\n```yaml title="a.yaml"\na: 1\n```\n'
    )
    monkeypatch.setattr("tests.docs.blocks.ROOT", tmp_path)
    assert list(blocks_of("page.md")) == [
        Block("page.md", 2, "sh", "nvidia-smi\n", not_run="needs a GPU"),
        Block("page.md", 8, "python", "if True:\n    print(1)\n"),
        Block("page.md", 14, "sh", "serve\n", until_stopped=True),
        Block("page.md", 17, "yaml", "a: 1\n", title="a.yaml"),
    ]
