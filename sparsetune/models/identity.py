"""Which model it is, as far as its pixels and its checkpoints go."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsetune.config import ModelConfig
from sparsetune.models.families import attention_sites, main_transformer

_COMMIT = re.compile("[0-9a-f]{40}")
_HASHED_WHOLE = 1 << 28
_HASHED_CHUNK = 1 << 16
_HASHED_EVERY = 1 << 23


@dataclass(frozen=True)
class ModelIdentity:
    """A loaded model.

    Args:
        name: short name, e.g. `cogvideox-2b`.
        source: `demo`, a folder, or a hub id.
        revision: the hub's commit that was loaded; the branch or tag asked for where the commit isn't known, None for
            a folder that isn't one of the hub's.
        fingerprint: hexadecimal digest of the model's files; of one above 256 MiB, 64 KiB in every 8 MiB are read.
        pipeline_class: class name in diffusers.
        transformer_class: class name in diffusers.
        layers: (name, heads, head_dim) of every self-attention layer, in order.
        random_weights: the size it was built at where its weights are random, `full` or `tiny`; else `no`.
    """

    name: str
    source: str
    revision: str | None
    fingerprint: str
    pipeline_class: str
    transformer_class: str
    layers: tuple[tuple[str, int, int], ...]
    random_weights: Literal["no", "full", "tiny"] = "no"


def pinned(revision: str | None) -> bool:
    """Whether a revision is a commit, which means the same files for ever; branches and tags can move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def identity_of_files(pipe: Any, config: ModelConfig, source: str) -> ModelIdentity:
    """Identify a pipeline that was loaded.

    Args:
        pipe: the pipeline.
        config: what was asked for.
        source: the folder or the hub id that it was loaded from.
    """
    local = Path(source).is_dir()
    # A hub model's parts are loaded from the cache's snapshot folder, which is named after the commit.
    folder = Path(source) if local else Path(main_transformer(pipe).config._name_or_path).parent
    commit = folder.name if folder.parent.name == "snapshots" else None
    return _identity(pipe, config, commit or (None if local else config.revision), _fingerprint(folder))


def identity_of_random(pipe: Any, config: ModelConfig, described: str) -> ModelIdentity:
    """Identify a pipeline with random weights by the text that says what it was built of."""
    return _identity(pipe, config, None, hashlib.sha256(described.encode()).hexdigest())


def _identity(pipe: Any, config: ModelConfig, revision: str | None, fingerprint: str) -> ModelIdentity:
    return ModelIdentity(
        name=config.name,
        source=config.source,
        revision=revision,
        fingerprint=fingerprint,
        pipeline_class=type(pipe).__name__,
        transformer_class=type(main_transformer(pipe)).__name__,
        layers=tuple((layer.name, layer.num_heads, layer.head_dim) for layer in attention_sites(pipe).layers),
        random_weights=config.random_weights,
    )


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in {".safetensors", ".bin", ".json"}:
            digest.update(f"{file.relative_to(folder)}:{file.stat().st_size}\n".encode())
            whole = file.stat().st_size <= _HASHED_WHOLE
            with file.open("rb") as content:
                while chunk := content.read(_HASHED_EVERY if whole else _HASHED_CHUNK):
                    digest.update(chunk)
                    if not whole:
                        content.seek(_HASHED_EVERY - _HASHED_CHUNK, os.SEEK_CUR)
    return digest.hexdigest()
