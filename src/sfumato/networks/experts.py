"""A mixture of experts that choose: each small perceptron works on those cells of a picture that it fits best.

    x ─ router ─ scores (E, N) ─ each expert's K best cells ─ perceptrons ─ weighed by their scores ─ sum per cell

More weights to remember with, at the cost of few: every expert is busy with the same number of cells, so that shapes
are fixed, nothing has to be balanced, and a picture comes out the same in any batch.

Sources: experts that choose their tokens (2202.09368); within one picture of a diffusion transformer (EC-DiT,
2410.02098); beside a feed-forward layer that every cell passes (DeepSeekMoE, 2401.06066, section 3.2); scores by a
sigmoid (2408.15664, section 2). Experts start at zero, so that they may be added to a trained network (2212.05055).

Shapes: B pictures, N cells, D width, E experts of hidden width H, K cells each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """E perceptrons, each for the cells (B, K, D) of every picture that it scores highest.

    Args:
        share: how many experts a cell gets on average: K = N · share / E, rounded up, at most N.
    """

    def __init__(self, dim: int, experts: int, hidden: int, share: float):
        super().__init__()
        self.share = share
        self.router = nn.Linear(dim, experts, bias=False)
        self.wide = nn.Parameter(torch.empty(experts, dim, hidden).uniform_(-(dim**-0.5), dim**-0.5))
        self.bias = nn.Parameter(torch.zeros(experts, 1, hidden))
        self.narrow = nn.Parameter(torch.zeros(experts, hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """The experts' sum (B, N, D) for x (B, N, D)."""
        b, n, d = x.shape
        scores, cells = self.choose(x)  # (B, E, K)
        taken = F.one_hot(cells, n).to(x.dtype)  # (B, E, K, N); products with it cost less than gathering's gradient
        own = (taken.flatten(1, 2) @ x).view(b, *cells.shape[1:], d).transpose(0, 1)  # (E, B, K, D)
        y = F.gelu(torch.baddbmm(self.bias.to(x.dtype), own.flatten(1, 2), self.wide.to(x.dtype)), approximate="tanh")
        y = torch.bmm(y, self.narrow.to(y.dtype)).view(own.shape).transpose(0, 1)  # (B, E, K, D)
        weighed = (y * scores[..., None].to(y.dtype)).flatten(1, 2)
        return taken.flatten(1, 2).transpose(1, 2).to(weighed.dtype) @ weighed

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each expert's best scores, in (0, 1), and the cells that have them: both (B, E, K)."""
        scores = torch.sigmoid(self.router(x).float()).transpose(1, 2)  # (B, E, N)
        n = x.shape[1]
        best = scores.topk(min(n, math.ceil(n * self.share / scores.shape[1])), dim=-1)
        return best.values, best.indices
