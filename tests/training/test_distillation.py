"""A student of few steps: its goal in closed form, what a small one learns, and runs from a model to a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_latent import COMMON, VAE, forget_the_end, latent, on_pixels, train
from torch import Tensor

from sfumato.checkpoints.tensors import read_header
from sfumato.config import from_dict
from sfumato.diffusion import PARAMETERIZATIONS, SCHEDULES, SPACINGS, NoiseLevel, Prediction
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.errors import BadCheckpoint, BadData
from sfumato.families.native import read_native
from sfumato.pipeline.pipeline import load
from sfumato.training.cli import main
from sfumato.training.consistency import ConsistencyObjective
from sfumato.training.distillation import DistillTask
from sfumato.training.draws import draws
from sfumato.training.progress import Progress
from sfumato.training.recipe import Recipe
from sfumato.training.tasks import build_task
from sfumato.training.world import World

DEVIATION = 0.5  # of the data, N(0, DEVIATION²): every path is a multiple of its start


def spread(level: NoiseLevel) -> Tensor:
    return ((level.alpha * DEVIATION) ** 2 + level.sigma**2) ** 0.5


def ideal(x: Tensor, level: NoiseLevel) -> Prediction:
    return Prediction.from_x0(x, level, level.alpha * DEVIATION**2 / spread(level) ** 2 * x)


def batch(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    u, eps = draws(seed, range(n), (1, 1, 1))
    x0 = DEVIATION * torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return x0, u, eps.double()


class Exact:
    """A student that goes along the exact path to the end of each segment."""

    def __init__(self, objective: ConsistencyObjective):
        self.objective = objective

    def __call__(self, x: Tensor, clock: Tensor) -> Tensor:
        o = self.objective
        place = (o.path[:-1, 0][None] - clock.double()[:, None]).abs().argmin(1)
        here = o.level(place, x)
        end = o.level((place // o.substeps + 1) * o.substeps, x)
        there = x * spread(end) / spread(here)
        return o.parameterization.target(*Prediction.through(x, here, there, end), here)


@pytest.mark.parametrize("schedule", ["flow", "linear"])
@pytest.mark.parametrize("parameterization", ["flow", "v", "x0"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_exact_student_is_off_by_its_teachers_steps_alone(schedule: str, parameterization: str, steps: int) -> None:
    """Euler's error h² over k steps' way to the segment's end is h/k: squared and averaged over all levels ∝ h³."""
    losses = []
    for substeps in (40, 80):
        objective = ConsistencyObjective(SCHEDULES[schedule](), PARAMETERIZATIONS[parameterization], steps, substeps)
        losses.append(float(objective(Exact(objective), ideal, *batch(4000)).loss.mean()))
    assert losses[0] < 1e-2
    ratio, x0s = losses[0] / losses[1], parameterization == "x0" and steps == 1  # x0's error has σ² besides, there ∝ h²
    assert ratio > 3
    assert schedule != "flow" or (13 < ratio < 19 if x0s else 6.5 < ratio < 9.5)


def test_a_student_whose_segments_are_single_steps_learns_what_its_teacher_says() -> None:
    objective = ConsistencyObjective(SCHEDULES["flow"](), PARAMETERIZATIONS["flow"], 6, 1)
    x0, u, eps = batch(50)

    def teachers_own(x: Tensor, clock: Tensor) -> Tensor:
        level = SCHEDULES["flow"]()(clock.double()[:, None, None, None])
        return PARAMETERIZATIONS["flow"].target(*ideal(x, level), level)

    assert objective(teachers_own, ideal, x0, u, eps).loss.max() < 1e-9


