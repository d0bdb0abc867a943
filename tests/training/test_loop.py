"""Runs that cannot be lost: bytes after kills, order under ranks and accumulation, what a bad step may not do."""

import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ENV, command, few, figures, recipe, run, states

from faults import spoil, write_pictures
from sfumato.cli import main
from sfumato.data.pictures import load_pictures
from sfumato.errors import BadData
from sfumato.training.denoiser import DenoiserTask
from sfumato.training.grid import write_sheet
from sfumato.training.loop import Stopped
from sfumato.training.objective import Losses
from sfumato.training.state import load_newest


@pytest.fixture(scope="module")
def pictures():
    return few(200)


class Interrupting(DenoiserTask):
    """Raises in the middle of a given step, as a crash would."""

    at = 0

    def fetch(self, places):
        if places.start >= self.at * self.recipe.batch:
            raise MemoryError
        return super().fetch(places)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_crashed_after_any_step_ends_in_the_same_bytes(
    pictures, tmp_path: Path, workers: int, accumulate: int, optimizer: str, soak: bool
):
    if optimizer == "muon" and not soak and (workers or accumulate > 1):
        pytest.skip("muon under workers and accumulation: --soak")
    steps = 50 if soak else 12
    overrides = (f"workers={workers}", f"accumulate={accumulate}", f"optimizer.name={optimizer}", f"steps={steps}",
                 "model.network.dropout=0.1", "optimizer.decay=0.5", "keep=99")  # fmt: skip
    whole = run(pictures, tmp_path / "whole", *overrides)
    for at in range(steps) if soak else (1, 5, 9):
        folder = tmp_path / f"crash-{at}"
        with pytest.raises(MemoryError):
            run(pictures, folder, *overrides, task=type("At", (Interrupting,), {"at": at}))
        torch.manual_seed(at), random.seed(at), np.random.seed(at)  # what a new process begins with is no part of a run
        assert run(pictures, folder, *overrides) == whole
        assert states(folder) == states(tmp_path / "whole")
        assert figures(folder, "step") == list(range(1, steps + 1))
    last = json.loads((tmp_path / f"whole/checkpoints/step-{steps:08d}.json").read_text())
    assert last["cursor"] == {"place": 6 * steps}
    assert last["rng"] == {"seed": 0, "counter": 6 * steps}


def test_a_run_in_buckets_crashed_in_the_middle_of_an_epoch_ends_in_the_same_bytes(tmp_path: Path):
    data = tmp_path / "data"
    for name, size in (("square", (16, 16)), ("wide", (30, 16)), ("tall", (16, 30))):
        write_pictures(data / name, 11, size)
    config = replace(recipe().data, path=str(data), captions="plain", max_aspect=2.0)
    pictures = load_pictures(config, 8, tmp_path, multiple=2, step_size=6)
    shapes: list[tuple[int, ...]] = []

    class Noting(DenoiserTask):
        def losses(self, module, batch):
            shapes.append(tuple(batch.x0.shape[-2:]))
            return super().losses(module, batch)

    whole = run(pictures, tmp_path / "whole", "workers=2", task=Noting)
    assert set(shapes) == {(8, 8), (6, 10), (10, 6)}
    for at in (4, 7):
        folder = tmp_path / f"crash-{at}"
        with pytest.raises(MemoryError):
            run(pictures, folder, task=type("At", (Interrupting,), {"at": at}))
        assert run(pictures, folder) == whole


def test_accumulation_and_workers_change_nothing_but_rounding(pictures, tmp_path: Path):
    whole = run(pictures, tmp_path / "whole")
    assert run(pictures, tmp_path / "workers", "workers=2") == whole
    run(pictures, tmp_path / "parts", "accumulate=3")
    for key, first in (("loss", 1e-6), ("norm", 1e-4)):
        a, b = figures(tmp_path / "whole", key), figures(tmp_path / "parts", key)
        assert b[0] == pytest.approx(a[0], abs=first)
        assert b == pytest.approx(a, rel=0.02)  # Adam magnifies rounding where a gradient is nearly nothing


def test_a_compiled_step_learns_the_same(pictures, tmp_path: Path, soak: bool):
    if not soak:
        pytest.skip("compiling takes a minute: --soak")
    run(pictures, tmp_path / "eager")
    whole = run(pictures, tmp_path / "compiled", "compile=true")
    assert figures(tmp_path / "compiled") == pytest.approx(figures(tmp_path / "eager"), rel=0.02)
    assert figures(tmp_path / "compiled")[0] == pytest.approx(figures(tmp_path / "eager")[0], abs=1e-5)
    with pytest.raises(MemoryError):
        run(pictures, tmp_path / "crash", "compile=true", task=type("At", (Interrupting,), {"at": 5}))
    assert run(pictures, tmp_path / "crash", "compile=true") == whole


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


