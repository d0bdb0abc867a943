"""Group norm and SiLU as one function that learns in few passes over memory.

On a CPU a norm of a large batch takes as long as memory does. As two operations, of tensors laid out channels last, it
goes over all of x some ten times, forward and backward. Here a few pictures stay in the cache from the first operation
to the last, and no more than the input is kept for the way back.

Shapes: B pictures, C channels, H × W cells; b pictures at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LARGE = 1 << 20  # numbers that no cache keeps from one operation to the next
CACHED = 1 << 18  # numbers of a few pictures


def learns_on_cpu(x: Tensor) -> bool:
    """Whether gradients of x are wanted, on a CPU."""
    return x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled()


def channels_last(x: Tensor) -> bool:
    """Whether a map (B, C, H, W) is laid out channels last alone, not both ways at once."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def norm_silu(x: Tensor, norm: nn.GroupNorm, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """SiLU(norm(x)·(1 + scale) + shift): (B, C, H, W) → the same; scale and shift (B, C), both or neither."""
    if x.numel() >= LARGE and learns_on_cpu(x) and channels_last(x) and not torch.compiler.is_compiling():
        w, b = norm.weight[None, None], norm.bias[None, None]  # (1, 1, C)
        if scale is not None and shift is not None:
            w, b = w * (1 + scale[:, None]), b * (1 + scale[:, None]) + shift[:, None]  # (B, 1, C)
        return _NormSiLU.apply(x, w, b, norm.num_groups, norm.eps)  # pyright: ignore[reportReturnType]
    y = norm(x)
    if scale is not None and shift is not None:
        y = y * (1 + scale[..., None, None]) + shift[..., None, None]
    return F.silu(y)


class _NormSiLU(torch.autograd.Function):
    """y = SiLU(z), z = w·n + b, n = (x − mean)/deviation over each group of channels; w and b (B or 1, 1, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float) -> Tensor:
        y = torch.empty_like(x)  # channels last, as x
        means: list[Tensor] = []
        rates: list[Tensor] = []  # 1/deviation
        for part, into, own_w, own_b in _few(x, y, w, b):
            wide = part.to(_wide(w))
            means.append(_over_groups(wide.mean(1, keepdim=True), groups))
            n = wide - means[-1]
            rates.append(_over_groups(n.square().mean(1, keepdim=True), groups).add_(eps).rsqrt_())
            into.copy_(F.silu(torch.addcmul(own_b, n, rates[-1] * own_w, out=n), inplace=True))
        ctx.groups = groups
        ctx.save_for_backward(x, w, b, torch.cat(means), torch.cat(rates))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, w, b, mean, rate = ctx.saved_tensors
        dx = torch.empty_like(x)
        by_w: list[Tensor] = []
        by_b: list[Tensor] = []
        dy = dy.contiguous(memory_format=torch.channels_last)
        for part, slope, into, own_w, own_b, own_mean, own_rate in _few(x, dy, dx, w, b, mean, rate):
            n = (part - own_mean).mul_(own_rate)
            dz = torch.ops.aten.silu_backward(slope.to(n.dtype), z := torch.addcmul(own_b, n, own_w))
            by_b.append(dz.sum(1, keepdim=True))
            by_w.append(torch.mul(dz, n, out=z).sum(1, keepdim=True))
            # dx = (w·dz − mean(w·dz) − n·mean(w·dz·n))/deviation, with means over the group
            along, level = (_over_groups(own_w * s[-1] / part.shape[1], ctx.groups) for s in (by_w, by_b))
            torch.mul(dz.mul_(own_w).sub_(n.mul_(along).add_(level)), own_rate, out=into)
        dw, db = (torch.cat(parts) if len(w) == len(x) else torch.cat(parts).sum(0, True) for parts in (by_w, by_b))
        return dx, dw, db, None, None


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _over_groups(x: Tensor, groups: int) -> Tensor:
    """Average (b, 1, C) over each group of channels, for every channel of it: (b, 1, C)."""
    return x.unflatten(2, (groups, -1)).mean(3, keepdim=True).expand(-1, -1, -1, x.shape[2] // groups).flatten(2)


def _few(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors into a few pictures each: maps (B, C, H, W) as (b, H·W, C), vectors (B or 1, 1, C) as they are."""
    count = max(1, CACHED // x[0].numel())
    for start in range(0, len(x), count):
        yield tuple(_cells(t[start : start + count]) if len(t) == len(x) else t for t in (x, *others))


def _cells(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1).flatten(1, 2) if t.ndim == 4 else t