def test_the_goal_takes_no_gradient_and_levels_are_met_equally() -> None:
    objective = ConsistencyObjective(SCHEDULES["flow"](), PARAMETERIZATIONS["flow"], 2, 5)
    x0, u, eps = batch(200)
    w = torch.tensor(0.3, requires_grad=True)
    kept = torch.tensor(0.3)
    calls = []

    def student(x: Tensor, clock: Tensor) -> Tensor:
        calls.append(clock)
        return (w if torch.is_grad_enabled() else kept) * x

    (own,) = torch.autograd.grad(objective(student, ideal, x0, u, eps).loss.mean(), w)
    (same,) = torch.autograd.grad(
        objective(lambda x, clock: w * x, ideal, x0, u, eps).loss.mean(),
        w,  # detached by the objective itself
    )
    assert own == same
    assert own != 0
    assert all((clock > 0).all() for clock in calls)
    place = objective(student, ideal, x0, (torch.arange(200) + 0.5) / 200, eps).place
    assert torch.equal((place * 10).long().bincount(), torch.full((10,), 20))


class Table(torch.nn.Module):
    """The linear network of this data: one factor for each level of the teacher's path."""

    def __init__(self, objective: ConsistencyObjective):
        super().__init__()
        self.times = objective.path[:-1, 0].float()
        self.factors = torch.nn.Parameter(torch.zeros(len(self.times), dtype=torch.float64))

    def forward(self, x: Tensor, clock: Tensor) -> Tensor:
        return self.factors[(self.times[None] - clock[:, None]).abs().argmin(1)][:, None, None, None] * x


@pytest.mark.parametrize("steps", [1, 2])
def test_a_small_student_reaches_in_few_steps_what_its_teacher_needs_many_for(steps: int) -> None:
    schedule, flow = SCHEDULES["flow"](), PARAMETERIZATIONS["flow"]
    objective = ConsistencyObjective(schedule, flow, steps, 32 // steps)
    student = Table(objective)
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    for step in range(800):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 800)
        optimizer.zero_grad()
        objective(student, ideal, *batch(256, 10 + step)).loss.mean().backward()
        optimizer.step()

    def taught(x: Tensor, level: NoiseLevel) -> Prediction:
        return flow(x, level, student(x, torch.full((len(x),), float(level.t))))

    x = torch.randn(500, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def ends(denoise, n: int) -> Tensor:
        return list(SAMPLERS["ddim"](denoise, x, SPACINGS["trailing"](schedule, n), torch.randn_like))[-1].x

    with torch.no_grad():
        many, few, untaught = ends(ideal, 32), ends(taught, steps), ends(ideal, steps)
    scale = many.std()
    assert (few - many).abs().mean() < 0.05 * scale
    assert (untaught - many).abs().mean() > 0.1 * scale


# ── from a model to a model ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    return train(latent(str(train(VAE, folder, "vae"))), folder, "teacher")


def distill(teacher: Path, **settings: object) -> dict:
    return {**COMMON, "name": "student", "task": "distill", "distill": {"teacher": str(teacher), **settings}}


def test_a_student_is_a_model_that_draws_in_its_steps(teacher: Path, tmp_path: Path) -> None:
    raw = {
        **distill(teacher, steps=2, substeps=3, guidance=2.5),
        "grid_every": 6,
        "grid_prompts": ["a red apple"],
        "evaluate_every": 6,
        "evaluate_n": 10,
        "evaluate_metrics": ["clip"],
    }
    final = train(raw, tmp_path, "whole")
    whole = final.read_bytes()
    pipe = load(final)
    defaults = pipe.model.defaults
    assert (defaults.sampler, defaults.spacing, defaults.steps, defaults.guidance) == ("ddim", "trailing", 2, 1.0)
    assert pipe.generate("a red apple", seed=1)[0].request.steps == 2
    assert (tmp_path / "whole/grid-00000006.png").exists()
    own, theirs = load_file(final), load_file(teacher)
    assert own.keys() == theirs.keys()
    for name, tensor in theirs.items():
        learned = name.startswith("network.") and not torch.equal(own[name], tensor)
        assert learned or torch.equal(own[name], tensor)
    assert not torch.equal(own["network.conv_out.weight"], theirs["network.conv_out.weight"])

    forget_the_end(tmp_path / "whole")
    assert train(raw, tmp_path, "whole").read_bytes() == whole
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 7))
    (measured,) = [line for line in lines if "loss" not in line]
    assert "'steps': 2" in str(measured)
    assert "'guidance': 1.0" in str(measured)