@pytest.mark.parametrize("where", ["batch", "loss", "gradient"])
def test_a_bad_step_is_not_applied_and_too_many_end_the_run(pictures, tmp_path: Path, where: str):
    bad: set[int] = set()

    class Faulty(DenoiserTask):
        step = -1

        def fetch(self, places):
            self.step = places.start // self.recipe.batch
            batch = super().fetch(places)
            if where == "batch" and self.step in bad:
                batch.x0[0, 0, 0, 0] = float("nan")
            return batch

        def losses(self, module, batch):
            losses = super().losses(module, batch)
            if self.step not in bad or where == "batch":
                return losses
            if where == "loss":
                return Losses(losses.loss * float("nan"), losses.place)
            losses.loss.register_hook(lambda g: g * float("inf"))
            return losses

    def weights(folder: Path, steps: int) -> dict[str, torch.Tensor]:
        """Return weights, averages and moments after so many steps."""
        run(pictures, folder, f"steps={steps}", task=Faulty)
        newest = load_newest(folder / "checkpoints", pytest.fail)
        assert newest is not None
        return dict(newest.tensors)

    before = weights(tmp_path / "before", 5)
    bad.update({5, 6})
    after = weights(tmp_path / "after", 7)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], v) for k, v in after.items())
    bad.update(range(3, 100))
    with pytest.raises(BadData, match="10 steps in a row"):
        weights(tmp_path / "ends", 60)
    last = load_newest(tmp_path / "ends/checkpoints", pytest.fail)
    assert last is not None
    good = weights(tmp_path / "good", 3)
    assert all(torch.equal(last.tensors[k], v) for k, v in good.items())


def test_weights_that_no_good_step_followed_never_take_a_good_checkpoint_s_place(pictures, tmp_path: Path):
    class Wrecked(DenoiserTask):
        def fetch(self, places):
            if places.start == 5 * self.recipe.batch:  # as an update that overflowed would leave them
                for p in self.module.parameters():
                    p.data.mul_(1e30)
            return super().fetch(places)

    with pytest.raises(BadData, match="10 steps in a row"):
        run(pictures, tmp_path / "wrecked", "steps=30", task=Wrecked)
    run(pictures, tmp_path / "good", "steps=3")
    wrecked, good = (load_newest(tmp_path / name / "checkpoints", pytest.fail) for name in ("wrecked", "good"))
    assert wrecked is not None
    assert good is not None
    assert all(torch.equal(wrecked.tensors[k], v) for k, v in good.tensors.items())


def test_weights_that_are_not_finite_are_neither_kept_nor_shipped(pictures, tmp_path: Path):
    overflow = ("optimizer.rate=1e38", "optimizer.weight_decay=1e3", "optimizer.warmup=0")
    with pytest.raises(BadData, match=r"after step 1 .* no longer finite.*lower"):
        run(pictures, tmp_path, "steps=1", *overflow)
    assert not list((tmp_path / "checkpoints").glob("*"))
    assert not (tmp_path / "final.safetensors").exists()


def test_a_run_s_damaged_recipe_is_named(pictures, tmp_path: Path):
    run(pictures, tmp_path, "steps=1")
    for damaged in ("{}", "[]", "{"):
        (tmp_path / "recipe.json").write_text(damaged)
        with pytest.raises(BadData, match=r"recipe\.json cannot be read .*another --run folder"):
            run(pictures, tmp_path, "steps=2")


def test_a_grid_without_prompts_is_a_row_of_pictures_without_words(pictures, tmp_path: Path):
    run(pictures, tmp_path, "steps=1", "grid_every=1", "grid_prompts=[]")
    with Image.open(tmp_path / "grid-00000001.png") as grid:
        assert grid.size == (4 * 8, 8)


