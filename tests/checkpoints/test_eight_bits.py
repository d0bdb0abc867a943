"""Weights of eight bits: the error's bound, what has no scale, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.checkpoints.eight_bits import pack, unpack
from sfumato.errors import BadCheckpoint


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), magnitude=st.floats(-9, 5), shape=st.sampled_from([(7, 33), (3, 4, 17), (5, 1)]))
def test_an_error_is_at_most_half_a_scale_whatever_the_magnitude(
    seed: int, magnitude: float, shape: tuple[int, ...]
) -> None:
    rows = torch.Generator().manual_seed(seed)
    w = (
        10**magnitude
        * torch.randn(shape, generator=rows)
        * 10 ** torch.randn(*shape[:-1], 1, generator=rows).clamp(-1, 0.5)
    )
    made = pack("w", w)
    scale = made["w_scale"].double()
    error = (made["w"].double() * scale - w.double()).abs()
    assert made["w"].dtype == torch.int8
    assert (error <= 0.5 * scale * (1 + 1e-5)).all()
    assert (scale >= w.double().abs().amax(-1, keepdim=True) / 127 * (1 - 1e-6)).all()  # nothing was clipped
    torch.testing.assert_close(unpack(made)["w"], (made["w"].double() * scale).float(), atol=0, rtol=1e-6)


def test_a_kernel_has_one_scale_for_each_output() -> None:
    w = (
        torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 1, 6)[:, None, None, None]
    )
    made = pack("w", w)
    assert made["w_scale"].shape == (6, 1, 1, 1)
    assert made["w"].abs().amax((1, 2, 3)).tolist() == [127] * 6
    assert ((unpack(made)["w"] - w).abs() <= 0.51 * made["w_scale"].float()).all()


def test_of_gaussian_rows_a_hundredth_of_the_deviation_is_lost() -> None:
    w = torch.randn(64, 320, generator=torch.Generator().manual_seed(0))
    assert (unpack(pack("w", w))["w"] - w).square().mean().sqrt() < 0.01


def test_zeros_stay_zero_and_other_tensors_pass() -> None:
    w = torch.zeros(2, 3)
    w[1] = torch.tensor([1.0, -2.0, 0.5])
    others = {"b": torch.ones(3, dtype=torch.half), "ids": torch.arange(3), "their_scale": torch.ones(2, 1)}
    back = unpack(pack("w", w) | others)
    assert back.keys() == {"w", *others}
    assert not back["w"][0].any()
    assert all(back[k] is v for k, v in others.items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e8])
def test_what_no_scale_holds_is_not_stored(bad: float) -> None:
    with pytest.raises(ValueError, match="w: holds numbers"):
        pack("w", torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize(
    "scale",
    [None, torch.ones(2), torch.ones(3, 1), torch.ones(2, 1, dtype=torch.int32)],
    ids=["none", "flat", "other", "whole"],
)
def test_a_scale_that_does_not_fit_is_told(scale: Tensor | None) -> None:
    tensors = {"w": torch.ones(2, 3, dtype=torch.int8)} | ({} if scale is None else {"w_scale": scale})
    with pytest.raises(BadCheckpoint, match=r"w is of eight bits \[2, 3\], and its scale is"):
        unpack(tensors)
