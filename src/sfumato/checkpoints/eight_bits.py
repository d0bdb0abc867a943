"""Weights as whole numbers of eight bits: half of fp16's size, at about 1 % of a row's deviation.

    name        I8   (…, N)   q, −127 to 127          kernels: (O, I, h, w)
    name_scale  F16  (…, 1)   s of each row;  weight = q · s        (O, 1, 1, 1)

Source: symmetric quantization by each row's largest number (LLM.int8(), 2208.07339, section 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sfumato.errors import BadCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

SCALE = "_scale"


def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return a weight (…, N), or a kernel, as the two tensors that stand for it, with an error of at most s / 2.

    Raises ValueError for what no scale of fp16 holds: NaN, and numbers of 8.3e6 or more.
    """
    import torch

    w = weight.detach().float()
    wanted = w.abs().amax((1, 2, 3) if w.ndim == 4 else -1, keepdim=True) / 127
    scale = wanted.half()
    scale = torch.where(scale < wanted, (scale.view(torch.int16) + 1).view(torch.half), scale)  # up: nothing is clipped
    if not scale.isfinite().all():
        raise ValueError(f"{name}: holds numbers that eight bits and a scale of fp16 do not")
    q = torch.where(scale > 0, w / scale.float(), 0.0).round().to(torch.int8)
    return {name: q, name + SCALE: scale}


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors, what ``pack`` made of some as float32 again; BadCheckpoint where a scale is missing or wrong."""
    import torch

    whole = {name: t for name, t in tensors.items() if t.dtype == torch.int8}
    result = {name: t for name, t in tensors.items() if name not in whole and name.removesuffix(SCALE) not in whole}
    for name, q in whole.items():
        scale = tensors.get(name + SCALE)
        rows = (q.shape[0], 1, 1, 1) if q.ndim == 4 else (*q.shape[:-1], 1)
        if scale is None or not scale.is_floating_point() or scale.shape != rows:
            told = "none" if scale is None else f"{scale.dtype} {list(scale.shape)}"
            raise BadCheckpoint(f"{name} is of eight bits {list(q.shape)}, and its scale is {told}")
        result[name] = q.float() * scale.float()
    return result
