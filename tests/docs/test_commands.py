"""Runs every command block of the documentation, in order, in one folder, like a new user."""

import pytest

from tests.docs.blocks import Block, all_blocks
from tests.docs.workspace import Workspace, make_workspace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("docs") / "checkout")


def _blocks() -> list[Block]:
    """Return the blocks to run and the titled blocks to write as files."""
    return [
        block
        for block in all_blocks()
        if block.is_command or (block.title is not None and block.shows is None and block.not_run is None)
    ]


@pytest.mark.parametrize("block", _blocks(), ids=str)
def test_the_documentation_can_be_followed(block: Block, workspace: Workspace) -> None:
    if block.is_command:
        workspace.run(block)
    else:
        workspace.write(block)
