"""Parts of transformers whose norms are modulated by an embedding (adaLN-zero: DiT, 2212.09748, section 3.2).

Shapes: B pictures, N cells, M words, D width, A heads. Modules are named as in the published folders of weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.blocks import (
    Perceptron,
    ProjectedFeedForward,
    RMSNorm,
    dot_product_attention,
    of_vectors,
    sinusoids,
    split_heads,
)

Rotation = tuple[Tensor, Tensor]  # cos and sin, each (N, D/heads)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm of x (B, N, D) without weights, then scale and shift (B, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class Modulation(nn.Module):
    """n vectors (B, 1, D) from an embedding (B, D): shifts, scales and gates."""

    def __init__(self, dim: int, n: int):
        super().__init__()
        self.n, self.linear = n, nn.Linear(dim, n * dim)

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """The embedding comes through its SiLU already."""
        return of_vectors(self.linear, embedding)[:, None].chunk(self.n, dim=-1)


class FinalNorm(Modulation):
    """The norm before a network's last layer; its scale comes before its shift."""

    def __init__(self, dim: int):
        super().__init__(dim, 2)

    def normalize(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        scale, shift = self(embedding)
        return modulated(x, shift, scale)


class ClockAndWords(nn.Module):
    """The embedding of the clock, the pooled words and, in distilled networks, the guidance scale: (B, D)."""

    def __init__(self, dim: int, pooled_dim: int, guided: bool = False):
        super().__init__()
        self.timestep_embedder = Perceptron(256, dim)
        self.guidance_embedder = Perceptron(256, dim) if guided else None
        self.text_embedder = Perceptron(pooled_dim, dim)

    def forward(self, clock: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Clock and guidance (B,) run to about 1000."""
        y = self.timestep_embedder(sinusoids(clock, 256))
        if self.guidance_embedder is not None:
            if guidance is None:
                raise ValueError("this network needs the guidance scale")
            y = y + self.guidance_embedder(sinusoids(guidance, 256))
        return y + self.text_embedder(pooled)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of neighbours in x (B, A, N, D) by its angle (rotary positions: RoFormer, 2104.09864, eq. 34)."""
    cos, sin = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


class JointAttention(nn.Module):
    """Attention over the cells of a picture and, if given, words with projections of their own.

    Args:
        words: whether there are words; ``words_out`` whether their new states are wanted too.
        normalized: whether queries and keys are normalized (2302.05442).
        projected: whether the cells' result is projected.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        words: bool = False,
        words_out: bool = True,
        normalized: bool = False,
        projected: bool = True,
    ):
        super().__init__()
        self.heads, self.projected, inner = heads, projected, heads * head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner) for _ in range(3))
        if normalized:
            self.norm_q, self.norm_k = RMSNorm(head_dim), RMSNorm(head_dim)
        if projected:
            self.to_out = nn.ModuleList([nn.Linear(inner, dim)])
        if words:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, inner) for _ in range(3))
            if normalized:
                self.norm_added_q, self.norm_added_k = RMSNorm(head_dim), RMSNorm(head_dim)
            if words_out:
                self.to_add_out = nn.Linear(inner, dim)

    def forward(
        self, x: Tensor, words: Tensor | None = None, rotation: Rotation | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Cells (B, N, D) and words (B, M, D) → the same; the rotation is of words and cells, in that order."""
        q, k, v = self.project(x, words, rotation)
        y = dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, M + N, A·D/A)
        m = 0 if words is None else words.shape[1]
        cells = self.to_out[0](y[:, m:]) if self.projected else y
        return cells, self.to_add_out(y[:, :m]) if hasattr(self, "to_add_out") else None

    def project(
        self, x: Tensor, words: Tensor | None = None, rotation: Rotation | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, A, M + N, D/A) of words and cells, in that order."""
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(x), self.to_k(x), self.to_v(x)))
        if hasattr(self, "norm_q"):
            q, k = self.norm_q(q), self.norm_k(k)
        if words is not None:
            added = (self.add_q_proj(words), self.add_k_proj(words), self.add_v_proj(words))
            wq, wk, wv = (split_heads(y, self.heads) for y in added)
            if hasattr(self, "norm_added_q"):
                wq, wk = self.norm_added_q(wq), self.norm_added_k(wk)
            q, k, v = torch.cat([wq, q], dim=2), torch.cat([wk, k], dim=2), torch.cat([wv, v], dim=2)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k, v


class JointBlock(nn.Module):
    """Cells and words in two streams that attend to one another (SD3, 2403.03206, figure 2).

    Args:
        last: the words' stream ends here: they are attended to and no more.
        dual: the cells attend to themselves alone, besides (SD 3.5 medium).
    """

    def __init__(
        self, dim: int, heads: int, head_dim: int, *, normalized: bool, last: bool = False, dual: bool = False
    ):
        super().__init__()
        self.last = last
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = FinalNorm(dim) if last else Modulation(dim, 6)
        self.attn = JointAttention(dim, heads, head_dim, words=True, words_out=not last, normalized=normalized)
        self.attn2 = JointAttention(dim, heads, head_dim, normalized=normalized) if dual else None
        self.ff = ProjectedFeedForward(dim, "gelu-tanh")
        self.ff_context = None if last else ProjectedFeedForward(dim, "gelu-tanh")

    def forward(
        self, x: Tensor, words: Tensor, embedding: Tensor, rotation: Rotation | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cells (B, N, D) and words (B, M, D) → the same, under an embedding (B, D) through its SiLU."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(embedding)
        if isinstance(self.norm1_context, FinalNorm):
            told, own = self.norm1_context.normalize(words, embedding), ()
        else:
            shift_w, scale_w, *own = self.norm1_context(embedding)
            told = modulated(words, shift_w, scale_w)
        y, told_new = self.attn(modulated(x, shift, scale), told, rotation)
        alone = modulated(x, second[0], second[1]) if second else None
        x = x + gate * y
        if self.attn2 is not None and alone is not None:
            x = x + second[2] * self.attn2(alone)[0]
        x = x + gate_ff * self.ff(modulated(x, shift_ff, scale_ff))
        if self.ff_context is not None:
            gate_w, shift_w, scale_w, gate_wff = own
            words = words + gate_w * told_new
            words = words + gate_wff * self.ff_context(modulated(words, shift_w, scale_w))
        return x, words


def unpatch(tokens: Tensor, size: int, height: int, width: int) -> Tensor:
    """Tokens (B, N, size·size·C), channels last within each, → (B, C, height, width)."""
    y = tokens.unflatten(1, (height // size, width // size)).unflatten(-1, (size, size, -1))
    return y.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height, width)
