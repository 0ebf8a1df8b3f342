"""Muon: steepest descent in the spectral norm, for the matrices of the blocks (Keller Jordan, "Muon", 2024).

PyTorch's own `torch.optim.Muon` computes in bfloat16, which is slow on a CPU without hardware for it; this one uses
float32 and handles all matrices of one shape at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Coefficients of the quintic Newton-Schulz iteration, from the source named above.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (n, rows, columns) with their singular values brought near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; scaled so that learning rates of AdamW fit (arXiv:2502.16982)."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            same_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - momentum)
                same_shape[weight.shape].append((weight, weight.grad.lerp(mean, momentum)))
            for shape, pairs in same_shape.items():
                updates = orthogonalized(torch.stack([update for _, update in pairs]))
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.mul_(1 - lr * group["decay"])
                    weight.add_(update, alpha=-lr * 0.2 * max(shape) ** 0.5)
