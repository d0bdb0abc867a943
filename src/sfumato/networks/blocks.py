"""Parts that every network shares: timestep embedding, normalization, attention.

Shapes: B pictures, C channels, H × W cells, N tokens of width D, M tokens of context.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.fused import channels_last, learns_on_cpu
from sfumato.networks.strips import STRIP, convolve


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of a time (B,) at geometric frequencies, as (B, dim) (DDPM, after Transformer section 3.5)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequencies  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def of_vectors(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer to vectors (B, D), one for each picture; in pairs, if nothing is to be learned.

    A product of few vectors with a matrix rounds by their number and, of a single one, by where the matrix lies in
    memory. In pairs, a picture's numbers are the same in every batch and from every file.
    """
    if torch.is_grad_enabled():
        return layer(x)
    even = x if len(x) % 2 == 0 else torch.cat([x, x[-1:]])
    return torch.cat([layer(pair) for pair in even.split(2)])[: len(x)]


class TimeEmbedding(nn.Module):
    """Sinusoids through a two-layer perceptron: clock (B,) → (B, out)."""

    def __init__(self, dim: int, out: int, scale: float = 1.0):
        super().__init__()
        self.dim, self.scale = dim, scale
        self.mlp = nn.Sequential(nn.Linear(dim, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, t: Tensor) -> Tensor:
        """Embed a clock (B,) that runs over about 0…1000 once scaled."""
        first, activation, last = self.mlp
        y = timestep_embedding(t * self.scale, self.dim).to(first.weight.dtype)
        return of_vectors(last, activation(of_vectors(first, y)))


class Attention(nn.Module):
    """Multi-head attention of x (B, N, D) over itself or over a context (B, M, D_context)."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim or dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend; ``mask`` (B, M) is true at the context's real tokens."""
        q, k, v = self.project(x, context)
        bias = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, M)
        return self.to_out(dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, N, D/heads) of x; keys and values (B, heads, M, D/heads) of the context."""
        k, v = (split_heads(y, self.heads) for y in self.to_kv(x if context is None else context).chunk(2, dim=-1))
        return split_heads(self.to_q(x), self.heads), k, v


class FeedForward(nn.Sequential):
    """Two linear layers around a GELU: (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, expansion: int = 4):
        super().__init__(nn.Linear(dim, expansion * dim), nn.GELU(approximate="tanh"), nn.Linear(expansion * dim, dim))


class GroupNorm(nn.GroupNorm):
    """Group normalization (Wu & He 1803.08494), in the memory layout that trains faster: (B, C, H, W) → the same."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x; its memory layout is kept."""
        if not (learns_on_cpu(x) and channels_last(x)):
            return super().forward(x)
        # Channels last, torch's loops run over the few channels of a group: 3 to 16 times slower than two copies.
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def group_norm(channels: int, groups: int = 32) -> GroupNorm:
    """Group normalization with as near to the usual number of groups as divides the channels."""
    return GroupNorm(math.gcd(groups, channels), channels)


def zero(module: nn.Module) -> nn.Module:
    """Zero a module's parameters, so that its residual branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def sinusoids(t: Tensor, dim: int, shift: float = 0.0, sines_first: bool = False) -> Tensor:
    """Sinusoids of a time (B,) as (B, dim), in the order of operations that the published networks were trained with.

    Rounding matters: at t = 999 another order differs by 1e-4. ``shift`` makes the last frequency 1e-4 itself (1) or
    the one before (0).
    """
    half = dim // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t.float()[:, None] * torch.exp(exponents)  # (B, dim/2)
    y = torch.cat([angles.sin(), angles.cos()] if sines_first else [angles.cos(), angles.sin()], dim=-1)
    return F.pad(y, (0, dim % 2))


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, *, causal: bool = False,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Multi-head attention of q (B, N, D) over k, v (B, M, D); ``mask`` broadcasts against (B, heads, N, M)."""
    q, k, v = (split_heads(y, heads) for y in (q, k, v))  # (B, heads, N, D/heads)
    y = dot_product_attention(q, k, v, mask, causal=causal, scale=scale)
    return y.transpose(1, 2).flatten(2)


def dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention of q (B, heads, N, D) over k, v (B, heads, M, D): (B, heads, N, D)."""
    if learns_on_cpu(q) and (q.dtype == torch.bfloat16 or q.shape[2] * k.shape[2] <= FEW):
        with torch.autocast("cpu", enabled=False):  # in float32 its way back is up to three times faster than in bf16
            wide = [y.float() if y.dtype == torch.bfloat16 else y for y in (q, k, v)]
            return _learning_attention(*wide, mask, causal, scale).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


FEW = 64 * 64  # pairs of tokens


def _learning_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    if q.shape[2] * k.shape[2] > FEW or causal:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    # Written out: over few tokens, its way back is up to ten times faster than the fused one's.
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)  # (B, heads, N, M)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1) @ v


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, D) → (B, heads, N, D/heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention of x (B, N, D) over itself or a context (B, M, D_context), with three projections of their own."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = False, inner: int = 0):
        super().__init__()
        self.heads, inner = heads, inner or dim
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend; ``mask`` (B, M) is true at the context's real tokens."""
        source = x if context is None else context
        bias = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, M)
        return self.to_out[0](attend(self.to_q(x), self.to_k(source), self.to_v(source), self.heads, bias))


class Projected(nn.Module):
    """A linear layer and the activation after it, named ``proj`` as the published weights have it."""

    def __init__(self, dim: int, out: int, activation: str):
        super().__init__()
        self.activation = activation
        self.proj = nn.Linear(dim, 2 * out if activation == "geglu" else out)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, out) by GELU, its tanh form, or GEGLU (Shazeer 2002.05202), whose second half is the gate."""
        x = self.proj(x)
        if self.activation == "geglu":
            x, gate = x.chunk(2, dim=-1)
            return x * F.gelu(gate)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu-tanh" else "none")


TOKENS = 1024  # for which weights may be fetched from their file anew: it takes a twentieth of what they are used for


class ProjectedFeedForward(nn.Module):
    """Two linear layers around an activation: (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, activation: str = "geglu", inner: int = 0):
        super().__init__()
        inner = inner or 4 * dim
        self.net = nn.ModuleDict({"0": Projected(dim, inner, activation), "2": nn.Linear(inner, dim)})

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token; of a large picture to some at a time, if nothing is to be learned."""
        b, n, _ = x.shape
        most = max(TOKENS, STRIP // self.net["2"].in_features)
        if b * n <= most or torch.is_grad_enabled():
            return self.net["2"](self.net["0"](x))
        out = torch.empty_like(x)
        for pictures, into in zip(x.split(max(1, most // n)), out.split(max(1, most // n)), strict=True):
            for part, place in zip(pictures.split(most, 1), into.split(most, 1), strict=True):
                place.copy_(self.net["2"](self.net["0"](part)))
        return out


class Perceptron(nn.Module):
    """linear → SiLU → linear: (B, dim) → (B, out)."""

    def __init__(self, dim: int, out: int, condition: int = 0):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, out), nn.Linear(out, out)
        self.cond_proj = nn.Linear(condition, dim, bias=False) if condition else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Embed x, to which a projected condition (B, condition) may be added before."""
        x = x.to(self.linear_1.weight.dtype)
        if self.cond_proj is not None and condition is not None:
            x = x + of_vectors(self.cond_proj, condition.to(x.dtype))
        return of_vectors(self.linear_2, F.silu(of_vectors(self.linear_1, x)))


class ConvBlock(nn.Module):
    """Two normalized convolutions beside a shortcut, shifted by the embedding (B, E) between them, if there is one.

    (B, C, H, W) → (B, out, H, W).
    """

    def __init__(self, channels: int, out: int, embedding: int | None, groups: int = 32, eps: float = 1e-6):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, out) if embedding else None
        self.norm2 = GroupNorm(groups, out, eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Apply to x; the embedding comes through its SiLU already."""
        h = convolve(x, self.conv1, self.norm1)
        if self.time_emb_proj is not None and embedding is not None:
            h = h + of_vectors(self.time_emb_proj, embedding)[..., None, None]
        h = convolve(h, self.conv2, self.norm2, over=True)
        if self.conv_shortcut is not None:
            return convolve(x, self.conv_shortcut, onto=h)
        return x + h if torch.is_grad_enabled() else h.add_(x)


class Downsample(nn.Module):
    """Halve the side by a convolution of stride 2; ``one_sided`` pads below and to the right only."""

    def __init__(self, channels: int, one_sided: bool = False):
        super().__init__()
        self.one_sided = one_sided
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, ⌈H/2⌉, ⌈W/2⌉), or half rounded down if one-sided."""
        return convolve(x, self.conv, edges=(0, 1, 0, 1) if self.one_sided else None)


class Upsample(nn.Module):
    """Enlarge by repetition, then smooth by a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) → (B, C, 2H, 2W), or the given size."""
        if size is None or size == (2 * x.shape[-2], 2 * x.shape[-1]):
            return convolve(x, self.conv, up=2)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class RMSNorm(nn.Module):
    """Division by the root mean square, at least in float32 (Zhang & Sennrich 1910.07467): (…, D) → (…, D)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
