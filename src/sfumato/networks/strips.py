"""A convolution of a large picture in strips of rows: the same numbers, in less memory and, on a CPU, in less time.

    x ── norm ── SiLU ── enlarge ── pad ── convolve ──> y        a strip at a time, small enough for a cache

A layer sees all of its input: a strip gets the rows beyond its edges that the convolution reaches, and the group norm
takes its mean and variance over the whole picture before the first strip begins. So nothing differs from strip to strip
and there is no seam. What a layer at once would hold beside x and y, which is several times as much, is there for one
strip only.

Shapes: B pictures, C channels, H × W cells.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.fused import norm_silu
from sfumato.networks.statistics import affine, apply

STRIP = 1 << 20  # numbers in a picture's strip: 4 MiB of float32


def convolve(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.GroupNorm | None = None,
    *,
    up: int = 1,
    edges: tuple[int, int, int, int] | None = None,
    over: bool = False,
    onto: Tensor | None = None,
) -> Tensor:
    """conv(SiLU(norm(x))): (B, C, H, W) → (B, C', H', W'); in strips where x is large and nothing is to be learned.

    Args:
        norm: None for conv(x).
        up: how many times x is enlarged by repetition before the convolution.
        edges: zeros to put around it: left, right, above, below; by default as the convolution's own padding.
        over: whether x is not needed any more, so that the result may lie where x does.
        onto: what to add the result to, which may be done in place.
    """
    sides = edges or (conv.padding[1],) * 2 + (conv.padding[0],) * 2  # type: ignore[operator]
    left, right, above, below = (int(n) for n in sides)
    (kernel, kernel_across), stride = conv.kernel_size, conv.stride[0]
    height, width = up * x.shape[-2], up * x.shape[-1]
    out_height = (height + above + below - kernel) // stride + 1
    out_width = (width + left + right - kernel_across) // stride + 1
    row = max(x.shape[1] * stride * width, conv.out_channels * out_width)  # numbers
    count = min(math.ceil(out_height * row / STRIP), out_height // max(1, above))
    if count < 2 or torch.is_grad_enabled() or not x.is_contiguous():
        y = x if norm is None else norm_silu(x, norm)
        y = y if up == 1 else F.interpolate(y, scale_factor=up, mode="nearest")
        y = conv(y) if edges is None else F.conv2d(F.pad(y, edges), conv.weight, conv.bias, conv.stride)
        return y if onto is None else onto + y

    normal = None if norm is None else affine(x, norm)
    fits = over and (conv.out_channels, out_height, out_width) == x.shape[1:]
    shape = (len(x), conv.out_channels, out_height, out_width)
    out = onto if onto is not None else x if fits else x.new_empty(shape)
    kept = x[:, :, :0]  # rows of x that have been written over and are needed still
    bounds = [round(i * out_height / count) for i in range(count + 1)]
    for start, stop in pairwise(bounds):
        first, last = start * stride - above, (stop - 1) * stride - above + kernel  # rows of the enlarged x
        top, bottom = max(0, first), min(height, last)
        begin, end = top // up, -(-bottom // up)  # rows of x
        y = x[:, :, begin:end]
        if out is x:
            y = torch.cat([kept, x[:, :, start:end]], 2) if start else y
            kept = x[:, :, max(0, stop * stride - above) : stop].clone()
        if normal is not None:
            y = F.silu(apply(y, *normal), inplace=True)
        if up > 1:
            y = F.interpolate(y, scale_factor=up, mode="nearest")[:, :, top - begin * up : bottom - begin * up]
        side = min(left, right)
        if any(zeros := (left - side, right - side, top - first, last - bottom)):
            y = F.pad(y, zeros)
        y = F.conv2d(y, conv.weight, conv.bias, conv.stride, (0, side))
        if onto is None:
            out[:, :, start:stop] = y
        else:
            out[:, :, start:stop] += y
    return out
