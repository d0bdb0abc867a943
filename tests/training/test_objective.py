"""The objective against closed forms."""

import numpy as np
import pytest
import torch
from scipy import stats

from sfumato.diffusion import PARAMETERIZATIONS, SCHEDULES
from sfumato.diffusion.schedules import from_betas
from sfumato.errors import BadData
from sfumato.training.draws import draws
from sfumato.training.objective import DenoisingObjective, loss_by_level, times_at
from sfumato.training.recipe import ObjectiveConfig

PLACES = range(64)


def objective(schedule="linear", parameterization="eps", **config):
    return DenoisingObjective(SCHEDULES[schedule](), PARAMETERIZATIONS[parameterization], ObjectiveConfig(**config))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow", "exploding"])
@pytest.mark.parametrize("parameterization", ["eps", "x0", "v", "flow", "edm"])
def test_a_network_that_knows_the_answer_has_no_loss(schedule, parameterization):
    task = objective(schedule, parameterization)
    u, eps = draws(0, PLACES, (3, 4, 4))
    x0 = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    seen = []

    def network(x, clock):
        assert x.shape == x0.shape
        assert clock.shape == (64,)
        seen.append(clock)
        level = task.schedule(times_at(task.schedule, u).float()[:, None, None, None])
        return task.parameterization.target(x0, eps, level)

    losses = task(network, x0, u, eps)
    assert losses.loss.abs().max() < 1e-6
    assert seen[0].isfinite().all()


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v", "flow", "edm"])
def test_what_stands_beside_sees_the_predicted_picture_and_is_added(parameterization):
    task = objective("flow", parameterization)
    u, eps = draws(0, PLACES, (3, 4, 4))
    x0, wrong = (torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    u = 0.05 + 0.9 * u  # at the very ends one of the two cannot be told from the output
    level = task.schedule((task.schedule.t_min + u * (1 - task.schedule.t_min)).float()[:, None, None, None])

    def network(x, clock):  # it takes x for a mixture of another picture
        return task.parameterization.target(
            wrong, (x / task.parameterization.gain(level) - level.alpha * wrong) / level.sigma, level
        )

    def beside(predicted, place):
        torch.testing.assert_close(predicted, wrong, atol=1e-3, rtol=1e-3)
        return 5 + place

    losses = task(network, x0, u, eps, beside)
    plain = task(network, x0, u, eps)
    assert torch.equal(losses.error, plain.loss)
    torch.testing.assert_close(losses.loss, plain.loss + 5 + plain.place)


def test_the_loss_of_predicting_zero_is_the_targets_size():
    x0 = torch.zeros(64, 3, 8, 8)
    u, eps = draws(0, PLACES, (3, 8, 8))
    losses = objective("flow", "flow")(lambda x, clock: torch.zeros_like(x), x0, u, eps)
    torch.testing.assert_close(losses.loss, eps.pow(2).mean(dim=(1, 2, 3)))


def test_what_the_network_sees_is_the_closed_form_mixture():
    task = objective("flow", "flow")
    u, eps = draws(3, PLACES, (1, 2, 2))
    x0 = torch.ones(64, 1, 2, 2)
    seen = {}
    task(lambda x, clock: seen.update(x=x, clock=clock) or x, x0, u, eps)
    t = (1e-3 + u * (1 - 1e-3)).float()[:, None, None, None]
    torch.testing.assert_close(seen["x"], (1 - t) * x0 + t * eps)
    torch.testing.assert_close(seen["clock"], t.flatten())


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_min_snr_weights_the_same_error_alike_in_every_parameterization(parameterization):
    """2303.09556: min(SNR, γ) times the squared error of x0, whatever the network predicts."""
    task = objective("cosine", parameterization, weight="min-snr", gamma=5.0)
    u, eps = draws(0, PLACES, (1, 2, 2))
    u = u.clamp(max=0.95).double()
    x0 = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = 0.1
    t = (u * 1000).floor()[:, None, None, None]
    level = task.schedule(t)

    def network(x, clock):
        wrong = x0 + error
        return task.parameterization.target(wrong, (x - level.alpha * wrong) / level.sigma, level)

    snr = (level.alpha / level.sigma).flatten() ** 2
    expected = snr.clamp(max=5.0) * error**2
    losses = task(network, x0, u, eps.double())
    torch.testing.assert_close(losses.loss, expected, rtol=1e-4, atol=1e-7)


def test_times_follow_their_distribution():
    u, _ = draws(0, range(4000), ())
    for config, cdf in (
        (ObjectiveConfig(), stats.uniform().cdf),
        (
            ObjectiveConfig(times="logit-normal", mean=0.5, deviation=0.8),
            lambda p: stats.norm(0.5, 0.8).cdf(np.log(p / (1 - p))),
        ),
    ):
        task = DenoisingObjective(SCHEDULES["flow"](), PARAMETERIZATIONS["flow"], config)
        place = task(lambda x, c: x, torch.zeros(4000, 1, 1, 1), u, torch.zeros(4000, 1, 1, 1)).place
        assert stats.kstest(place.numpy(), cdf).pvalue > 0.01


def test_discrete_times_are_drawn_equally_often_and_continuous_ones_reach_both_ends():
    """DDPM, algorithm 1: t ~ uniform({1, …, T}), no index rarer than another."""
    schedule = from_betas(np.linspace(0.01, 0.2, 10))
    place = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(times_at(schedule, place).long().bincount(), torch.full((10,), 100))
    ends = torch.tensor([0.0, 1.0])
    assert times_at(schedule, ends).tolist() == [0, 9]
    flow = SCHEDULES["flow"]()
    assert times_at(flow, ends).tolist() == pytest.approx([flow.t_min, flow.t_max])


@pytest.mark.parametrize(("parameterization", "weight"), [("eps", "min-snr"), ("edm", "none")])
def test_a_loss_that_pure_noise_makes_infinite_is_refused_before_the_run(parameterization, weight):
    config = ObjectiveConfig(weight=weight)
    build = lambda zero, p: DenoisingObjective(SCHEDULES["linear"](zero_snr=zero), PARAMETERIZATIONS[p], config)  # noqa: E731
    with pytest.raises(BadData, match=f"{parameterization} with weight {weight} has no finite loss"):
        build(True, parameterization)
    build(False, parameterization)
    u, eps = torch.tensor([0.999999, 1.0]), torch.ones(2, 1, 2, 2)
    assert build(True, "v")(lambda x, c: x, torch.ones(2, 1, 2, 2), u, eps).loss.isfinite().all()


@pytest.mark.parametrize("name", ["deviation", "gamma", "mean"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_numbers_that_draw_or_weigh_nothing_are_refused(name, value):
    if name == "mean" and np.isfinite(value):
        objective(mean=value)
        return
    with pytest.raises(BadData, match=f"objective: {name} must be a number"):
        objective(**{name: value})


def test_a_places_numbers_do_not_depend_on_its_batch():
    u, eps = draws(7, range(10), (3, 4, 4))
    for cut in (range(0, 3), range(3, 10), range(9, 10)):
        part_u, part_eps = draws(7, cut, (3, 4, 4))
        assert torch.equal(part_u, u[cut.start : cut.stop])
        assert torch.equal(part_eps, eps[cut.start : cut.stop])
    assert not torch.equal(draws(8, range(10), (3, 4, 4))[1], eps)
    assert stats.kstest(draws(1, range(300), (64,))[1].flatten().numpy(), "norm").pvalue > 0.01


def test_loss_by_level_puts_each_picture_in_its_slice():
    task = objective("flow", "flow")
    u = torch.tensor([0.1, 0.2, 0.6, 0.99], dtype=torch.float64)
    eps = torch.full((4, 1, 1, 1), 2.0)
    losses = task(lambda x, c: torch.zeros_like(x), torch.zeros(4, 1, 1, 1), u, eps)
    by = loss_by_level(losses)
    assert by[0] == by[2] == by[3] == 4.0
    assert np.isnan(by[1])


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(BadData, match="did you mean 'logit-normal'"):
        objective(times="logit-norml")
    with pytest.raises(BadData, match="did you mean 'min-snr'"):
        objective(weight="minsnr")
