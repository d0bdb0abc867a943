"""Where each word looked: attention from a picture's cells to its words, of any network, while it draws.

    map[cell, word] = mean over layers and heads of softmax(q·kᵀ/√d)[cell, word]

after DAAM (Tang et al. 2210.04885, section 3), which sums over them instead. Hooks sit on a twin of the network that
shares its weights, so that no other request meets them, and a network that is not watched has none.

Shapes: N cells of a layer, M columns of the context, W words, A heads, h × w cells of a map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sfumato.diffusion.level import NoiseLevel
from sfumato.families.model import Model
from sfumato.networks.blocks import CrossAttention, split_heads
from sfumato.networks.modulated import JointAttention
from sfumato.networks.stored import twin
from sfumato.text.spelling import Word

SIDE = 64  # cells: the longer side of a map is at most this


class Heads(NamedTuple):
    """What a layer attends with: of cells, to all it attends to, of which ``words`` are the context's columns."""

    q: Tensor  # (B, A, N, d)
    k: Tensor  # (B, A, L, d)
    mask: Tensor | None  # (B, L), true at real ones
    words: slice


def heads_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], columns: int) -> Heads | None:
    """Queries and keys of an attention layer called so, or None if it does not attend to words.

    Args:
        columns: how many columns the context has.
    """
    if isinstance(module, JointAttention):
        return _joint(module, columns, *args, **kwargs)
    return _cross(module, columns, *args, **kwargs)


def attends(module: nn.Module) -> bool:
    """Whether a layer is attention: it has heads, and projects what it is given to queries, keys and values."""
    return isinstance(getattr(module, "heads", None), int) and (hasattr(module, "project") or hasattr(module, "to_q"))


def _cross(
    m: Any, columns: int, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, *_: Any
) -> Heads | None:
    if context is None:
        return None  # cells among themselves
    if isinstance(m, CrossAttention):
        return Heads(split_heads(m.to_q(x), m.heads), split_heads(m.to_k(context), m.heads), mask, slice(None))
    q, k, _ = m.project(x, context)
    return Heads(q, k, mask, slice(None))


def _joint(
    m: JointAttention, columns: int, x: Tensor, words: Tensor | None = None, rotation: Any = None
) -> Heads | None:
    """Words of their own, or, in one sequence with the cells and turned with them, at its beginning."""
    if words is None and rotation is None:
        return None
    q, k, _ = m.project(x, words, rotation)
    return Heads(q[:, :, columns:], k, None, slice(0, columns))


@torch.no_grad()
def weights(heads: Heads) -> Tensor:
    """Mean over heads of the attention weights of the batch's first row, float32 (N, L); each row sums to 1."""
    total: Tensor | None = None
    for q, k in zip(heads.q[0].float(), heads.k[0].float(), strict=True):  # one head at a time: N·L may be large
        scores = q @ k.T * q.shape[-1] ** -0.5
        if heads.mask is not None:
            scores = scores.masked_fill(~heads.mask[0], -torch.inf)
        total = scores.softmax(-1) if total is None else total + scores.softmax(-1)
    assert total is not None
    return total / heads.q.shape[1]


class Layer(NamedTuple):
    """One layer's attention in one call of the network, for the first picture of the batch."""

    columns: Tensor  # (N, M): of each cell to each column of the context, normalized to sum 1
    share: float  # of its whole attention that cells gave to words; 1 in cross-attention


@dataclass
class Call:
    """One call of the network: the level, what it was given for the first picture of the batch, what that attended to.

    Args:
        x: (1, C, h, w), before the network's own gain.
    """

    level: NoiseLevel
    x: Tensor
    layers: list[Layer] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        """Whether no number overflowed; the pipeline repeats calls where one did."""
        return all(bool(layer.columns.isfinite().all()) for layer in self.layers)


@dataclass
class Recorder:
    """The calls of a watched network, in order; ``take`` empties it."""

    calls: list[Call] = field(default_factory=list)
    level: NoiseLevel = field(default_factory=lambda: NoiseLevel(math.nan, math.nan, math.nan))
    columns: int = 0

    def begin(self, x: Tensor, context: Tensor | None) -> None:
        """A call of the network starts."""
        self.columns = 0 if context is None else context.shape[1]
        self.calls.append(Call(self.level, x))

    def add(self, heads: Heads) -> None:
        """A layer of the network was called."""
        w = weights(heads)[:, heads.words]
        sums = w.sum(-1, keepdim=True)
        self.calls[-1].layers.append(Layer(w / sums.clamp_min(1e-30), float(sums.mean())))

    def take(self) -> Call | None:
        """The first call since the last time whose numbers are finite; None if there is none."""
        calls, self.calls = self.calls, []
        return next((c for c in calls if c.finite), None)


@dataclass(frozen=True, eq=False)
class Maps:
    """Where each word looked in one step.

    Args:
        maps: float32 (W + 1, h, w), a share of each cell's attention to words, so that each cell's sum is 1; the
            last is what is no word of the prompt: start, end and padding.
        share: how much of its attention a cell gave to words at all, 0 to 1; less than 1 in joint attention.
    """

    maps: NDArray[np.float32]
    share: float


def watch(model: Model, *, attention: bool = True) -> tuple[Model, Recorder]:
    """A model that draws the same pictures to the bit, and a record of its network's calls.

    Args:
        attention: whether to record what cells attend to, besides the level and x.
    """
    network, recorder, p = twin(model.network), Recorder(), model.parameterization

    def clock(level: NoiseLevel) -> Any:  # asked for before each call
        recorder.level = level
        return p.clock(level)

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.begin(args[0][:1].float() / p.gain(recorder.level), kwargs.get("context"))

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        heads = heads_of(module, args, kwargs, recorder.columns)
        if heads is not None:
            recorder.add(heads)

    network.register_forward_pre_hook(begin, with_kwargs=True)
    for module in network.modules():
        if attention and attends(module):
            module.register_forward_hook(record, with_kwargs=True)
    return replace(model, network=network, parameterization=replace(p, clock=clock)), recorder


def maps(layers: Sequence[Layer], shape: tuple[int, int], words: Sequence[Word]) -> Maps | None:
    """Bring layers of any size to one grid, and columns to words; None without layers.

    Args:
        shape: height and width of x, whose proportions the cells of each layer have.
    """
    if not layers:
        return None
    grids = [_grid(len(layer.columns), shape) for layer in layers]
    h, w = max(grids)
    scale = min(1.0, SIDE / max(h, w))
    h, w = max(1, round(h * scale)), max(1, round(w * scale))
    total = torch.zeros(layers[0].columns.shape[1], h, w)
    for layer, grid in zip(layers, grids, strict=True):
        columns = layer.columns.T.unflatten(1, grid)[None].cpu()  # (1, M, h, w)
        total += F.interpolate(columns, (h, w), mode="bilinear", align_corners=False, antialias=True)[0] / len(layers)
    rest = set(range(len(total))) - {c for word in words for c in word.columns}
    rows = [total[list(word.columns)].sum(0) for word in words] + [total[sorted(rest)].sum(0)]
    share = sum(layer.share for layer in layers) / len(layers)
    return Maps(torch.stack(rows).numpy(), share)


def _grid(cells: int, shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer of so many cells over an x of this shape, which strides and patches may shrink."""
    near = round((cells * shape[0] / shape[1]) ** 0.5)
    candidates = [h for h in range(1, cells + 1) if cells % h == 0]
    h = min(candidates, key=lambda n: abs(n - near))
    return h, cells // h
