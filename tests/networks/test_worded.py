"""The transformer over latents: its attention against the fused one, padding, positions, and what it starts as."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfumato.networks.worded import WordedAttention, WordedConfig, WordedTransformer

CONFIG = WordedConfig(in_channels=3, patch=2, size=4, dim=32, layers=2, heads=2, word_heads=1, context_dim=12)


def network(seed: int = 0) -> WordedTransformer:
    generator = torch.Generator().manual_seed(seed)
    made = WordedTransformer(CONFIG)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return made.eval()


def inputs(n: int = 2, side: int = 4) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(n, 3, side, side),
        torch.rand(n),
        torch.randn(n, 5, 12),
        torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:n],
    )


def test_attention_equals_the_fused_one() -> None:
    attention = WordedAttention(32, 2, 16, 12)
    with torch.no_grad():
        attention.to_out.weight.copy_(torch.eye(32))
        attention.norm_q.weight.uniform_(0.5, 2)
    x, context, mask = (
        torch.randn(2, 7, 32),
        torch.randn(2, 5, 12),
        torch.tensor([[True] * 5, [True] * 2 + [False] * 3]),
    )
    q, k, v = attention.project(x, context)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    torch.testing.assert_close(attention(x, context, mask), expected.transpose(1, 2).flatten(2))


def test_padding_does_not_matter() -> None:
    made, (x, clock, context, mask) = network(), inputs()
    pooled = torch.randn(2, 12)
    longer = torch.cat([context, 9 * torch.randn(2, 3, 12)], 1)
    wider = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(made(x, clock, longer, wider, pooled), made(x, clock, context, mask, pooled))


@pytest.mark.parametrize("part", ["clock", "context", "pooled"])
def test_every_part_of_the_conditioning_is_heard(part: str) -> None:
    made, (x, clock, context, mask) = network(), inputs()
    given = {"clock": clock, "context": context, "mask": mask, "pooled": torch.randn(2, 12)}
    changed = {**given, part: given[part] + 0.5}
    assert (made(x, **given) - made(x, **changed)).abs().amax() > 1e-3


def test_cells_know_where_they_are() -> None:
    """The same patch everywhere gives different answers at different places."""
    made, (_, clock, context, mask) = network(), inputs(1)
    x = torch.randn(1, 3, 2, 2).repeat(1, 1, 2, 2)
    out = made(x, clock, context, mask)
    assert (out[..., :2, :2] - out[..., 2:, 2:]).abs().amax() > 1e-3


def test_other_sizes_run_and_the_states_are_those_of_the_layer() -> None:
    made, (x, clock, context, mask) = network(), inputs(side=8)
    out, last = made.states(x, clock, context, mask)
    _, first = made.states(x, clock, context, mask, layer=0)
    assert out.shape == x.shape
    assert last.shape == first.shape == (2, 16, 32)
    assert not torch.equal(first, last)


def test_it_starts_by_predicting_nothing() -> None:
    assert not WordedTransformer(CONFIG)(*inputs()).any()
