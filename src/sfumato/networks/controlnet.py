"""ControlNet (2302.05543): a copy of a U-Net's way down that reads a control picture and adds to its skip connections.

    hint (B, 3, f·H, f·W) ─ convolutions ─> (B, C₀, H, W) ─ + ─ [way down] ─ middle ─ zero convolutions ─> control
    x (B, C, H, W) ───────── convolution ──────────────────┘

Its last convolutions start at zero, so that at first it changes nothing. Modules are named as in the published folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.sd_unet import Contraction, Prompt, SDUNet, SDUNetConfig


@dataclass(frozen=True)
class ControlNetConfig:
    """The shape of a ControlNet.

    Args:
        unet: that of the U-Net it was copied from; of its way up nothing is used.
        hint_channels: of the control picture.
        hint_widths: channels after each halving of the control picture, the whole one first.
    """

    unet: SDUNetConfig = field(default_factory=SDUNetConfig)
    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)

    @property
    def factor(self) -> int:
        """Pixels of the control picture per side of one of x's cells."""
        return 2 ** (len(self.hint_widths) - 1)


class Hint(nn.Module):
    """The control picture as large as x: (B, 3, f·H, f·W) → (B, C₀, H, W)."""

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        widths = config.hint_widths
        self.conv_in = nn.Conv2d(config.hint_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for a, b in pairwise(widths):
            self.blocks += [nn.Conv2d(a, a, 3, padding=1), nn.Conv2d(a, b, 3, padding=1, stride=2)]
        self.conv_out = nn.Conv2d(widths[-1], config.unet.widths[0], 3, padding=1)

    def forward(self, hint: Tensor) -> Tensor:
        """Apply."""
        y = F.silu(self.conv_in(hint))
        for block in self.blocks:
            y = F.silu(block(y))
        return self.conv_out(y)


class ControlNet(Contraction):
    """What a control picture adds to a U-Net's skip connections and to its middle."""

    def __init__(self, config: ControlNetConfig):
        super().__init__(config.unet)
        self.controlnet_cond_embedding = Hint(config)
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(w, w, 1) for w in self.skip_widths)
        self.controlnet_mid_block = nn.Conv2d(config.unet.widths[-1], config.unet.widths[-1], 1)

    def forward(
        self,
        x: Tensor,
        clock: Tensor,
        context: Tensor,
        hint: Tensor,
        scale: Tensor,
        mask: Tensor | None = None,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> list[Tensor]:
        """One tensor for each skip connection, in order of making, and one for the middle, times ``scale`` (B,).

        ``hint`` is in [0, 1]; the rest is what the U-Net is told.
        """
        embedding = self.embed(clock, pooled, sizes, None, None)
        h = self.conv_in(x) + self.controlnet_cond_embedding(hint)
        h, skips = self.contract(h, embedding, Prompt(context, mask))
        told = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        scale = scale.to(h.dtype)[:, None, None, None]
        return [y * scale for y in (*told, self.controlnet_mid_block(h))]


class Controlled(nn.Module):
    """A U-Net with K ControlNets beside it, which add up.

    ``hint`` and ``hint_scale`` join its conditioning, and may be left out.
    """

    def __init__(self, unet: SDUNet, controlnets: Sequence[ControlNet]):
        super().__init__()
        self.unet, self.controlnets = unet, nn.ModuleList(controlnets)

    def forward(
        self,
        x: Tensor,
        clock: Tensor,
        context: Tensor,
        hint: Tensor | None = None,
        hint_scale: Tensor | None = None,
        **told: Tensor,
    ) -> Tensor:
        """The U-Net's output (B, C_out, H, W) under words and control pictures (B, K, 3, f·H, f·W), scaled by (B, K).

        A ControlNet whose scale is 0 in the whole batch is not called.
        """
        control: list[Tensor] | None = None
        if hint is not None and hint_scale is not None:
            shared = {k: v for k, v in told.items() if k in ("mask", "pooled", "sizes")}
            for k, net in enumerate(self.controlnets):
                if hint_scale[:, k].any():
                    more = net(x, clock, context, hint[:, k], hint_scale[:, k], **shared)
                    control = more if control is None else [a + b for a, b in zip(control, more, strict=True)]
        return self.unet(x, clock, context, control=control, **told)
