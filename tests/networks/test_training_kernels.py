"""What networks compute another way while they learn on a CPU is the same function with the same gradients."""

import pytest
import torch
from torch import Tensor, nn

from sfumato.networks.blocks import GroupNorm, dot_product_attention


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_is_torchs_in_value_gradients_and_layout(layout):
    torch.manual_seed(0)
    ours, torchs = GroupNorm(3, 12).double(), nn.GroupNorm(3, 12).double()
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        nn.init.normal_(p)
        q.data.copy_(p.data)
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    y, z = ours(x), torchs(x)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, z)
    mine, theirs = (torch.autograd.grad(v.pow(3).sum(), [x, *m.parameters()]) for v, m in ((y, ours), (z, torchs)))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_that_learns_in_bf16_is_nearer_to_float64_than_bf16_is(autocast: bool):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 8).bfloat16() for n in (6, 5, 5))
    mask = torch.tensor([True, True, True, False, True])[None, None, None]

    def results(function, dtype: torch.dtype) -> list[Tensor]:
        inputs = [y.to(dtype).requires_grad_() for y in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            out = function(*inputs, mask)
        assert out.dtype == dtype
        return [out, *torch.autograd.grad(out.double().pow(2).sum(), inputs)]

    def errors(found: list[Tensor]) -> float:
        return sum((a.detach().double() - b).pow(2).mean().item() for a, b in zip(found, exact, strict=True))

    exact = results(dot_product_attention, torch.float64)
    assert errors(results(dot_product_attention, torch.bfloat16)) < errors(
        results(nn.functional.scaled_dot_product_attention, torch.bfloat16)
    )


def test_what_does_not_learn_is_left_to_torch_bit_for_bit():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 8).bfloat16() for _ in range(3))
    assert torch.equal(dot_product_attention(q, k, v), nn.functional.scaled_dot_product_attention(q, k, v))
    norm, x = GroupNorm(3, 12), torch.randn(1, 12, 5, 4).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(norm(x), nn.GroupNorm.forward(norm, x))
