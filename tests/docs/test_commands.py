"""The documentation followed to the letter: every command block, in order, in one folder, as a new user runs them."""

import pytest

from tests.docs.blocks import Block, all_blocks
from tests.docs.workspace import Workspace, make_workspace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("docs") / "checkout")


def _followed() -> list[Block]:
    """Blocks to run, and files to write where they are shown with their names."""
    return [
        block
        for block in all_blocks()
        if block.is_command or (block.title is not None and block.shows is None and block.not_run is None)
    ]


@pytest.mark.parametrize("block", _followed(), ids=str)
def test_the_documentation_can_be_followed(block: Block, workspace: Workspace) -> None:
    if block.is_command:
        workspace.run(block)
    else:
        workspace.write(block)
