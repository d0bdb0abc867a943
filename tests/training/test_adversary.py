"""An adversary: whose weights its losses move, the level at which it looks, and what a student gains by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_distillation import VAE, Table, batch, distill, forget_the_end, ideal, latent, on_pixels, train
from torch import Tensor

from sfumato.diffusion import PARAMETERIZATIONS, SCHEDULES
from sfumato.diffusion.level import NoiseLevel
from sfumato.networks.unet import UNet, UNetConfig
from sfumato.networks.worded import WordedConfig, WordedTransformer
from sfumato.training.adversary import Heads, looked_at, opposed
from sfumato.training.consistency import ConsistencyObjective
from sfumato.training.draws import draws
from sfumato.training.state import load_newest

WIDTHS = [3, 5]


def states(seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 6, 3, generator=g), torch.randn(4, 2, 5, generator=g)]


def test_neither_side_moves_the_others_weights() -> None:
    torch.manual_seed(0)
    heads, made = Heads(WIDTHS), [s.requires_grad_() for s in states(1)]
    fooled, own = opposed(heads, states(0), made)
    assert fooled.shape == own.shape == (4,)
    assert all(g is None for g in torch.autograd.grad(fooled.sum(), list(heads.parameters()), allow_unused=True))
    assert all(g is None for g in torch.autograd.grad(own.sum(), made, allow_unused=True, retain_graph=True))
    fooled, _ = opposed(heads, states(0), made)
    for g in torch.autograd.grad(fooled.sum(), made):
        assert g.abs().min() > 0


def test_the_losses_are_the_hinges() -> None:
    torch.manual_seed(0)
    heads = Heads(WIDTHS)
    for p in heads.parameters():
        torch.nn.init.normal_(p)
    real, made = states(0), states(1)
    fooled, own = opposed(heads, real, made)
    of_real, of_made = heads(*real), heads(*made)
    assert of_real.shape == (4, 8)
    assert (of_real > 1).any()
    assert (of_real < 1).any()
    torch.testing.assert_close(fooled, -of_made.mean(1))
    torch.testing.assert_close(own, ((1 - of_real).clamp(min=0) + (1 + of_made).clamp(min=0)).mean(1))


@pytest.mark.parametrize("steps", [1, 3])
def test_both_are_seen_at_levels_above_the_arrival_alone(steps: int) -> None:
    objective = ConsistencyObjective(SCHEDULES["flow"](), PARAMETERIZATIONS["flow"], steps, 4)
    seen: list[Tensor] = []

    def look(x: Tensor, clock: Tensor) -> list[Tensor]:
        seen.append(clock)
        return [x.flatten(2)]

    n = 2000
    x0, where, eps = batch(n)
    end = 4 * (1 + torch.arange(n) % steps)
    real, made = looked_at(objective, look, x0, objective.level(end, x0).alpha * x0, end, where, eps)
    assert torch.equal(*seen)
    arrival = objective.path[end, 0].float()
    assert (seen[0] > arrival + 1e-6).all()  # at a step above at least: never at a clean picture
    for e in end.unique():
        own = seen[0][end == e]
        assert len(own.unique()) == e
        assert own.max() == 1
    # Arrivals without their noise keep the picture's share, and lack just that much variance.
    for got, noise in ((real[0], 1.0), (made[0], None)):
        residual = (got.flatten() - (1 - seen[0]) * x0.flatten()).double()
        want = seen[0] ** 2 if noise else seen[0] ** 2 - ((1 - seen[0]) / (1 - arrival) * arrival) ** 2
        assert float((residual**2).mean()) == pytest.approx(float(want.double().mean()), rel=0.1)


def deviation_after(weight: float) -> float:
    """What unit noise ends as, by a student of one step whose teacher knows pictures of half the deviation of its."""
    objective = ConsistencyObjective(SCHEDULES["flow"](), PARAMETERIZATIONS["flow"], 1, 8)
    torch.manual_seed(0)
    student, heads = Table(objective), Heads([3])
    groups = [{"params": student.parameters(), "lr": 0.02}, {"params": heads.parameters(), "lr": 0.01}]
    optimizer = torch.optim.Adam(groups)

    def look(x: Tensor, clock: Tensor) -> list[Tensor]:
        v = x.flatten(1).float()
        return [torch.stack([v, v**2, clock[:, None].float()], -1)]

    def step(x0: Tensor, u: Tensor, eps: Tensor, where: Tensor, fresh: Tensor) -> Tensor:
        def beside(x: Tensor, end: Tensor) -> Tensor:
            fooled, own = opposed(heads, *looked_at(objective, look, x0, x, end, where, fresh.double()))
            return weight * fooled + own

        return objective(student, ideal, x0, u, eps, beside).loss.mean()

    for i in range(500):
        x0, u, eps = batch(128, 10 + i)
        optimizer.zero_grad()
        step(2 * x0, u, eps, *draws(1, range(128 * i, 128 * (i + 1)), (1, 1, 1))).backward()
        optimizer.step()
    start = NoiseLevel(*objective.path[0])
    return float(objective.parameterization(torch.ones(()), start, student.factors[0].detach()).x0.abs())


def test_an_adversary_leads_a_student_beyond_a_teacher_that_is_wrong() -> None:
    assert deviation_after(0.0) == pytest.approx(0.5, abs=0.1)  # followed alone, the teacher is copied
    assert 0.75 < deviation_after(1.0) < 1.25


@pytest.mark.parametrize(
    "network",
    [
        UNet(UNetConfig(widths=(8, 16), attention=(False, True), blocks=1, heads=2, context_dim=4)),
        WordedTransformer(WordedConfig(3, 2, 4, 16, 3, 2, 1, 4)),
    ],
    ids=lambda n: type(n).__name__,
)  # fmt: skip
def test_states_are_as_wide_as_they_are_said_to_be(network: UNet | WordedTransformer) -> None:
    x, clock, words = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.7]), torch.randn(2, 5, 4)
    found = network.every_state(x, clock, words)
    assert [s.shape[-1] for s in found] == network.state_widths
    assert all(len(s) == 2 for s in found)
    alone = network.every_state(x[:1], clock[:1], words[:1])
    for one, of_two in zip(alone, found, strict=True):
        torch.testing.assert_close(one[0], of_two[0], atol=1e-5, rtol=1e-4)


# ── from a model to a model ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    return train(latent(str(train(VAE, folder, "vae"))), folder, "teacher")


def test_heads_learn_and_stay_out_of_the_model(teacher: Path, tmp_path: Path) -> None:
    raw = distill(teacher, steps=2, substeps=3, adversarial=0.1)
    final = train(raw, tmp_path, "judged")
    whole = final.read_bytes()
    assert load_file(final).keys() == load_file(teacher).keys()
    train(raw, tmp_path, "first", "steps=1")
    first, last = (load_newest(tmp_path / name / "checkpoints", pytest.fail) for name in ("first", "judged"))
    assert first is not None
    assert last is not None
    heads = [k for k in last.tensors if k.startswith("model.heads.") and k.endswith("weight")]
    assert len(heads) == 2 * 2  # two layers of states, two matrices each
    assert all(not torch.equal(first.tensors[k], last.tensors[k]) for k in heads)

    forget_the_end(tmp_path / "judged")
    assert train(raw, tmp_path, "judged").read_bytes() == whole
    plain = train(distill(teacher, steps=2, substeps=3), tmp_path, "plain")
    assert plain.read_bytes() != whole
    lines = [json.loads(line) for line in (tmp_path / "judged/log.jsonl").read_text().splitlines()]
    alike = [json.loads(line) for line in (tmp_path / "plain/log.jsonl").read_text().splitlines()]
    assert lines[0]["by_level"] == alike[0]["by_level"]  # what is shown by level is the distillation's error
    assert lines[0]["loss"] > alike[0]["loss"]


def test_a_unet_is_a_teachers_eye_too(tmp_path: Path) -> None:
    teacher = train(on_pixels(), tmp_path, "pixels", "steps=2")
    student = train(distill(teacher, steps=1, substeps=2, adversarial=1.0), tmp_path, "student", "steps=2")
    assert load_file(student).keys() == load_file(teacher).keys()
