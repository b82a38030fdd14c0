"""A published model without its weights: what a policy can be checked against."""

from types import SimpleNamespace
from typing import Any

import torch

from sparsetune.models.random_weights import Blueprint, build_component


def skeleton(plan: Blueprint) -> Any:
    """Build a model's transformers at full size on the meta device, which takes no memory, in a bare pipeline."""
    with torch.device("meta"):
        parts = {name: build_component(plan, name, "full") for name in plan.components if "transformer" in name}
    return type(plan.pipeline, (SimpleNamespace,), {})(**parts, scheduler=None)
