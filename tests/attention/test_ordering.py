from typing import get_args

import pytest
import torch

from sparsetune.attention.ordering import ORDERS, TokenLayout, permutation
from sparsetune.config.models import Order

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
    assert torch.equal(path.forward.sort().values, torch.arange(layout.num_tokens))
    assert torch.equal(path.forward[text.start : text.stop], torch.tensor(list(text)))


@pytest.mark.parametrize("order", ORDERS)
def test_undoing_is_exact(order: str) -> None:
    layout = TokenLayout((5, 16, 16), range(32))
    x = torch.randn(2, 3, layout.num_tokens, 8)
    path = permutation(order, layout)
    if path is None:
        assert order == "raster"
        return
    assert torch.equal(path.order(x), x[..., path.forward, :]) and not torch.equal(path.order(x), x)
    assert torch.equal(path.undo(path.order(x)), x)


@pytest.mark.parametrize("memory", ["heads outside", "tokens outside", "channels outside", "cut off"])
def test_each_head_may_have_an_order_of_its_own(memory: str) -> None:
    layout, orders = TokenLayout((5, 16, 16), range(32)), ("whf", "raster", "hilbert", "whf")
    x = torch.randn(2, 4, layout.num_tokens, 8)
    if memory == "tokens outside":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif memory == "channels outside":
        x = x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    elif memory == "cut off":
        x = torch.cat([x, x], dim=-2)[..., : layout.num_tokens, :]
    path = permutation(orders, layout)
    assert path is not None
    ordered = path.order(x)
    for head, order in enumerate(orders):
        alone = permutation(order, layout)
        wanted = x[:, head : head + 1]
        assert torch.equal(ordered[:, head : head + 1], wanted if alone is None else alone.order(wanted))
    assert torch.equal(path.undo(ordered), x)


def test_raster_needs_no_permutation_and_one_order_for_all_is_that_order() -> None:
    layout = TokenLayout((2, 3, 4), range(24, 30))
    assert permutation("raster", layout) is permutation(("raster",) * 3, layout) is None
    same, one = permutation(("whf",) * 3, layout), permutation("whf", layout)
    assert same is not None and one is not None
    assert same.of_head is None and torch.equal(same.forward, one.forward)


def test_two_layouts_in_turn_keep_their_own_positions() -> None:
    x = torch.randn(1, 2, 30, 4)
    layouts = [
        TokenLayout((2, 3, 4), range(6)),
        TokenLayout((2, 3, 4), range(24, 30)),
        TokenLayout((5, 3, 2), range(0)),
    ]
    for _ in range(2):
        for layout in layouts:
            path = permutation(("whf", "hfw"), layout)
            assert path is not None and torch.equal(path.undo(path.order(x)), x)
            assert torch.equal(path.order(x)[..., layout.text.start : layout.text.stop, :],
                               x[..., layout.text.start : layout.text.stop, :])  # fmt: skip


def test_the_configuration_offers_every_order() -> None:
    assert get_args(Order) == tuple(ORDERS)


@pytest.mark.parametrize(
    ("order", "first"),
    [("fwh", (0, 1, 0)), ("hfw", (0, 0, 1)), ("hwf", (1, 0, 0)), ("wfh", (0, 1, 0)), ("whf", (1, 0, 0))],
)
def test_an_axis_order_names_its_axes_from_the_outermost(order: str, first: tuple[int, int, int]) -> None:
    grid = (3, 4, 5)
    places = coordinates(order, grid)
    assert tuple(places[1].tolist()) == first
    axes = ["fhw".index(axis) for axis in order]
    walked = [tuple(place[axis] for axis in axes) for place in places.tolist()]
    assert walked == sorted(walked)


def coordinates(order: str, grid: tuple[int, int, int]) -> torch.Tensor:
    path = permutation(order, TokenLayout(grid, range(0)))
    assert path is not None
    path = path.forward
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
