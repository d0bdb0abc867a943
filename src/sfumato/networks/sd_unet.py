"""The U-Net of Stable Diffusion 1, 2 and XL: latent diffusion's (2112.10752), with SDXL's conditioning (2307.01952).

    x ─ conv ─ [ConvBlock, Transformer]×n ─ ↓ ─ … ─ [ … ] ─ middle ─ [ … ] ─ … ─ ↑ ─ [ConvBlock, Transformer]×(n+1)
                      └──────────────────────── skip connections ─────────────────────┘

Shapes: x (B, C, H, W), clock (B,), context (B, M, D), pooled (B, P), sizes (B, 6). Modules are named as in the
published folders of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.blocks import (
    ConvBlock,
    CrossAttention,
    Downsample,
    GroupNorm,
    Perceptron,
    ProjectedFeedForward,
    Upsample,
    attend,
    sinusoids,
)
from sfumato.networks.fused import norm_silu

Depth: TypeAlias = "int | tuple[int, ...]"


@dataclass(frozen=True)
class SDUNetConfig:
    """The U-Net's shape; sequences have one entry per resolution, finest first.

    Args:
        depth: transformer layers after each residual block, or a number for each; 0 where there is no attention.
        depth_up: the same for the way up, coarsest first.
        depth_middle: of the middle, 0 for none; ``middle`` says whether there is a middle at all.
        linear: whether cells are projected into the transformer by a linear layer (2, XL) or a 1×1 convolution (1).
        size_dim: width of the sinusoids of each of SDXL's sizes; ``vector`` is the length of its whole vector, of
            which pooled words take the rest; 0 without.
        classes: number of classes embedded along with the time, as the ×4 upscaler's noise levels; 0 for none.
        guidance_dim: width of the embedded guidance that distilled networks take; 0 for none.
    """

    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    depth: tuple[Depth, ...] = (1, 1, 1, 0)
    depth_up: tuple[Depth, ...] = (0, 1, 1, 1)
    depth_middle: int = 1
    middle: bool = True
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: tuple[int, ...] = (768, 768, 768, 768)
    self_attention: tuple[bool, ...] = (True, True, True, True)
    linear: bool = False
    size_dim: int = 0
    vector: int = 0
    classes: int = 0
    guidance_dim: int = 0
    groups: int = 32
    eps: float = 1e-5
    sines_first: bool = False
    frequency_shift: float = 0.0

    def __post_init__(self) -> None:
        for name in ("blocks", "depth", "depth_up", "heads", "context_dim", "self_attention"):
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(f"a U-Net of {len(self.widths)} resolutions needs as many entries in {name}")
        middle = (0,) * (len(self.widths) - 1) + (self.depth_middle,)
        for width, heads, *depths in zip(
            self.widths, self.heads, self.depth, reversed(self.depth_up), middle, strict=True
        ):
            if width % self.groups:
                raise ValueError(f"width {width} is not a multiple of {self.groups} groups")
            if any(depths) and width % heads:
                raise ValueError(f"width {width} is not a multiple of {heads} heads")
        for depths, extra in ((self.depth, 0), (reversed(self.depth_up), 1)):
            for depth, blocks in zip(depths, self.blocks, strict=True):
                if isinstance(depth, tuple) and len(depth) != blocks + extra:
                    raise ValueError(f"{blocks + extra} residual blocks need as many depths, not {len(depth)}")


class Prompt(NamedTuple):
    """What the cells attend to besides each other.

    Args:
        context: the words (B, M, D), and ``mask`` (B, M), true at real ones.
        tokens: a picture's tokens (B, K, D), and how closely to follow them, ``scale`` (B,).
    """

    context: Tensor
    mask: Tensor | None = None
    tokens: Tensor | None = None
    scale: Tensor | None = None


class PictureKeys(nn.Module):
    """An IP-Adapter's keys and values of a picture's tokens (B, K, D) for one layer, named as its files have them."""

    def __init__(self, context_dim: int, dim: int):
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, dim, bias=False)
        self.to_v_ip = nn.Linear(context_dim, dim, bias=False)


class PromptAttention(CrossAttention):
    """Attention to words and, where an IP-Adapter is attached as ``picture``, beside it to a picture's tokens."""

    def __init__(self, dim: int, heads: int, context_dim: int):
        super().__init__(dim, heads, context_dim)
        self.picture: PictureKeys | None = None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        tokens: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """out(attention to words + scale · attention to the picture) (2308.06721, equation 5): (B, N, D) → the same."""
        if self.picture is None or tokens is None or scale is None:
            return super().forward(x, context, mask)
        assert context is not None
        q, bias = self.to_q(x), None if mask is None else mask[:, None, None, :]
        words = attend(q, self.to_k(context), self.to_v(context), self.heads, bias)
        seen = attend(q, self.picture.to_k_ip(tokens), self.picture.to_v_ip(tokens), self.heads)
        return self.to_out[0](words + scale.to(seen.dtype)[:, None, None] * seen)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the words, feed-forward: (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, heads: int, context_dim: int, self_attention: bool):
        super().__init__()
        self.self_attention = self_attention
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1 = CrossAttention(dim, heads, None if self_attention else context_dim)
        self.attn2 = PromptAttention(dim, heads, context_dim)
        self.ff = ProjectedFeedForward(dim)

    def forward(self, x: Tensor, prompt: Prompt) -> Tensor:
        """Apply to the cells x under the words."""
        x = x + self.attn1(self.norm1(x), *(() if self.self_attention else (prompt.context, prompt.mask)))
        x = x + self.attn2(self.norm2(x), *prompt)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Transformer blocks over the cells of a picture, beside it: (B, C, H, W) → (B, C, H, W)."""

    def __init__(
        self, width: int, depth: int, heads: int, context_dim: int, self_attention: bool, config: SDUNetConfig
    ):
        super().__init__()
        self.linear = config.linear
        self.norm = GroupNorm(config.groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, context_dim, self_attention) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, prompt: Prompt) -> Tensor:
        """Apply to x under the words."""
        y = self.norm(x)
        if not self.linear:
            y = self.proj_in(y)
        y = y.flatten(2).transpose(1, 2)  # (B, H·W, C)
        if self.linear:
            y = self.proj_in(y)
        for block in self.transformer_blocks:
            y = block(y, prompt)
        if self.linear:
            y = self.proj_out(y)
        y = y.transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + (y if self.linear else self.proj_out(y))


class Level(nn.Module):
    """The blocks of one resolution; the one to the next resolution comes last."""

    def __init__(
        self,
        inputs: Sequence[int],
        width: int,
        embedding: int,
        level: int,
        depth: Depth,
        config: SDUNetConfig,
        *,
        down: bool = False,
        up: bool = False,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(ConvBlock(n, width, embedding, config.groups, config.eps) for n in inputs)
        heads, context_dim, own = config.heads[level], config.context_dim[level], config.self_attention[level]
        if depth:
            depths = depth if isinstance(depth, tuple) else (depth,) * len(inputs)
            self.attentions = nn.ModuleList(Transformer(width, n, heads, context_dim, own, config) for n in depths)
        if down:
            self.downsamplers = nn.ModuleList([Downsample(width)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(width)])

    def apply_block(self, i: int, x: Tensor, embedding: Tensor, prompt: Prompt) -> Tensor:
        """Apply residual block i and the attention after it."""
        x = self.resnets[i](x, embedding)
        return self.attentions[i](x, prompt) if hasattr(self, "attentions") else x


class Middle(nn.Module):
    """Residual blocks around attention, at the coarsest resolution; without attention there is but one."""

    def __init__(self, embedding: int, config: SDUNetConfig):
        super().__init__()
        width = config.widths[-1]
        blocks = 2 if config.depth_middle else 1
        self.resnets = nn.ModuleList(
            ConvBlock(width, width, embedding, config.groups, config.eps) for _ in range(blocks)
        )
        if config.depth_middle:
            self.attentions = nn.ModuleList(
                [Transformer(width, config.depth_middle, config.heads[-1], config.context_dim[-1], True, config)]
            )

    def forward(self, x: Tensor, embedding: Tensor, prompt: Prompt) -> Tensor:
        """(B, C, H, W) → the same shape."""
        x = self.resnets[0](x, embedding)
        if hasattr(self, "attentions"):
            x = self.resnets[1](self.attentions[0](x, prompt), embedding)
        return x


class Contraction(nn.Module):
    """The way down and the middle, which a U-Net and its ControlNets have alike."""

    def __init__(self, config: SDUNetConfig):
        super().__init__()
        self.config = c = config
        embedding = 4 * c.widths[0]
        self.conv_in = nn.Conv2d(c.in_channels, c.widths[0], 3, padding=1)
        self.time_embedding = Perceptron(c.widths[0], embedding, c.guidance_dim)
        if c.classes:
            self.class_embedding = nn.Embedding(c.classes, embedding)
        if c.vector:
            self.add_embedding = Perceptron(c.vector, embedding)

        last = len(c.widths) - 1
        self.down_blocks = nn.ModuleList()
        self.skip_widths = [c.widths[0]]  # channels of each skip connection, in order of making
        for i, width in enumerate(c.widths):
            inputs = [self.skip_widths[-1]] + [width] * (c.blocks[i] - 1)
            self.down_blocks.append(Level(inputs, width, embedding, i, c.depth[i], c, down=i < last))
            self.skip_widths += [width] * (c.blocks[i] + (i < last))
        self.mid_block = Middle(embedding, c) if c.middle else None

    def contract(self, h: Tensor, embedding: Tensor, prompt: Prompt) -> tuple[Tensor, list[Tensor]]:
        """From what ``conv_in`` gave to the middle's output and all skip connections, in order of making."""
        skips = [h]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                h = level.apply_block(i, h, embedding, prompt)
                skips.append(h)
            if hasattr(level, "downsamplers"):
                h = level.downsamplers[0](h)
                skips.append(h)
        if self.mid_block is not None:
            h = self.mid_block(h, embedding, prompt)
        return h, skips

    def embed(
        self,
        clock: Tensor,
        pooled: Tensor | None,
        sizes: Tensor | None,
        classes: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """The embedding (B, E), through its SiLU, by which every residual block is shifted."""
        c = self.config
        embedding = self.time_embedding(self._sinusoids(clock, c.widths[0]), guidance)
        if c.classes:
            if classes is None:
                raise ValueError("this U-Net needs classes")
            embedding = embedding + self.class_embedding(classes)
        if c.vector:
            if pooled is None or sizes is None:
                raise ValueError("this U-Net needs pooled words and sizes")
            waves = self._sinusoids(sizes.flatten(), c.size_dim).reshape(len(sizes), -1)  # (B, 6·size_dim)
            embedding = embedding + self.add_embedding(torch.cat([pooled, waves.to(pooled.dtype)], dim=-1))
        return F.silu(embedding)

    def _sinusoids(self, t: Tensor, dim: int) -> Tensor:
        return sinusoids(t, dim, self.config.frequency_shift, self.config.sines_first)


class SDUNet(Contraction):
    """Split noisy latents, told their noise level by the clock and their content by words."""

    def __init__(self, config: SDUNetConfig):
        super().__init__(config)
        c, embedding, skips = config, 4 * config.widths[0], list(self.skip_widths)
        self.up_blocks = nn.ModuleList()
        channels = c.widths[-1]
        for k, i in enumerate(reversed(range(len(c.widths)))):
            inputs = []
            for _ in range(c.blocks[i] + 1):
                inputs.append(channels + skips.pop())
                channels = c.widths[i]
            self.up_blocks.append(Level(inputs, channels, embedding, i, c.depth_up[k], c, up=i > 0))
        self.conv_norm_out = GroupNorm(c.groups, c.widths[0], c.eps)
        self.conv_out = nn.Conv2d(c.widths[0], c.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        clock: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        classes: Tensor | None = None,
        guidance: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
        picture: Tensor | None = None,
        image_tokens: Tensor | None = None,
        image_scale: Tensor | None = None,
    ) -> Tensor:
        """Return the network's output (B, C_out, H, W); its meaning is the parameterization's affair.

        Args:
            x: noisy latents, any H and W.
            mask: (B, M), true at real words.
            pooled, sizes: SDXL's pooled words, and its original height, width, crop top, left, target height, width.
            classes: class numbers (B,), where the network has classes.
            guidance: embedded guidance scale (B, guidance_dim), for networks distilled with it.
            control: one tensor to add to each skip connection, in order of making, and one to the middle.
            picture: for networks that inpaint, the mask and the masked picture's latents (B, 1 + C, H, W).
            image_tokens, image_scale: with an IP-Adapter, a picture's tokens (B, K, D) and how closely to follow them
                (B,).
        """
        embedding = self.embed(clock, pooled, sizes, classes, guidance)
        noisy = x if picture is None else torch.cat([x, picture], dim=1)
        prompt = Prompt(context, mask, image_tokens, image_scale)
        h, skips = self.contract(self.conv_in(noisy), embedding, prompt)
        if control is not None:
            skips = [a + b for a, b in zip(skips, control[:-1], strict=True)]
            h = h + control[-1]
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                h = level.apply_block(i, torch.cat([h, skips.pop()], dim=1), embedding, prompt)
            if hasattr(level, "upsamplers"):
                h = level.upsamplers[0](h, skips[-1].shape[-2:])
        return self.conv_out(norm_silu(h, self.conv_norm_out))
