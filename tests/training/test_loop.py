"""Runs that cannot be lost: bytes after kills, order under ranks and accumulation, what a bad step may not do."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.data.pictures import load_pictures
from sfumato.errors import BadData
from sfumato.training.denoiser import DenoiserTask
from sfumato.training.loop import Stopped, train
from sfumato.training.objective import Losses
from sfumato.training.progress import Progress
from sfumato.training.recipe import Recipe, load_recipe
from sfumato.training.state import load_newest

SMALL = [
    "model.size=8",
    "model.network.widths=[8,16]",
    "model.network.context_dim=16",
    "model.text.dim=16",
    "data.where={concept: [redapple, tiger, rocket, pizza, dog, cat]}",
    "batch=6",
    "steps=12",
    "checkpoint_every=3",
    "grid_every=0",
    "optimizer.warmup=2",
    "log_every=1",
]
ROOT = Path(__file__).parents[2]


def recipe(*overrides: str) -> Recipe:
    loaded = load_recipe(ROOT / "recipes/tiny.yaml", [*SMALL, *overrides])
    return replace(loaded, data=replace(loaded.data, where={}))


@pytest.fixture(scope="module")
def pictures():
    return load_pictures(recipe().data, 8, ROOT / "recipes")


def run(pictures, folder: Path, *overrides: str, task=DenoiserTask) -> bytes:
    r = recipe(*overrides)
    return train(task(r, pictures, folder), r, folder, Progress(quiet=True)).read_bytes()


class Interrupting(DenoiserTask):
    """Raises in the middle of a given step, as a crash would."""

    at = 0

    def fetch(self, places):
        if places.start >= self.at * self.recipe.batch:
            raise MemoryError
        return super().fetch(places)


@pytest.mark.parametrize("overrides", [(), ("accumulate=3",), ("workers=2",), ("optimizer.name=muon",)], ids=str)
def test_a_run_crashed_after_any_step_ends_in_the_same_bytes(pictures, tmp_path: Path, overrides, soak: bool):
    whole = run(pictures, tmp_path / "whole", *overrides)
    states = sorted((tmp_path / "whole/checkpoints").glob("*.safetensors"))
    for at in range(12) if soak else (1, 5, 9):
        folder = tmp_path / f"crash-{at}"
        with pytest.raises(MemoryError):
            run(pictures, folder, *overrides, task=type("At", (Interrupting,), {"at": at}))
        assert run(pictures, folder, *overrides) == whole
        for state in states:  # weights, averages and moments alike
            assert (folder / "checkpoints" / state.name).read_bytes() == state.read_bytes()
        steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 13))


def figures(folder: Path, key: str = "loss") -> list[float]:
    return [json.loads(line)[key] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_accumulation_and_workers_change_nothing_but_rounding(pictures, tmp_path: Path):
    whole = run(pictures, tmp_path / "whole")
    assert run(pictures, tmp_path / "workers", "workers=2") == whole
    run(pictures, tmp_path / "parts", "accumulate=3")
    for key, first in (("loss", 1e-6), ("norm", 1e-4)):
        a, b = figures(tmp_path / "whole", key), figures(tmp_path / "parts", key)
        assert b[0] == pytest.approx(a[0], abs=first)
        assert b == pytest.approx(a, rel=0.02)  # Adam magnifies rounding where a gradient is nearly nothing


def test_sigterm_saves_and_says_143(pictures, tmp_path: Path):
    class Terminated(DenoiserTask):
        def fetch(self, places):
            if places.start == 4 * self.recipe.batch:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().fetch(places)

    whole = run(pictures, tmp_path / "whole")
    with pytest.raises(Stopped) as e:
        run(pictures, tmp_path / "stopped", task=Terminated)
    assert e.value.code == 143
    assert (tmp_path / "stopped/checkpoints/step-00000005.json").exists()
    assert run(pictures, tmp_path / "stopped") == whole


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_step_is_not_applied_and_too_many_end_the_run(pictures, tmp_path: Path, where: str):
    bad: set[int] = set()

    class Faulty(DenoiserTask):
        step = -1

        def fetch(self, places):
            self.step = places.start // self.recipe.batch
            return super().fetch(places)

        def losses(self, module, batch):
            losses = super().losses(module, batch)
            if self.step not in bad:
                return losses
            if where == "loss":
                return Losses(losses.loss * float("nan"), losses.place)
            losses.loss.register_hook(lambda g: g * float("inf"))
            return losses

    def weights(folder: Path, steps: int) -> dict[str, torch.Tensor]:
        r = recipe(f"steps={steps}", "optimizer.decay=0")
        task = Faulty(r, pictures, folder)
        train(task, r, folder, Progress(quiet=True))
        return dict(task.module.state_dict())

    before = weights(tmp_path / "before", 5)
    bad.update({5, 6})
    after = weights(tmp_path / "after", 7)
    assert all(torch.equal(before[k], v) for k, v in after.items())
    bad.update(range(3, 100))
    with pytest.raises(BadData, match="10 steps in a row"):
        weights(tmp_path / "ends", 60)
    last = load_newest(tmp_path / "ends/checkpoints", pytest.fail)
    assert last is not None
    good = weights(tmp_path / "good", 3)
    assert all(torch.equal(last.tensors[f"model.{k}"], v) for k, v in good.items())


def test_a_run_of_another_recipe_is_refused_but_may_go_on_longer(pictures, tmp_path: Path):
    run(pictures, tmp_path, "steps=3")
    with pytest.raises(BadData, match=r"another recipe \(differs in optimizer, seed\)"):
        run(pictures, tmp_path, "seed=1", "optimizer.rate=1")
    changed = replace(pictures, images=pictures.images.clone())
    changed.images[0, 0, 0, 0] ^= 1
    with pytest.raises(BadData, match=r"differs in the data's content"):
        run(changed, tmp_path, "steps=4")
    with pytest.raises(BadData, match="cannot be cut into"):
        run(pictures, tmp_path, "accumulate=4")
    run(pictures, tmp_path, "steps=6")
    assert (tmp_path / "checkpoints/step-00000006.json").exists()


def command(folder: Path, *overrides: str, launcher: tuple[str, ...] = (sys.executable, "-m")) -> list[str]:
    small = [o for o in SMALL if not o.startswith("data.where")]
    recipe_path = str(ROOT / "recipes/tiny.yaml")
    return [*launcher, "sfumato", "train", recipe_path, *small, *overrides, f"run={folder}"]


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def test_kill_9_at_any_moment_of_the_real_command_ends_in_the_same_bytes(tmp_path: Path, soak: bool):
    args = ("steps=40", "checkpoint_every=2")
    subprocess.run(command(tmp_path / "whole", *args), env=ENV, check=True, capture_output=True)
    rng = random.Random(0)
    kills = 0
    for _ in range(40):
        process = subprocess.Popen(
            command(tmp_path / "killed", *args), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        seen = set((tmp_path / "killed/checkpoints").glob("*"))
        while process.poll() is None and set((tmp_path / "killed/checkpoints").glob("*")) <= seen:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.5)  # somewhere after the first new file of a checkpoint, often inside a save
        if process.poll() is not None or kills == (20 if soak else 2):
            assert process.wait() == 0, process.stderr and process.stderr.read()
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills >= 1
    assert (tmp_path / "killed/final.safetensors").read_bytes() == (tmp_path / "whole/final.safetensors").read_bytes()
    leftovers = [p.name for p in (tmp_path / "killed/checkpoints").glob(".*")]
    assert leftovers == []


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_see_the_same_order_and_agree_with_one(tmp_path: Path, parallel: str):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    args = ("steps=4", "checkpoint_every=4", "accumulate=1" if parallel == "ddp" else "accumulate=3")
    args += (f"parallel={parallel}",)
    subprocess.run(command(tmp_path / "one", *args), env=ENV, check=True, capture_output=True)
    subprocess.run(
        command(tmp_path / "two", *args, launcher=(sys.executable, *launcher)), env=ENV, check=True, capture_output=True
    )

    one, two = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert two[0] == pytest.approx(one[0], abs=1e-6)
    assert two == pytest.approx(one, rel=0.02)
    # Taken up by a world of another size, the run goes on where it was.
    for name in ("one", "two"):
        subprocess.run(
            command(tmp_path / name, "steps=6", f"parallel={parallel}"), env=ENV, check=True, capture_output=True
        )
    assert len(figures(tmp_path / "two")) == 6
    assert figures(tmp_path / "two") == pytest.approx(figures(tmp_path / "one"), rel=0.02)
