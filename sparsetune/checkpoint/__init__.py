"""Tuned policies on disk: safetensors with a manifest, SpargeAttn's `.pt`, engines' settings, the Hub."""

from sparsetune.checkpoint.difference import LayerSummary, PolicyDifference, difference, summarize
from sparsetune.checkpoint.manifest import Checkpoint, LayerShape, Manifest, git_commit, hash_prompts, versions
from sparsetune.checkpoint.sparge_pt import read_sparge_pt, write_sparge_pt
from sparsetune.checkpoint.storage import check_folder, convert, load_checkpoint, save_checkpoint

__all__ = [
    "Checkpoint",
    "LayerShape",
    "LayerSummary",
    "Manifest",
    "PolicyDifference",
    "check_folder",
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
