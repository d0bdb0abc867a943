"""A transformer over patches of latents, told the noise level by modulation and its content by words.

    x ─ patches ─ + positions ─ [self-attention · attention to the words · feed-forward]×n ─ norm ─ linear ─ unpatch

Sources: DiT (2212.09748) for the modulated blocks; PixArt-α (2310.00426, section 2.3) for one modulation shared by all
blocks, to which each adds a table of its own, and for words by cross-attention; queries and keys are normalized
(2302.05442).

Shapes: B pictures, C channels, N patches of width D, M words of width E.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.blocks import RMSNorm, TimeEmbedding, dot_product_attention, of_vectors, split_heads, zero
from sfumato.networks.dit import Patches, position_sinusoids
from sfumato.networks.experts import Experts
from sfumato.networks.modulated import modulated, unpatch


@dataclass(frozen=True)
class WordedConfig:
    """The network's shape.

    Args:
        size: side of the latents it is trained on, to which positions are scaled.
        word_heads: heads of the cross-attention, as wide as those of the self-attention; fewer make it cheaper.
        context_dim: width E of the words.
        clock_scale: brings the clock to about 0…1000.
        experts: small perceptrons beside each block's feed-forward layer, of hidden width ``expert_dim``, of which a
            patch gets ``expert_share`` on average.
    """

    in_channels: int = 16
    patch: int = 2
    size: int = 8
    dim: int = 320
    layers: int = 8
    heads: int = 5
    word_heads: int = 2
    context_dim: int = 256
    clock_scale: float = 1000.0
    experts: int = 0
    expert_dim: int = 416
    expert_share: float = 2.0

    def __post_init__(self) -> None:
        if self.experts < 0 or (self.experts and not (self.expert_dim > 0 and 0 < self.expert_share <= self.experts)):
            raise ValueError(
                f"{self.experts} experts of width {self.expert_dim}, {self.expert_share} for each patch: there must be "
                "none or more, their width positive, their share above 0 and at most their number"
            )
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(f"width {self.dim} is not a multiple of 4 and of {self.heads} heads")

    @property
    def multiple(self) -> int:
        """The sides of x are multiples of this."""
        return self.patch


class WordedAttention(nn.Module):
    """Attention of x (B, N, D) over itself or over words (B, M, E)."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None = None):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=False)
        self.norm_q, self.norm_k = RMSNorm(head_dim), RMSNorm(head_dim)
        self.to_out = zero(nn.Linear(inner, dim))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend; ``mask`` (B, M) is true at the real words."""
        q, k, v = self.project(x, context)
        y = dot_product_attention(q, k, v, None if mask is None else mask[:, None, None, :])
        return self.to_out(y.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized queries (B, heads, N, d) of x; keys, normalized, and values (B, heads, M, d) of the context."""
        source = x if context is None else context
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(x), self.to_k(source), self.to_v(source)))
        return self.norm_q(q), self.norm_k(k), v


class WordedBlock(nn.Module):
    """Self-attention, cross-attention to the words, feed-forward; the first and the last are modulated and gated."""

    def __init__(self, config: WordedConfig):
        super().__init__()
        dim, head_dim = config.dim, config.dim // config.heads
        self.table = nn.Parameter(torch.zeros(6, dim))
        self.attention = WordedAttention(dim, config.heads, head_dim)
        self.norm = nn.LayerNorm(dim)
        self.cross_attention = WordedAttention(dim, config.word_heads, head_dim, dim)
        self.wide = nn.Linear(dim, 4 * dim)
        self.narrow = zero(nn.Linear(4 * dim, dim))
        few = (config.experts, config.expert_dim, config.expert_share)
        self.experts = Experts(dim, *few) if config.experts else None
        with torch.no_grad():
            self.table[2::3] = 1.0  # gates start open: the branches themselves start at zero

    def forward(self, x: Tensor, modulation: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, D) under a modulation (B, 6, D) and words (B, M, D)."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (modulation + self.table)[:, :, None].unbind(1)  # (B, 1, D)
        x = x + gate * self.attention(modulated(x, shift, scale))
        x = x + self.cross_attention(self.norm(x), context, mask)
        told = modulated(x, shift_ff, scale_ff)
        y = self.narrow(F.gelu(self.wide(told), approximate="tanh"))
        return x + gate_ff * (y if self.experts is None else y + self.experts(told))


class WordedTransformer(nn.Module):
    """Split noisy latents, told their noise level by the clock and their content by words."""

    def __init__(self, config: WordedConfig):
        super().__init__()
        self.config, dim = config, config.dim
        self.patches = Patches(config.in_channels, dim, config.patch)
        self.time = TimeEmbedding(256, dim, config.clock_scale)
        self.pooled = nn.Linear(config.context_dim, dim)
        self.words = nn.Linear(config.context_dim, dim)
        self.modulation = zero(nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WordedBlock(config) for _ in range(config.layers))
        self.state_widths = [dim] * config.layers  # of ``every_state``
        self.final = zero(nn.Linear(dim, 2 * dim))
        self.conv_out = zero(nn.Linear(dim, config.patch**2 * config.in_channels))

    def forward(
        self, x: Tensor, clock: Tensor, context: Tensor, mask: Tensor | None = None, pooled: Tensor | None = None
    ) -> Tensor:
        """Return (B, C, H, W) from x (B, C, H, W), clock (B,), words (B, M, E), their mask (B, M) and mean (B, E)."""
        return self.states(x, clock, context, mask, pooled)[0]

    def states(
        self, x: Tensor, clock: Tensor, context: Tensor, mask: Tensor | None = None, pooled: Tensor | None = None,
        layer: int = -1,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The output as ``forward`` returns it, and the states (B, N, D) after a layer, for what aligns them."""
        c, (h, w) = self.config, x.shape[-2:]
        states, embedding = self._pass(x, clock, context, mask, pooled)
        shift, scale = of_vectors(self.final, embedding)[:, None].chunk(2, dim=-1)
        return unpatch(self.conv_out(modulated(states[-1], shift, scale)), c.patch, h, w), states[layer]

    def every_state(
        self, x: Tensor, clock: Tensor, context: Tensor, mask: Tensor | None = None, pooled: Tensor | None = None
    ) -> list[Tensor]:
        """The states (B, N, D) after each layer: what the network sees in x."""
        return self._pass(x, clock, context, mask, pooled)[0]

    def _pass(
        self, x: Tensor, clock: Tensor, context: Tensor, mask: Tensor | None, pooled: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """The states after each layer, and the embedding (B, D) that told them their noise level."""
        c, (h, w) = self.config, x.shape[-2:]
        if pooled is None:
            real = torch.ones(context.shape[:2], device=context.device) if mask is None else mask
            pooled = (context * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        embedding = F.silu(self.time(clock) + of_vectors(self.pooled, pooled))  # (B, D)
        modulation = of_vectors(self.modulation, embedding).unflatten(1, (6, -1))
        words = self.words(context)
        y = self.patches(x)
        y = y + position_sinusoids(c.dim, h // c.patch, w // c.patch, c.size // c.patch).to(y)
        states: list[Tensor] = []
        for block in self.blocks:
            y = block(y, modulation, words, mask)
            states.append(y)
        return states, embedding
