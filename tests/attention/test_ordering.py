import pytest
import torch

from sparsetune.attention.ordering import ORDERS, TokenLayout, permutation

GRIDS = [(5, 16, 16), (13, 30, 45), (1, 7, 3), (2, 1, 1)]


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "raster"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("text_last", [False, True])
def test_a_permutation_holds_every_token_once_and_leaves_text(order: str, grid: tuple, text_last: bool) -> None:
    video = grid[0] * grid[1] * grid[2]
    text = range(video, video + 10) if text_last else range(10)
    layout = TokenLayout(grid, text)
    path = permutation(order, layout)
    assert path is not None
    assert torch.equal(path.there.sort().values, torch.arange(layout.num_tokens))
    assert torch.equal(path.there[text.start : text.stop], torch.tensor(list(text)))


@pytest.mark.parametrize("order", ORDERS)
def test_undoing_is_exact(order: str) -> None:
    layout = TokenLayout((5, 16, 16), range(32))
    x = torch.randn(2, 3, layout.num_tokens, 8)
    path = permutation(order, layout)
    if path is None:
        assert order == "raster"
        return
    assert not torch.equal(x[..., path.there, :], x)
    assert torch.equal(x[..., path.there, :][..., path.back, :], x)


def coordinates(order: str, grid: tuple[int, int, int]) -> torch.Tensor:
    path = permutation(order, TokenLayout(grid, range(0)))
    assert path is not None
    path = path.there
    return torch.stack([path // (grid[1] * grid[2]), path // grid[2] % grid[1], path % grid[2]], dim=1)


def test_hilbert_neighbours_are_neighbours_in_the_video() -> None:
    steps = coordinates("hilbert3d", (8, 8, 8)).diff(dim=0).abs().sum(1)
    assert steps.max() == 1
    frame = coordinates("hilbert", (3, 16, 16))[:256]
    assert (frame[:, 0] == 0).all()
    assert frame.diff(dim=0).abs().sum(1).max() == 1


def test_a_block_of_64_tokens_is_one_tile() -> None:
    tile = coordinates("tiles", (5, 16, 16))[:64]
    assert tile.amax(0).tolist() == [0, 7, 7]
    cube = coordinates("cubes", (8, 16, 16))[:64]
    assert cube.amax(0).tolist() == [3, 3, 3]