def test_a_sheet_ends_in_white_where_pictures_do(tmp_path: Path):
    write_sheet(-torch.ones(10, 3, 4, 4), 8, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (32, 8)
        assert (sheet.getpixel((7, 7)), sheet.getpixel((8, 7))) == ((0, 0, 0), (255, 255, 255))


def test_samplers_go_by_their_other_names_and_wrong_ones_are_refused_at_once(tmp_path: Path, capsys):
    named = ("model.defaults.spacing=sgm_uniform", "model.defaults.sampler=dpm++_2m", "steps=1", "grid_every=1")
    assert main(command(tmp_path / "named", *named)[3:]) == 0
    assert main(command(tmp_path / "wrong", "model.defaults.sampler=eulr")[3:]) == 4
    assert "did you mean 'euler'" in capsys.readouterr().err
    assert main(command(tmp_path / "wrong", "model.preview.latent_channels=3")[3:]) == 4
    assert "go with latents.autoencoder" in capsys.readouterr().err
    assert not (tmp_path / "wrong/recipe.json").exists()


def test_a_refused_start_binds_nothing(tmp_path: Path, capsys):
    root = write_pictures(tmp_path / "data", 40)
    whole = (root / "003.png").read_bytes()
    spoil(root, 3)
    argv = command(tmp_path / "run", "steps=1", "data.captions=plain", f"data.path={root}")[3:]
    assert main([*argv, "optimizer.name=adam"]) == 4
    assert (tmp_path / "run/bad.jsonl").exists()
    (root / "003.png").write_bytes(whole)
    for words in root.glob("*.txt"):
        words.write_text("zebra quokka zebra quokka")
    assert main(argv) == 0, capsys.readouterr().err
    assert not (tmp_path / "run/bad.jsonl").exists()
    vocabulary = json.loads((tmp_path / "run/tokenizer.json").read_text())["model"]["vocab"]
    assert any("quokka" in token for token in vocabulary)
    assert main(command(tmp_path / "few", "model.text.vocabulary=200")[3:]) == 4
    assert "vocabulary must be at least 258" in capsys.readouterr().err


def test_fewer_steps_than_are_done_are_refused(pictures, tmp_path: Path):
    run(pictures, tmp_path, "steps=3")
    with pytest.raises(BadData, match=r"steps is 2, but .* has done 3"):
        run(pictures, tmp_path, "steps=2")


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
    (tmp_path / "recipe.json").unlink()  # the checkpoint itself knows
    for other, what in (("seed=1", "seed"), ("model.network.widths=[16,16]", "model, the weights' shapes")):
        with pytest.raises(BadData, match=rf"step 6 is another recipe's \(differs in {what}\)"):
            run(pictures, tmp_path, other, "steps=9")
        (tmp_path / "recipe.json").unlink()


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


def killed_in_a_save(folder: Path, step: int, calls: int) -> bool:
    """Go on in a child that dies by kill -9 before a save's call number ``calls``; tell whether it lived so long."""
    from sfumato.training.state import Checkpoint, save_checkpoint

    left = [calls]

    def deadly(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    child = os.fork()
    if child == 0:
        try:
            for name in ("open", "fsync", "replace", "close", "unlink"):  # Path.unlink and open() go by these or C
                setattr(os, name, deadly(name))
            save_checkpoint(folder, Checkpoint(step, {"w": torch.full((1000,), float(step))}, {"version": "x"}), keep=1)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_kill_9_at_every_call_inside_a_save_leaves_the_newest_whole_checkpoint(tmp_path: Path):
    from sfumato.training.state import Checkpoint, save_checkpoint

    found: list[int] = []
    for calls in range(100):
        folder = tmp_path / str(calls)
        save_checkpoint(folder, Checkpoint(1, {"w": torch.ones(1000)}, {"version": "x"}), keep=1)
        killed = killed_in_a_save(folder, 2, calls)
        newest = load_newest(folder, pytest.fail)
        assert newest is not None
        assert torch.equal(newest.tensors["w"], torch.full((1000,), float(newest.step)))
        assert list(folder.glob(".*")) == []
        found.append(newest.step)
        if not killed:
            break
    assert len(found) >= 8
    assert found == sorted(found)  # once it is there it stays
    assert {1, 2} == set(found)


@contextmanager
def files_of_at_most(size: int):
    """Let every write beyond so many bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_command_by_5_and_leaves_the_checkpoint_before(tmp_path: Path, capsys):
    def train_to(folder: Path, *more: str) -> int:
        return main([*command(folder, *more)[3:]])

    assert train_to(tmp_path / "whole", "steps=6") == 0
    assert train_to(tmp_path / "full", "steps=3") == 0
    assert train_to(tmp_path / "free", "steps=6") == 0
    before = states(tmp_path / "full")
    capsys.readouterr()
    with files_of_at_most(20_000):
        assert train_to(tmp_path / "full", "steps=6") == 5
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("sfumato: cannot write")
    assert "step-00000006.safetensors" in last
    assert states(tmp_path / "full") == before
    assert train_to(tmp_path / "full", "steps=6") == 0
    assert (tmp_path / "full/final.safetensors").read_bytes() == (tmp_path / "free/final.safetensors").read_bytes()


def test_bad_pictures_are_listed_and_the_run_completes(tmp_path: Path, capsys):
    root = write_pictures(tmp_path / "data", 200)
    for i in range(0, 200, 20):
        spoil(root, i)
    argv = command(tmp_path / "run", "steps=35", "data.captions=plain", f"data.path={root}")[3:]
    assert main(argv) == 0
    listed = [json.loads(line) for line in (tmp_path / "run/bad.jsonl").read_text().splitlines()]
    assert [e["file"][:3] for e in listed] == [f"{i:03}" for i in range(0, 200, 20)]
    assert all(e["reason"] for e in listed)
    said = " ".join(capsys.readouterr().err.split())
    assert "190 pictures, 10 bad (list in" in said  # ok + bad = total
    assert (tmp_path / "run/final.safetensors").exists()
