"""Optimizer without host synchronization, so that CUDA graphs can capture it: Muon for matrices, AdamW otherwise."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return approximately the nearest (semi-)orthogonal matrices of a batch (n, rows, columns).

    Five Newton-Schulz steps with Muon's quintic coefficients (Jordan et al. 2024): the resulting
    singular values are in about [0.7, 1.2], which is accurate enough for Muon.
    """
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    orthogonal: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return orthogonal


class MuonAdamW:
    """Muon with Nesterov momentum for selected weights, AdamW for all others.

    Convolution kernels are treated as matrices (out, in x kernel). `lr_scale` is a tensor that the
    caller sets before each step. `gradient` (parameters,) holds all gradients, to which backward adds.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        is_matrix: Callable[[str, Tensor], bool],
        muon_lr: float,
        adam_lr: float,
        weight_decay: float = 0.01,
    ) -> None:
        """Split the parameters of all modules into Muon groups by shape and one AdamW group."""
        named = [item for module in modules for item in module.named_parameters()]
        self.params: list[Tensor] = [p for _, p in named]
        self.gradient = torch.zeros(sum(p.numel() for p in self.params), device=self.params[0].device)
        offset = 0
        for p in self.params:
            p.grad = self.gradient[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        self.lr_scale = torch.zeros((), device=self.params[0].device)
        self._muon_lr, self._adam_lr, self._decay = muon_lr, adam_lr, weight_decay
        groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for name, p in named:
            if is_matrix(name, p):
                groups[tuple(p.shape)].append(p)
        self._muon = list(groups.values())
        self._momentum = [torch.zeros(len(g), *g[0].flatten(1).shape, device=g[0].device) for g in self._muon]
        matrices = {id(p) for group in self._muon for p in group}
        self._adam = [p for p in self.params if id(p) not in matrices]
        self._mean = [torch.zeros_like(p) for p in self._adam]
        self._square = [torch.zeros_like(p) for p in self._adam]
        self._count = torch.zeros((), device=self.lr_scale.device)

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        self.gradient.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient."""
        for group, momentum in zip(self._muon, self._momentum, strict=True):
            self._step_muon(group, momentum)
        self._step_adam()

    def _step_muon(self, group: list[Tensor], momentum: Tensor) -> None:
        gradient = torch.stack([_grad(p).flatten(1) for p in group])
        momentum.lerp_(gradient, 0.05)
        update = orthogonalise(gradient.lerp(momentum, 0.95))
        rows, columns = update.shape[-2:]
        lr = self.lr_scale * (self._muon_lr * max(1.0, rows / columns) ** 0.5)
        torch._foreach_mul_(group, 1 - self.lr_scale * (self._muon_lr * self._decay))
        steps = [u.view_as(p) for u, p in zip((update * -lr).unbind(), group, strict=True)]
        torch._foreach_add_(group, steps)

    def _step_adam(self, beta1: float = 0.9, beta2: float = 0.98, eps: float = 1e-8) -> None:
        self._count += 1
        gradients = [_grad(p) for p in self._adam]
        torch._foreach_lerp_(self._mean, gradients, 1 - beta1)
        torch._foreach_mul_(self._square, beta2)
        torch._foreach_addcmul_(self._square, gradients, gradients, 1 - beta2)
        denominator = torch._foreach_div(self._square, 1 - beta2**self._count)
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, eps)
        update = list(torch._foreach_div(self._mean, denominator))
        torch._foreach_mul_(update, -self.lr_scale * self._adam_lr / (1 - beta1**self._count))
        torch._foreach_add_(self._adam, update)


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None, "backward must come before step"
    return p.grad
