"""Sample grids: what the averaged weights make of a few prompts, drawn while a run goes on."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sfumato.diffusion.guidance import Pair, cfg
from sfumato.diffusion.level import NoiseLevel, Prediction
from sfumato.diffusion.samplers import find_sampler
from sfumato.diffusion.spacings import Path as Levels
from sfumato.diffusion.spacings import find_spacing
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
) -> None:
    """Write a PNG with one row per prompt, its columns of different seeds, as the model draws by default.

    Without prompts there is one row without words.
    """
    prompts = [p for p in prompts or [""] for _ in range(columns)]
    x = torch.randn((len(prompts), *native.config.shape), generator=torch.Generator().manual_seed(0))
    defaults = native.config.defaults
    levels = find_spacing(defaults.spacing)(native.config.build_schedule(), defaults.steps)
    write_sheet(decode(drawn(native, prompts, x, levels, defaults.sampler)), columns, path)


@torch.no_grad()
def drawn(native: Native, prompts: list[str], x: Tensor, levels: Levels, sampler: str = "dpmpp-2m") -> Tensor:
    """Walk from x (B, C, h, w) along the levels under the model's own guidance."""
    native.eval()
    config, n = native.config, len(prompts)
    parameterization = config.build_parameterization()
    words = native.text.encode([*prompts, *[""] * n])

    def both(x: Tensor, level: NoiseLevel) -> tuple[Prediction, Prediction]:
        x = torch.cat([x, x])
        clock = torch.full((2 * n,), float(parameterization.clock(level)))
        prediction = parameterization(x, level, native.network(parameterization.gain(level) * x, clock, **words))
        wanted, plain = (Prediction(*(part.chunk(2)[i] for part in prediction)) for i in (0, 1))
        return wanted, plain

    pair = Pair(lambda x, level: both(x, level)[0], lambda x, level: both(x, level)[1], both)
    for step in find_sampler(sampler)(cfg(config.defaults.guidance)(pair), x, levels, torch.randn_like):
        x = step.x
    return x


def write_sheet(x: Tensor, columns: int, path: Path) -> None:
    """Write pictures (N, C, H, W) in [−1, 1] as a PNG of so many columns, row after row, white where they end."""
    x = torch.cat([x, x.new_ones(-len(x) % columns, *x.shape[1:])])
    cells = eight_bits(x)  # (N, C, H, W)
    c, h, w = cells.shape[1:]
    sheet = cells.reshape(-1, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(-1, columns * w, c)
    image = Image.fromarray(sheet.expand(-1, -1, 3).contiguous().numpy())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
