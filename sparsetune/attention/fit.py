"""Whether a policy belongs to a model."""

from collections.abc import Sequence

from sparsetune.attention.policy import Policy
from sparsetune.errors import CheckpointError

_LISTED = 4


def check_fits(policy: Policy, layers: Sequence[tuple[str, int]]) -> None:
    """Check that a policy has thresholds for exactly these layers and heads.

    Names are compared whole, never in part.

    Args:
        policy: the policy to be installed.
        layers: (module path from the pipeline, number of heads) of each self-attention layer of the model.

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
            f"the policy must have the model's {len(wanted)} self-attention layers, but of its {len(held)} there are "
            f"{found}; give a checkpoint that was tuned for this model"
        )


def _listed(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{more}"
