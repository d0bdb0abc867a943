"""Sample grids: what the averaged weights make of a few prompts, drawn while a run goes on."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sfumato.diffusion.level import NoiseLevel, Prediction
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.spacings import SPACINGS
from sfumato.families.native import Native
from sfumato.files import write_atomically
from sfumato.pixels import eight_bits


@torch.no_grad()
def draw_grid(
    native: Native,
    prompts: list[str],
    path: Path,
    decode: Callable[[Tensor], Tensor] = lambda x: x,
    columns: int = 4,
    steps: int = 20,
) -> None:
    """Write a PNG with one row per prompt, its columns of different seeds, under classifier-free guidance."""
    native.eval()
    config = native.config
    schedule, parameterization = config.build_schedule(), config.build_parameterization()
    n = len(prompts) * columns
    prompts = [p for p in prompts for _ in range(columns)]
    words = native.text.encode([*prompts, *[""] * n])

    def denoise(x: Tensor, level: NoiseLevel) -> Prediction:
        both = torch.cat([x, x])
        clock = torch.full((2 * n,), float(parameterization.clock(level)))
        out = native.network(parameterization.gain(level) * both, clock, **words)
        prediction = parameterization(both, level, out)
        wanted, plain = (Prediction(*(part[i] for part in map(_halves, prediction))) for i in (0, 1))
        return plain.lerp(wanted, config.defaults.guidance)

    x: Any = torch.randn((n, *config.shape), generator=torch.Generator().manual_seed(0))
    for step in SAMPLERS["dpmpp-2m"](denoise, x, SPACINGS["trailing"](schedule, steps), torch.randn_like):
        x = step.x
    write_sheet(decode(x), columns, path)


def write_sheet(x: Tensor, columns: int, path: Path) -> None:
    """Write pictures (N, C, H, W) in [−1, 1] as a PNG of so many columns, row after row; N a multiple of them."""
    cells = eight_bits(x)  # (N, C, H, W)
    c, h, w = cells.shape[1:]
    sheet = cells.reshape(-1, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(-1, columns * w, c)
    image = Image.fromarray(sheet.expand(-1, -1, 3).contiguous().numpy())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(2)