def test_the_teacher_is_followed_with_its_guidance(teacher: Path, tmp_path: Path) -> None:
    """One doubled batch of captions filled to one width says what the pipeline says of each caption by itself."""
    raw = {**distill(teacher, guidance=3.5), "data": {"path": "sample", "captions": "template", "variants": 2}}
    task = build_task(from_dict(Recipe, raw, "test"), tmp_path, tmp_path / "run", World(), Progress(quiet=True))
    assert isinstance(task, DistillTask)
    fetched, captions = task.fetch(range(3)), task.pictures.take(0, range(3)).captions
    x = torch.randn(3, 3, 4, 4)
    level = task.objective.schedule(torch.tensor([0.9, 0.5, 0.2])[:, None, None, None])
    found = task.guide(task._pair(fetched.words, torch.device("cpu")))(x, level).x0
    model = read_native(teacher)
    p = model.config.build_parameterization()
    for i, caption in enumerate(captions):
        own = NoiseLevel(*(float(v[i]) for v in level))
        clock = torch.tensor([float(p.clock(own))])
        says = [
            p(x[i : i + 1], own, model.network(x[i : i + 1], clock, **model.text.encode([c]))) for c in (caption, "")
        ]
        expected = says[1].lerp(says[0], 3.5).x0
        torch.testing.assert_close(found[i : i + 1], expected, atol=5e-3, rtol=5e-3)  # captions are kept in fp16


def test_pixels_and_a_learned_vocabulary_are_the_teachers(tmp_path: Path) -> None:
    raw = on_pixels()
    raw["model"]["text"] |= {"tokenizer": "learned"}
    teacher = train(raw, tmp_path, "pixels")
    student = train(distill(teacher, steps=1, substeps=2), tmp_path, "student", "batch=2", "steps=1")
    assert read_native(student).text.tokenizer.to_str() == read_native(teacher).text.tokenizer.to_str()
    assert load(student).generate("a red apple", seed=1)[0].pixels.shape == (16, 16, 3)


def test_another_teacher_is_another_run(teacher: Path, tmp_path: Path) -> None:
    own = tmp_path / "teacher.safetensors"
    own.write_bytes(teacher.read_bytes())
    raw = distill(own, steps=1, substeps=2)
    train(raw, tmp_path, "student", "steps=1")
    tensors = load_file(own)
    tensors["network.conv_out.bias"] += 0.1
    save_file(tensors, own, read_header(own).metadata)
    with pytest.raises(BadData, match="the data's content"):
        train(raw, tmp_path, "student")


def test_a_teacher_that_says_nothing_of_pure_noise_is_refused() -> None:
    with pytest.raises(BadData, match="predicts eps cannot be followed from pure noise"):
        ConsistencyObjective(SCHEDULES["flow"](), PARAMETERIZATIONS["eps"], 2, 4)
    ConsistencyObjective(SCHEDULES["linear"](), PARAMETERIZATIONS["eps"], 2, 4)


def test_what_a_student_cannot_have_is_refused(teacher: Path, tmp_path: Path) -> None:
    def refused(raw: dict, kind: type[Exception], match: str) -> None:
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump(raw))
        with pytest.raises(kind, match=match):
            main([str(path), "--run", str(tmp_path / "bad")])

    raw = distill(teacher)
    refused({**raw, "distill": {}}, BadData, "needs distill.teacher")
    refused({**raw, "model": {"size": 64}}, BadData, "leave model out")
    refused({**raw, "model": {"defaults": {"steps": 9}}}, BadData, "leave model out")
    refused({**raw, "latents": {"align": 0.5}}, BadData, "leave latents out")
    for name, value in (("steps", 0), ("substeps", -1), ("guidance", 0.5), ("guidance", float("nan"))):
        refused(distill(teacher, **{name: value}), BadData, f"distill.{name} must be")
    refused(distill(teacher, adversarial=-0.1), BadData, r"distill.adversarial must be")
    refused({**raw, "objective": {"weight": "min-snr"}}, BadData, "does not read objective")
    refused(distill(Path("sample")), BadCheckpoint, "sample")
