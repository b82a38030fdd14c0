"""A `TorchFunctionMode` that redirects `scaled_dot_product_attention` calls while a module's forward runs."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparsetune.attention.sites import DenseCall, LayerSite, TransformerCall

Forward = Callable[..., Any]


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, dropout: float, **options: Any) -> Tensor:
    """PyTorch's own kernel, a `DenseCall`."""
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, **options)


class AttentionCallMode(TorchFunctionMode):
    """Redirects a layer's attention calls: at once, or as one operator where a graph is being compiled.

    `running` is the transformer call around them, `called` whether there was any since it was last reset. `redirect`
    takes the transformer call, the layer's dense kernel and the arguments of `DenseCall`.
    """

    def __init__(self, redirect: Callable[..., Tensor], layer: LayerSite) -> None:
        super().__init__()
        self.running: TransformerCall | None = None
        self.called = False
        self._redirect = redirect
        self._switch = layer.switch
        self._dense: DenseCall | None = None
        # A tensor, not a number: torch.compile would compile a block anew for each number, and give up after eight.
        self._key = torch.tensor(next(_KEYS))
        _COMPILED_CALLS[int(self._key)] = self._from_graph

    def close(self) -> None:
        _COMPILED_CALLS.pop(int(self._key), None)

    def run(self, original: Forward, args: Any, kwargs: Any) -> Any:
        """Run a module's forward with every attention call below it redirected, whatever kernel the module chose."""
        if self._switch is None:
            with self:
                return original(*args, **kwargs)
        if not torch.compiler.is_compiling():
            self._dense = self._switch.dense()
        before = self._switch.to_native()
        try:
            with self:
                return original(*args, **kwargs)
        finally:
            self._switch.restore(before)

    def __torch_function__(
        self, func: Forward, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._intercept(*args, **(kwargs or {}))
        if func is Tensor.unflatten:  # torch.compile can trace the function below a mode, but not the method
            return torch.unflatten(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _intercept(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Redirect one call; the arguments are those of `scaled_dot_product_attention`."""
        if scale is None:
            scale = query.shape[-1] ** -0.5
        options = {"dropout": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        running = self.running
        if torch.compiler.is_compiling():
            timestep, grid, tail, positions, last = (None, None, 0, None, False) if running is None else running
            output: Tensor = attend(
                query, key, value, attn_mask, timestep, positions, list(grid or ()), tail, last, self._key, **options
            )
            return output
        self.called = True
        return self._redirect(running, self._dense or sdpa, q=query, k=key, v=value, mask=attn_mask, **options)

    def _from_graph(
        self, timestep: Tensor | None, positions: Tensor | None, grid: list[int], tail: int, last: bool, **call: Any
    ) -> Tensor:
        running = None
        if timestep is not None:
            known = (grid[0], grid[1], grid[2]) if grid else None
            running = TransformerCall(timestep, known, tail, positions, last)
        dense = None if self._switch is None else self._switch.dense()
        return self._redirect(running, dense or sdpa, **call)


_COMPILED_CALLS: dict[int, Callable[..., Tensor]] = {}  # what the operator `attend` runs, by key
_KEYS = itertools.count()


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
    last: bool,
    key: Tensor,
    dropout: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    """Run the call registered under `key`, a tensor of one number; the others are those of `DenseCall`."""
    given = {"mask": mask, "dropout": dropout, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    output = _COMPILED_CALLS[int(key)](timestep, positions, grid, tail, last, q=q, k=k, v=v, **given).contiguous()
    return output.clone() if output is q or output is v else output  # an operator may not return its input


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_rest: object) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))
