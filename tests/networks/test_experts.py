"""Experts that choose their cells: against a plain loop, in batches, beside a network that had none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.networks.experts import Experts
from sfumato.networks.worded import WordedConfig, WordedTransformer


def experts(n: int = 4, share: float = 2.0, seed: int = 0) -> Experts:
    torch.manual_seed(seed)
    made = Experts(8, n, 12, share)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_()
    return made


def one_by_one(made: Experts, x: Tensor, k: int) -> Tensor:
    """The definition, cell by cell."""
    pictures: list[Tensor] = []
    for cells in x:
        out = [torch.zeros(8) for _ in cells]
        for e, row in enumerate(made.router.weight):
            scores = torch.sigmoid(cells @ row)
            for i in scores.argsort(descending=True)[:k].tolist():
                hidden = F.gelu(cells[i] @ made.wide[e] + made.bias[e, 0], approximate="tanh")
                out[i] = out[i] + scores[i] * (hidden @ made.narrow[e])
        pictures.append(torch.stack(out))
    return torch.stack(pictures)


@pytest.mark.parametrize(("n", "share", "cells", "k"), [(4, 2.0, 6, 3), (4, 1.0, 6, 2), (3, 3.0, 5, 5), (8, 0.5, 4, 1)])
def test_values_and_gradients_are_those_of_a_plain_loop(n: int, share: float, cells: int, k: int) -> None:
    made, x, weights = experts(n, share), torch.randn(3, cells, 8, requires_grad=True), torch.randn(3, cells, 8)

    def answer(f: Callable[[], Tensor]) -> list[Tensor]:
        y = f()
        return [y, *torch.autograd.grad((y * weights).sum(), [x, *made.parameters()])]

    torch.testing.assert_close(answer(lambda: made(x)), answer(lambda: one_by_one(made, x, k)), atol=1e-4, rtol=1e-4)


def test_a_picture_is_the_same_in_any_batch() -> None:
    made, x = experts(), torch.randn(5, 6, 8)
    torch.testing.assert_close(made(x)[3:4], made(x[3:4]))


def test_every_expert_is_busy_with_as_many_cells_as_the_others() -> None:
    scores, cells = experts(4, 2.0).choose(torch.randn(7, 16, 8))
    assert cells.shape == (7, 4, 8)
    assert all(len(set(own.tolist())) == 8 for picture in cells for own in picture)
    assert (scores[..., :-1] >= scores[..., 1:]).all()


CONFIG = WordedConfig(in_channels=3, patch=2, size=4, dim=32, layers=2, heads=2, word_heads=1, context_dim=12)


def test_new_experts_leave_a_trained_network_as_it_is_and_then_learn() -> None:
    torch.manual_seed(1)
    plain, wider = WordedTransformer(CONFIG), WordedTransformer(replace(CONFIG, experts=4, expert_dim=6))
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_(0, 0.2)
    missing, extra = wider.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert all(".experts." in name for name in missing)
    assert not extra
    given = (torch.randn(2, 3, 4, 4), torch.rand(2), torch.randn(2, 5, 12))
    torch.testing.assert_close(wider(*given), plain(*given), atol=0, rtol=0)
    optimizer = torch.optim.SGD(wider.parameters(), 0.1)
    for _ in range(2):  # the first step moves what they add, the second all of them
        optimizer.zero_grad()
        wider(*given).square().mean().backward()
        optimizer.step()
    learned = {n: p.grad for n, p in wider.named_parameters() if ".experts." in n}
    assert all(grad is not None and grad.any() for grad in learned.values())


@pytest.mark.parametrize("wrong", [{"experts": -1}, {"experts": 4, "expert_dim": 0}, {"experts": 4, "expert_share": 5}])
def test_a_mixture_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="experts of width"):
        replace(CONFIG, **wrong)
