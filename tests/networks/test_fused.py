"""Norm and SiLU as one function: equal to torch's operations, with the gradient that finite differences give."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks import fused
from sfumato.networks.blocks import GroupNorm


@pytest.fixture(autouse=True)
def _even_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LARGE", 0)
    monkeypatch.setattr(fused, "CACHED", 300)  # two pictures of three at a time


def arguments(dtype: torch.dtype, modulated: bool) -> tuple[list[Tensor], GroupNorm]:
    """Pictures (3, 8, 4, 4) far from a mean of zero, scale and shift if wanted, and a norm of 4 groups."""
    torch.manual_seed(0)
    norm = GroupNorm(4, 8).to(torch.promote_types(dtype, torch.float32))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3 * torch.randn(3, 8, 4, 4) + 5).to(dtype).contiguous(memory_format=torch.channels_last)
    vectors = [torch.randn(3, 8).to(dtype) for _ in range(2 * modulated)]
    return [y.requires_grad_() for y in (x, *vectors)], norm


def plain(x: Tensor, norm: nn.GroupNorm, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """The same by torch's own operations, in float64 throughout."""
    y = F.group_norm(x.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale[..., None, None]) + shift[..., None, None]
    return F.silu(y)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_equals_torchs_operations_forward_and_backward(dtype: torch.dtype, bound: float, modulated: bool):
    (x, *vectors), norm = arguments(dtype, modulated)
    slope = torch.randn(x.shape)
    found = []
    for function in (fused.norm_silu, plain):
        y = function(x, norm, *vectors)
        learned = [x, *vectors, norm.weight, norm.bias]
        found.append([y, *torch.autograd.grad(y, learned, slope.to(y.dtype))])
    assert type(fused.norm_silu(x, norm, *vectors).grad_fn).__name__ == "_NormSiLUBackward"
    assert found[0][0].dtype == dtype
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)
    for ours, torchs in zip(*found, strict=True):
        assert (ours.double() - torchs.double()).abs().max() <= bound * torchs.abs().max()


@pytest.mark.parametrize("rows", [1, 3])
def test_its_gradient_is_that_of_finite_differences(rows: int):
    (x,), _ = arguments(torch.float64, False)
    weight, bias = (torch.randn(rows, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, w, b: fused._NormSiLU.apply(x, w, b, 4, 1e-5), (x, weight, bias))


def test_small_tensors_and_plain_layouts_go_by_torchs_operations(monkeypatch: pytest.MonkeyPatch):
    (x,), norm = arguments(torch.float32, False)
    assert type(fused.norm_silu(x.contiguous(), norm).grad_fn).__name__ == "SiluBackward0"
    monkeypatch.setattr(fused, "LARGE", x.numel() + 1)
    assert type(fused.norm_silu(x, norm).grad_fn).__name__ == "SiluBackward0"
