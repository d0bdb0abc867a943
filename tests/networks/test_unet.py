"""The U-Net: what it depends on, what it does not, and what its parts compute."""

import math

import pytest
import torch

from sfumato.networks.blocks import Attention, timestep_embedding
from sfumato.networks.unet import UNet, UNetConfig

CONFIG = UNetConfig(widths=(16, 32), attention=(False, True), blocks=1, heads=2, context_dim=12)


def randomized(config: UNetConfig, seed: int = 0) -> UNet:
    """A network without its zero initializations, so that every part has a say."""
    torch.manual_seed(seed)
    net = UNet(config).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


def inputs(n: int = 3, size: int = 8):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, size, size, generator=g)
    context, pooled = torch.randn(n, 5, 12, generator=g), torch.randn(n, 12, generator=g)
    return x, torch.tensor([1.0, 500.0, 999.0])[:n], context, torch.ones(n, 5, dtype=torch.bool), pooled


def test_starts_as_zero_so_that_the_first_prediction_is_neutral():
    out = UNet(CONFIG)(*inputs())
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("part", ["x", "clock", "context", "pooled"])
def test_output_depends_on_every_input_and_each_picture_on_its_own_alone(part):
    net = randomized(CONFIG)
    values = dict(zip(("x", "clock", "context", "mask", "pooled"), inputs(), strict=True))
    before = net(**values)
    changed = values[part].clone()
    changed[1] += 1
    after = net(**{**values, part: changed})
    moved = (after - before).abs().amax(dim=(1, 2, 3))
    assert moved[1] > 1e-4
    assert moved[0] == 0
    assert moved[2] == 0


def test_masked_tokens_do_not_matter_and_padding_may_be_added():
    net = randomized(CONFIG)
    x, clock, context, mask, pooled = inputs()
    padded = torch.cat([context, 1e3 * torch.ones(3, 4, 12)], 1)
    wider = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(
        net(x, clock, padded, wider, pooled), net(x, clock, context, mask, pooled), rtol=0, atol=1e-5
    )


def test_order_of_the_words_is_the_text_towers_affair():
    net = randomized(CONFIG)
    x, clock, context, mask, pooled = inputs()
    torch.testing.assert_close(
        net(x, clock, context.flip(1), mask, pooled), net(x, clock, context, mask, pooled), rtol=0, atol=1e-5
    )


def test_every_parameter_learns():
    net = randomized(CONFIG).train()
    net(*inputs()).square().mean().backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("size", [(16, 16), (24, 8)])
def test_any_size_that_is_a_multiple(patch, size):
    net = randomized(UNetConfig(patch=patch, widths=(16, 16, 16), attention=(False, False, True), context_dim=12))
    assert net.config.multiple == 4 * patch
    x = torch.randn(2, 3, *size)
    out = net(x, torch.ones(2), torch.randn(2, 3, 12))
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_timestep_embedding_is_the_papers_formula():
    t = torch.tensor([0.0, 1.0, 37.5])
    e = timestep_embedding(t, 8)
    for i in range(4):
        f = 10_000 ** (-i / 4)
        for b, value in enumerate(t.tolist()):
            assert e[b, i].item() == pytest.approx(math.cos(value * f), abs=1e-6)
            assert e[b, 4 + i].item() == pytest.approx(math.sin(value * f), abs=1e-6)


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    layer = Attention(8, 2, context_dim=6)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 4, 6)
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])
    k, v = layer.to_kv(context).chunk(2, -1)
    q = layer.to_q(x)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = q[..., h] @ k[..., h].transpose(1, 2) / 2.0
        scores = scores.masked_fill(~mask[:, None], -math.inf)
        heads.append(scores.softmax(-1) @ v[..., h])
    torch.testing.assert_close(layer(x, context, mask), layer.to_out(torch.cat(heads, -1)))


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="heads"):
        Attention(10, 3)
    with pytest.raises(ValueError, match="as many attention flags"):
        UNetConfig(widths=(8, 8), attention=(True,))
