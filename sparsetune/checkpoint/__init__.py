"""A tuned policy on disk: safetensors beside a manifest, and SpargeAttn's `.pt` in and out."""

from sparsetune.checkpoint.checkpoint import Checkpoint
from sparsetune.checkpoint.difference import PolicyDifference, difference
from sparsetune.checkpoint.manifest import LayerShape, Manifest, git_commit, hash_prompts, versions
from sparsetune.checkpoint.sparge_pt import read_sparge_pt, write_sparge_pt
from sparsetune.checkpoint.storage import convert, load_checkpoint, save_checkpoint
from sparsetune.checkpoint.summary import LayerSummary, summarize

__all__ = [
    "Checkpoint",
    "LayerShape",
    "LayerSummary",
    "Manifest",
    "PolicyDifference",
    "convert",
    "difference",
    "git_commit",
    "hash_prompts",
    "load_checkpoint",
    "read_sparge_pt",
    "save_checkpoint",
    "summarize",
    "versions",
    "write_sparge_pt",
]
