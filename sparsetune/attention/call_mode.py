"""The way of an attention call from below a module's forward to whoever intercepts it.

A `TorchFunctionMode` sees each `scaled_dot_product_attention` call while the forward runs.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparsetune.attention.ordering import Grid
from sparsetune.attention.sites import DenseCall, LayerSite, TransformerCall

Forward = Callable[..., Any]


def native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    """Attend with PyTorch's own kernel; a `DenseCall`."""
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa)


class AttentionCallMode:
    """Sends a layer's attention calls on: at once, or as one operator where a graph is being compiled.

    `running` is the transformer call around them, `dense` the kernel that the layer had chosen (None: PyTorch's),
    `seen` whether there was a call.

    Args:
        run: what they are sent to.
        layer: whose calls they are.
    """

    def __init__(self, run: Callable[..., Tensor], layer: LayerSite) -> None:
        self.running: TransformerCall | None = None
        self.dense: DenseCall | None = None
        self.seen = False
        self._run = run
        self._switch = layer.switch
        # A tensor, not a number: torch.compile would compile a block anew for each number, and give up after eight.
        self._key = torch.tensor(register(self._opaque))

    def close(self) -> None:
        """Make compiled graphs forget where they sent to."""
        unregister(int(self._key))

    def under(self, original: Forward, args: Any, kwargs: Any) -> Any:
        """Run a module's forward with every attention call below it sent on, whatever kernel it has chosen."""
        if self._switch is None:
            with _AttentionMode(self):
                return original(*args, **kwargs)
        if not torch.compiler.is_compiling():
            self.dense = self._switch.dense()
        before = self._switch.to_native()
        try:
            with _AttentionMode(self):
                return original(*args, **kwargs)
        finally:
            self._switch.restore(before)

    def __call__(
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
        """Send one call on; the arguments are those of `scaled_dot_product_attention`."""
        if scale is None:
            scale = query.shape[-1] ** -0.5
        running = self.running
        if torch.compiler.is_compiling():
            output: Tensor = attend(
                query,
                key,
                value,
                attn_mask,
                None if running is None else running.timestep,
                None if running is None else running.positions,
                [] if running is None or running.grid is None else list(running.grid),
                0 if running is None else running.tail,
                self._key,
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
            )
            return output
        self.seen = True
        return self._run(
            running,
            self.dense or native,
            q=query,
            k=key,
            v=value,
            mask=attn_mask,
            dropout=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    def _opaque(
        self, timestep: Tensor | None, positions: Tensor | None, grid: list[int], tail: int, **call: Any
    ) -> Tensor:
        """Take up the call that a compiled graph made by the operator."""
        running = None
        if timestep is not None:
            given: Grid | None = (grid[0], grid[1], grid[2]) if grid else None
            running = TransformerCall(timestep, given, tail, positions)
        dense = None if self._switch is None else self._switch.dense()
        return self._run(running, dense or native, **call)


class _AttentionMode(TorchFunctionMode):
    def __init__(self, send: AttentionCallMode) -> None:
        super().__init__()
        self._send = send

    def __torch_function__(
        self, func: Forward, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._send(*args, **(kwargs or {}))
        if func is Tensor.unflatten:  # torch.compile can trace the function below a mode, but not the method
            return torch.unflatten(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


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
