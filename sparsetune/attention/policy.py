"""A policy: everything that decides which attention blocks of a generation are computed, and which steps skip."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.step_cache import StepCache
from sparsetune.attention.thresholds import SPARGE_DEFAULTS, HeadThresholds, LayerThresholds
from sparsetune.config.models import Order
from sparsetune.errors import CheckpointError, ThresholdError

if TYPE_CHECKING:
    from sparsetune.attention.ordering import TokenOrder


@dataclass(frozen=True)
class Policy:
    """Thresholds of every self-attention layer, the dense steps, the token order and the text rule.

    Args:
        layers: one entry a self-attention layer of the transformer, in the order of its modules.
        schedule: how sparse each denoising step runs.
        order: the token order in which blocks are cut, one of the configuration's `Order`; a layer or its heads
            may have their own.
        keep_text: compute every key block that holds a text token, for every query; without it the first key block,
            which is what SpargeAttn keeps when it renders (`attention_sink`).
        cache: the step cache, which skips whole blocks; None for none.
        select_partial: choose a partial last block (of queries as of keys) like any other, by the mean over its
            tokens; without it such a block is always computed, as by SpargeAttn.

    Raises:
        ThresholdError: no layers, a layer named twice, or an unknown order.
    """

    layers: tuple[LayerThresholds, ...]
    schedule: DenseSchedule = field(default_factory=DenseSchedule)
    order: str = "raster"
    keep_text: bool = False
    select_partial: bool = False
    cache: StepCache | None = None

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if not names or len(set(names)) != len(names):
            raise ThresholdError(f"a policy must name each layer once, got {names or 'no layers'}")
        for order in (self.order, *(order for of_layer in self.head_orders for order in of_layer)):
            if order not in get_args(Order):
                raise ThresholdError(f"order must be one of {', '.join(get_args(Order))}, got {order!r}")

    @property
    def orders(self) -> "tuple[TokenOrder, ...]":
        """The token order of each layer, one for all of its heads or one for each."""
        return tuple(layer.order or self.order for layer in self.layers)

    @property
    def head_orders(self) -> tuple[tuple[str, ...], ...]:
        """The token order of each layer's heads."""
        return tuple(
            (order,) * len(layer.heads) if isinstance(order, str) else order
            for layer, order in zip(self.layers, self.orders, strict=True)
        )

    @property
    def sparse_orders(self) -> tuple[tuple[str, ...], ...]:
        """The token orders that each layer's sparse heads run in, sorted."""
        return tuple(
            tuple(sorted({order for head, order in zip(layer.heads, orders, strict=True) if head.is_sparse}))
            for layer, orders in zip(self.layers, self.head_orders, strict=True)
        )

    @property
    def order_names(self) -> tuple[str, ...]:
        """The token orders that any sparse head runs in, sorted; the policy's where none is sparse."""
        return tuple(sorted({order for of_layer in self.sparse_orders for order in of_layer} or {self.order}))

    @property
    def is_dense(self) -> bool:
        """Whether no head runs sparse; a cache may still skip blocks."""
        return not any(head.is_sparse for layer in self.layers for head in layer.heads)

    @classmethod
    def uniform(
        cls,
        layers: Sequence[tuple[str, int]],
        head: HeadThresholds | None = None,
        *,
        schedule: DenseSchedule | None = None,
        order: str = "raster",
        keep_text: bool = False,
        select_partial: bool = False,
    ) -> "Policy":
        """Make a policy with the same thresholds for every head; SpargeAttn's defaults if `head` is None.

        `layers` holds the (name, number of heads) of each self-attention layer; the others are as in `Policy`.
        """
        uniform = tuple(LayerThresholds.uniform(name, num_heads, head or SPARGE_DEFAULTS) for name, num_heads in layers)
        return cls(uniform, schedule or DenseSchedule(), order, keep_text, select_partial)

    def layer(self, name: str) -> LayerThresholds:
        """Return the thresholds of the layer of that name; KeyError where there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)


_MAX_LISTED = 4


def check_fits(policy: Policy, layers: Sequence[tuple[str, int]]) -> None:
    """Check that a policy has thresholds for exactly a model's layers, (module path, number of heads) each.

    Raises:
        CheckpointError: layers are missing, too many, or have another number of heads; each kind is listed.
    """
    held = {layer.name: len(layer.heads) for layer in policy.layers}
    wanted = dict(layers)
    resized = [
        f"{name} (model {num_heads}, policy {held[name]})"
        for name, num_heads in wanted.items()
        if held.get(name, num_heads) != num_heads
    ]
    problems = [
        _listed("missing", [name for name in wanted if name not in held]),
        _listed("not in the model", [name for name in held if name not in wanted]),
        _listed("with another number of heads", resized),
    ]
    found = "; ".join(problem for problem in problems if problem)
    if found:
        raise CheckpointError(
            f"the policy's {len(held)} layers don't match the model's {len(wanted)} self-attention layers: {found}; "
            "use a checkpoint that was tuned for this model"
        )


def _listed(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:_MAX_LISTED])}{more}"
