"""The dense kernel that diffusers' `set_attention_backend` chose for a module, which may bypass PyTorch's."""

from typing import Any

from torch import Tensor, nn

from sparsetune.attention.sites import DenseCall


class DenseKernel:
    """The dense kernel of one attention module; a `KernelSwitch`.

    diffusers keeps it on the module's processor, and falls back to its process-wide choice. A user may replace the
    processor at any time, also by one that always calls PyTorch's.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def dense(self) -> DenseCall | None:
        from diffusers.models.attention_dispatch import (
            AttentionBackendName,
            _AttentionBackendRegistry,
            dispatch_attention_fn,
        )

        if not self._has_choice:
            return None
        name = self._processor._attention_backend or _AttentionBackendRegistry._active_backend
        if name == AttentionBackendName.NATIVE:
            return None

        def dense(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, dropout: float, **options: Any) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            output: Tensor = dispatch_attention_fn(
                q, k, v, mask, dropout, **options, backend=AttentionBackendName(name)
            )
            return output.transpose(1, 2)

        return dense

    def to_native(self) -> Any:
        from diffusers.models.attention_dispatch import AttentionBackendName

        if not self._has_choice:
            return None
        processor = self._processor
        before = processor.__dict__.get("_attention_backend")
        processor._attention_backend = AttentionBackendName.NATIVE
        return before

    def restore(self, before: Any) -> None:
        if self._has_choice:
            self._processor._attention_backend = before

    @property
    def _processor(self) -> Any:
        return self._module.processor

    @property
    def _has_choice(self) -> bool:
        return hasattr(self._module.processor, "_attention_backend")


def dense_kernel(module: nn.Module) -> DenseKernel | None:
    """Return a module's choice of kernels; None where it has no processor to choose for."""
    return DenseKernel(module) if hasattr(module, "processor") else None
