"""The one operator that a compiled graph holds in the place of an intercepted attention call.

What runs sparse depends on the step, and counting has effects; neither can be traced. So `torch.compile` sees a single
operator with a known output, and everything behind it runs as it does without compilation. No graph breaks.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

OpaqueCall = Callable[..., Tensor]

_CALLS: dict[int, OpaqueCall] = {}
_KEYS = itertools.count()


def register(call: OpaqueCall) -> int:
    """Keep what `attend` runs under a key, until `unregister`."""
    key = next(_KEYS)
    _CALLS[key] = call
    return key


def unregister(key: int) -> None:
    """Forget a key."""
    _CALLS.pop(key, None)


@torch.library.custom_op("sparsetune::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    timestep: Tensor | None,
    positions: Tensor | None,
    grid: list[int],
    tail: int,
    key: Tensor,
    dropout: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    """Run the call that is registered under `key`, a tensor of one number.

    q, k, v are (batch, heads, tokens, head_dim), the output too.
    """
    given = {"mask": mask, "dropout": dropout, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return _CALLS[int(key)](timestep, positions, grid, tail, q=q, k=k, v=v, **given).contiguous()


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_rest: object) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))
