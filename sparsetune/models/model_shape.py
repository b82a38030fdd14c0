"""Size of a published model: layers, tokens, weights, and attention's share of its arithmetic."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ATTENTION_FLOPS_PER_MS = 4.1e11
"""Of cuDNN's attention in bfloat16 on an H100."""

_SPARSE_START_MS = 1.0
"""Of SpargeAttn's call on an H100: it launches many small kernels, whatever it computes."""


@dataclass(frozen=True)
class ModelShape:
    """A model at its published size; gigabytes are 10^9 bytes of weights in bfloat16."""

    num_layers: int  # self-attention layers of all transformers
    num_heads: int  # of a layer
    head_dim: int
    num_transformers: int  # a step runs one of them
    num_parameters: int  # of all transformers
    vae_parameters: int
    grid: tuple[int, int, int]  # latent frames, height and width in tokens
    num_text_tokens: int  # in the joint attention, at most

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "ModelShape":
        """Read a packaged configuration's facts, by their dotted keys; `shapes.shape_of` measures them."""
        names = {
            "num_layers": "layers", "num_heads": "heads", "head_dim": "head_dim", "num_transformers": "transformers",
            "num_parameters": "parameters", "vae_parameters": "vae_parameters", "num_text_tokens": "text_tokens",
        }  # fmt: skip
        return cls(**{field: facts[f"facts.{key}"] for field, key in names.items()}, grid=tuple(facts["facts.grid"]))

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid) + self.num_text_tokens

    @property
    def attention_share(self) -> float:
        """Fraction of a transformer call's arithmetic that is attention: 4 N² d in every layer, to 2 N a parameter.

        Other work (norms, the VAE, text encoders) isn't counted.
        """
        attention = 4 * self.num_tokens**2 * self.num_layers * self.num_heads * self.head_dim
        return attention / (attention + 2 * self.num_tokens * self.num_parameters)

    @property
    def sparsity_gain(self) -> str:
        """Whether sparsity can save time at this size, roughly: dense attention against the start of a sparse call.

        Figures of an H100, the sparse call's from before it launched fewer kernels; `tune` measures both here.
        """
        dense_ms = 4 * self.num_tokens**2 * self.num_heads * self.head_dim / _ATTENTION_FLOPS_PER_MS
        verdict = "likely" if dense_ms > 1.5 * _SPARSE_START_MS else "unlikely, too few tokens"
        return (
            f"{verdict} (on an H100 about {dense_ms:.2g} ms of dense attention a layer; a sparse call takes about "
            f"{_SPARSE_START_MS:g} ms whatever its sparsity)"
        )

    @property
    def transformer_gb(self) -> float:
        return 2 * self.num_parameters / 1e9

    @property
    def vae_gb(self) -> float:
        return 2 * self.vae_parameters / 1e9
