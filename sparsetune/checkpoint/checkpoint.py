"""A checkpoint in memory."""

from dataclasses import dataclass

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint.manifest import Manifest


@dataclass(frozen=True)
class Checkpoint:
    """A policy with the manifest that says where it comes from."""

    policy: Policy
    manifest: Manifest
