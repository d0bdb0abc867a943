"""Averages, rates, optimizers, recipes, checkpoints: each against its definition."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sfumato.config import from_dict, to_dict
from sfumato.errors import BadData, NoResources
from sfumato.networks.experts import Experts
from sfumato.training.ema import EMA
from sfumato.training.loop import learning_rate
from sfumato.training.optimizers import Muon, build_optimizers, orthogonalize, restore, tensors_of
from sfumato.training.progress import Progress
from sfumato.training.recipe import OptimizerConfig, Recipe, build_recipe, load_recipe
from sfumato.training.runlog import RunLog
from sfumato.training.state import Checkpoint, load_newest, save_checkpoint


def test_ema_is_the_weighted_sum_of_the_weights_it_saw():
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 1.0)
    ema = EMA(net, (0.9, 0.5))
    expected = [1.0, 1.0]
    for step, w in enumerate([2.0, -1.0, 5.0] * 40):
        nn.init.constant_(net.weight, w)
        ema.update(net, step)
        for i, decay in enumerate((0.9, 0.5)):
            d = min(decay, (1 + step) / (10 + step))
            expected[i] = d * expected[i] + (1 - d) * w
    assert [float(a["weight"]) for a in ema.averages] == pytest.approx(expected, rel=1e-5)
    assert expected[0] != pytest.approx(expected[1], rel=1e-2)


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    config = OptimizerConfig(warmup=10, decay=0.5)
    shares = [learning_rate(config, step, 100) for step in range(100)]
    assert shares[0] == 0.1
    assert shares[9:51] == [1.0] * 42
    assert shares[75] == 0.5
    assert shares[99] == pytest.approx(0.02)
    assert learning_rate(OptimizerConfig(warmup=0, decay=0.0), 0, 10) == 1.0


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rate", math.nan), ("rate", math.inf), ("rate", -1e-3), ("muon_rate", math.nan), ("momentum", 1.0),
        ("betas", (0.9, 1.0)), ("betas", (-0.1, 0.9)), ("weight_decay", -0.1), ("warmup", -1), ("decay", 1.5),
        ("clip", 0.0), ("clip", -1.0), ("clip", math.nan), ("slow", {"weight": -1.0}),
    ],
)  # fmt: skip
def test_rates_that_would_unlearn_or_learn_nothing_are_refused(setting, value):
    with pytest.raises(BadData, match=rf"optimizer: {setting} must .*, not "):
        build_optimizers(nn.Linear(2, 2), replace(OptimizerConfig(), **{setting: value}))
    build_optimizers(nn.Linear(2, 2), OptimizerConfig(clip=math.inf, decay=0, warmup=0, weight_decay=0))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_bad_step_does_not_hide_the_loss_of_the_good_ones(bad):
    progress = Progress(quiet=True)
    for loss in (bad, 2.0, bad, 2.0):
        progress.step(1, loss, [bad if loss is bad else 1.0], 1)
    assert progress.loss == 2.0
    assert progress._levels == [1.0]


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    o = orthogonalize(g)
    assert o.dtype == torch.float32
    s = torch.linalg.svdvals(o)
    assert 0.6 < s.min() <= s.max() < 1.3
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    mixed = u.T @ o @ vh.T  # diagonal in g's own singular basis
    assert (mixed - mixed.diag().diag()).abs().max() < 1e-4


def test_muon_takes_hidden_matrices_and_adamw_the_rest_each_once():
    net = nn.ModuleDict({"conv_in": nn.Conv2d(3, 8, 3), "hidden": nn.Conv2d(8, 8, 3), "tokens": nn.Embedding(5, 8)})
    net["block"] = nn.ModuleDict({"experts": Experts(8, 2, 4, 1.0)})
    adamw, muon = build_optimizers(net, OptimizerConfig(name="muon"))
    assert isinstance(muon, Muon)
    held = [p for o in (adamw, muon) for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in net.parameters()}
    assert len(held) == len(list(net.parameters()))
    assert [id(p) for group in muon.param_groups for p in group["params"]] == [id(net["hidden"].weight)]
    decays = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    for own in (net["tokens"].weight, net["hidden"].bias, net["block"]["experts"].bias):
        assert decays[id(own)] == 0
    assert decays[id(net["conv_in"].weight)] > 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_optimizer_state_survives_exactly_in_any_memory_layout(name, layout):
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=layout)
        return net, build_optimizers(net, OptimizerConfig(name=name, rate=0.01))

    def steps(net, optimizers, first, last):
        for i in range(first, last):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i))
            for o in optimizers:
                o.zero_grad()
            net(x).square().mean().backward()
            for o in optimizers:
                o.step()

    whole, optimizers = make()
    steps(whole, optimizers, 0, 6)
    first, before = make()
    steps(first, before, 0, 3)
    second, after = make()
    second.load_state_dict(first.state_dict())
    kept = tensors_of(before, {p: n for n, p in first.named_parameters()})
    restore(after, {k: v.clone().contiguous() for k, v in kept.items()}, {p: n for n, p in second.named_parameters()})
    steps(second, after, 3, 6)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"w": torch.full((50,), float(step)), "n": torch.tensor(step)}, {"note": "x"})


def test_the_newest_whole_checkpoint_is_found_and_old_ones_go(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert sorted(p.stem for p in tmp_path.glob("*.json")) == ["step-00000003", "step-00000004"]
    newest = load_newest(tmp_path, pytest.fail)
    assert newest is not None
    assert newest.step == 4
    assert newest.plain == {"note": "x"}
    assert torch.equal(newest.tensors["w"], torch.full((50,), 4.0))
    assert load_newest(tmp_path / "nowhere", pytest.fail) is None


@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_after_a_fallback_is_kept_and_what_was_damaged_goes(tmp_path: Path, keep: int):
    for step in (8, 9):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
        (tmp_path / f"step-{step:08d}.safetensors").write_bytes(b"damaged")
    assert load_newest(tmp_path, lambda _: None) is None
    for step in (3, 4):
        save_checkpoint(tmp_path, checkpoint(step), keep)
        newest = load_newest(tmp_path, pytest.fail)
        assert newest is not None
        assert newest.step == step
    assert len(list(tmp_path.iterdir())) == 2 * keep


@pytest.mark.parametrize("part", ["safetensors", "json"])
def test_any_flipped_byte_or_truncation_falls_back_and_says_so(tmp_path: Path, part: str):
    save_checkpoint(tmp_path, checkpoint(1), keep=3)
    save_checkpoint(tmp_path, checkpoint(2), keep=3)
    path = tmp_path / f"step-00000002.{part}"
    whole = path.read_bytes()
    damaged = [whole[: len(whole) // 2], b"", whole[:-1]]
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 7)]
    for data in damaged:
        path.write_bytes(data)
        warnings: list[str] = []
        found = load_newest(tmp_path, warnings.append)
        assert found is not None
        if found.step == 2:  # a flip within the JSON that changes neither tensors nor what is read of it
            assert part == "json"
            assert torch.equal(found.tensors["w"], torch.full((50,), 2.0))
        else:
            assert found.step == 1
            assert len(warnings) == 1
            assert "step-00000002" in warnings[0]


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(tmp_path, checkpoint(1), keep=3)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoResources, match="No space left"):
        save_checkpoint(tmp_path, checkpoint(2), keep=3)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert NoResources.exit_code == 5


def test_the_log_keeps_no_step_twice_and_no_half_line(tmp_path: Path):
    lines = [json.dumps({"step": s}) for s in (10, 20, 30)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 4')
    with RunLog(tmp_path, 20, tensorboard=False) as log:
        log.write(30, {"loss": float("nan"), "by_level": [1.0, float("inf")]})
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [10, 20, 30]
    assert records[-1] == {"step": 30, "loss": None, "by_level": [1.0, None]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stepz=3"], "unknown setting 'stepz'; did you mean 'steps'"),
        (["optimizer.ratee=3"], "optimizer: unknown setting 'ratee'; did you mean 'rate'"),
        (["steps=many"], "steps: expected int, got 'many'"),
        (["steps=true"], "steps: expected int, got True"),
        (["steps=0"], "steps must be at least 1"),
        (["ema=0.9"], "ema: expected a list"),
        (["ema=[1.5]"], "decays in"),
        (["model.network.widths=[8,8,8]"], "as many attention flags"),
        (["model.schedule=flaw"], "no schedule named 'flaw'; did you mean 'flow'"),
        (["model.text.dim=8"], "context_dim is 48, but text.dim is 8"),
        (["model.size=15"], "size 15 is not a multiple of 2"),
        (["precision=fp8"], "precision is one of"),
        (["steps"], "not of the form key=value"),
        (["steps.more=1"], "steps is not a group"),
        (["model=3"], "expected a group of settings"),
        (["seed=18446744073709551616"], "seed must be below"),
        (["card.date=2024-13-45"], "the value is not readable YAML"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(overrides: list[str], message: str):
    with pytest.raises(BadData, match=message) as e:
        load_recipe(Path("recipes/tiny.yaml"), overrides)
    assert "\n" not in str(e.value)


def test_recipes_that_cannot_be_read(tmp_path: Path):
    for name, text in (("a.yaml", "a: [1"), ("b.yaml", "- 1"), ("c.yaml", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(BadData, match=name):
            load_recipe(tmp_path / name, [])
    (tmp_path / "d.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadData, match="not a readable"):
        load_recipe(tmp_path / "d.yaml", [])
    with pytest.raises(BadData, match="no recipe"):
        load_recipe(tmp_path / "none.yaml", [])


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_survive_the_round_trip_through_plain_data(path: Path):
    if path.stem == "emoji":  # the corpus's recipe, not a run's
        return
    recipe = load_recipe(path, [])
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe))), "x") == recipe
    with pytest.raises(BadData, match="too large a number"):
        from_dict(Recipe, to_dict(recipe) | {"optimizer": {"rate": 10**400}}, "x")


def test_a_recipe_says_what_differs_from_the_defaults_group_by_group():
    before = Recipe()
    now = build_recipe({"model": {"size": 64, "network": {"blocks": 3}, "text": {"layers": 2}}}, [], "settings")
    assert now.model.network == replace(before.model.network, blocks=3)
    assert now.model.text == replace(before.model.text, layers=2)
    assert (now.model.defaults.width, now.model.defaults.height) == (64, 64)
    clip = build_recipe({}, ["clip.network.text.layers=2"], "settings").clip.network.text
    assert clip == replace(before.clip.network.text, layers=2)


def test_numbers_in_yaml_and_overrides():
    recipe = build_recipe({}, ["optimizer.rate=1e-3", "optimizer.betas=[0.9, 1]", "name=x"], "settings")
    assert recipe.optimizer.rate == 1e-3
    assert recipe.optimizer.betas == (0.9, 1.0)


def test_slow_parameters_learn_at_their_share_of_the_rate_and_frozen_ones_not_at_all():
    module = torch.nn.ModuleDict({k: torch.nn.Linear(4, 4) for k in ("text", "network", "fixed")})
    module["fixed"].requires_grad_(False)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    (optimizer,) = build_optimizers(module, OptimizerConfig(rate=0.01, weight_decay=0.0, slow={"text": 0.1}))
    for p in module.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()  # Adam's first step is its rate, whatever the gradient
    moved = {n: float((p - before[n]).abs().mean().detach()) for n, p in module.named_parameters()}
    assert moved["network.weight"] == pytest.approx(0.01, rel=1e-3)
    assert [moved["text.weight"], moved["text.bias"]] == pytest.approx([0.001, 0.001], rel=1e-3)
    assert moved["fixed.weight"] == 0
    with pytest.raises(BadData, match="no parameter that learns begins with 'txet'"):
        build_optimizers(module, OptimizerConfig(slow={"txet": 0.1}))


def test_muon_in_bf16_moves_as_in_fp32_does():
    torch.manual_seed(0)
    steps = []
    for bf16 in (False, True):
        p = torch.nn.Parameter(torch.zeros(24, 40))
        p.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
        Muon([p], 0.02, 0.95, 0.0, bf16).step()
        steps.append(p.detach())
    assert torch.nn.functional.cosine_similarity(*(s.flatten() for s in steps), dim=0) > 0.999


def test_tensorboard_is_optional_and_says_how_to_get_it(tmp_path: Path):
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        with pytest.raises(NoResources, match="pip install tensorboard"):
            RunLog(tmp_path, 0, tensorboard=True)
        return
    with RunLog(tmp_path, 0, tensorboard=True) as log:
        log.write(1, {"loss": 1.0, "by_level": [1.0, 2.0]})
    assert list((tmp_path / "tensorboard").iterdir())
