"""A module's dense kernel as `set_attention_backend` chose it, which may not pass PyTorch's attention."""

from typing import Any

from torch import Tensor, nn

from sparsetune.attention.sites import DenseCall


class DenseKernel:
    """The choice of one attention module; a `KernelSwitch`.

    diffusers keeps it on the module's processor, and falls back to its process-wide one.

    Args:
        module: the attention module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def dense(self) -> DenseCall | None:
        """Give the kernel that is chosen now; None where it is PyTorch's."""
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

        name = self._processor._attention_backend or _AttentionBackendRegistry._active_backend
        if name == AttentionBackendName.NATIVE:
            return None

        def dense(
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
            from diffusers.models.attention_dispatch import dispatch_attention_fn

            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            output: Tensor = dispatch_attention_fn(
                q, k, v, mask, dropout, is_causal, scale, enable_gqa, backend=AttentionBackendName(name)
            )
            return output.transpose(1, 2)

        return dense

    def to_native(self) -> Any:
        """Choose PyTorch's; return what `restore` needs."""
        from diffusers.models.attention_dispatch import AttentionBackendName

        processor = self._processor
        before = processor.__dict__.get("_attention_backend")
        processor._attention_backend = AttentionBackendName.NATIVE
        return before

    def restore(self, before: Any) -> None:
        """Choose again what was chosen before."""
        self._processor._attention_backend = before

    @property
    def _processor(self) -> Any:
        return self._module.processor


def dense_kernel(module: nn.Module) -> DenseKernel | None:
    """Give a module's choice of kernels; None where its processor has none and always calls PyTorch's."""
    return DenseKernel(module) if hasattr(getattr(module, "processor", None), "_attention_backend") else None
