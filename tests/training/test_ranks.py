"""Two ranks: the same order, the same losses, the same end when something goes wrong on one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ENV, ROOT, Taught, Watched, command, few, figures, recipe

from faults import write_pictures
from sfumato.cli import main
from sfumato.training.loop import train
from sfumato.training.progress import Progress
from sfumato.training.state import load_newest
from sfumato.training.world import World


def learn(folder: Path, *overrides: str) -> list[int]:
    """Train in this one process, and return the places that its steps learned from."""
    r = recipe(*overrides)
    task = Watched(r, few(), folder)
    train(task, r, folder, Progress(quiet=True))
    return task.seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scenario of ``ranks.py``, run by two ranks."""
    root = tmp_path_factory.mktemp("ranks")
    learn(root / "from-one", "steps=5")
    learn(root / "sharded-from-one", "steps=5", "sharded=true")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests", ROOT / "tests/training")))
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests/training/ranks.py"), str(root)],
        env={**ENV, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    said, launcher, report = done.stderr.partition("torch.distributed.elastic")
    assert done.returncode == 0, f"{said[-3000:]}{launcher}{report[:1000]}"
    return root


def ranks(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((root / name / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of one rank."""
    folder = tmp_path_factory.mktemp("one")
    assert learn(folder) == list(range(72))
    return folder


@pytest.mark.parametrize("name", ["order", "order-workers", "fsdp", "sharded"])
def test_two_ranks_share_the_order_of_one_and_agree_with_it(root: Path, one: Path, name: str):
    first, second = (r["seen"] for r in ranks(root, name))
    assert sorted(first + second) == list(range(72))  # none missing, none twice
    assert first == [p for p in range(72) if p % 6 < 3]
    assert figures(root / name)[0] == pytest.approx(figures(one)[0], abs=1e-6)
    assert figures(root / name) == pytest.approx(figures(one), rel=0.02)
    norms = [figures(folder, "norm")[0] for folder in (root / name, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("name", ["distill", "distill-fsdp"])
def test_two_ranks_teach_a_student_and_its_adversary_as_one_does(root: Path, tmp_path: Path, name: str):
    """The teacher, its text tower and the heads are called beside the student, wrapped or not."""
    r = recipe("steps=4")
    train(Taught(r, few(), tmp_path), r, tmp_path, Progress(quiet=True))
    assert figures(root / name)[0] == pytest.approx(figures(tmp_path)[0], abs=1e-6)
    assert figures(root / name) == pytest.approx(figures(tmp_path), rel=0.02)
    norms = [figures(folder, "norm")[0] for folder in (root / name, tmp_path)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("name", ["from-two", "fsdp-from-two", "sharded-from-two"])
def test_one_rank_takes_up_what_two_left_in_the_middle_of_an_epoch(root: Path, one: Path, name: str):
    """Five steps of six are one and a half epochs of twenty."""
    before = [place for r in ranks(root, name) for place in r["seen"]]
    after = learn(root / name, "workers=2", f"sharded={str('sharded' in name).lower()}")
    assert sorted(before) == list(range(30))
    assert after == list(range(30, 72))
    assert figures(root / name, "step") == list(range(1, 13))
    assert figures(root / name) == pytest.approx(figures(one), rel=0.02)


@pytest.mark.parametrize("name", ["from-one", "sharded-from-one"])
def test_two_ranks_take_up_what_one_left_in_the_middle_of_an_epoch(root: Path, one: Path, name: str):
    after = [place for r in ranks(root, name) for place in r["seen"]]
    assert sorted(after) == list(range(30, 72))
    assert figures(root / name, "step") == list(range(1, 13))
    assert figures(root / name) == pytest.approx(figures(one), rel=0.02)


def test_a_sharded_checkpoint_holds_the_same_state_in_parts(root: Path, tmp_path: Path):
    """Taken up by one rank that writes whole files, it is the state of the run that never had shards, to the bit."""
    whole = load_newest(root / "fsdp/checkpoints", pytest.fail)
    parts = load_newest(root / "sharded/checkpoints", pytest.fail)
    assert whole is not None
    assert parts is not None
    assert parts.plain == whole.plain
    assert parts.shards is not None
    assert len(list(parts.shards.iterdir())) == 2
    sizes = [file.stat().st_size for file in parts.shards.iterdir()]
    assert max(sizes) < 0.7 * sum(sizes)
    found = {k: torch.full_like(v, -1.0) for k, v in whole.tensors.items()}
    parts.fill(found, World())
    for k, v in whole.tensors.items():
        assert torch.equal(found[k], v), k


def test_a_changed_byte_in_a_shard_falls_back_on_both(root: Path):
    seen = [place for r in ranks(root, "sharded-damaged") for place in r["seen"]]
    assert sorted(seen) == list(range(18, 36))


def test_a_bad_number_on_one_rank_holds_the_step_back_on_both(root: Path):
    losses = figures(root / "nan")
    assert losses[2] is None
    assert None not in losses[:2] + losses[3:]
    assert all("error" not in r for r in ranks(root, "nan"))


@pytest.mark.parametrize(
    ("name", "culprit", "code", "words"),
    [
        ("lazy", 1, 4, "was whole when the run began"),
        ("full-disk", 0, 5, "cannot write"),
        ("sharded-full-disk", 0, 5, "cannot write"),
        ("other-data", 1, 4, "rank 1 has other data than rank 0"),
        ("memory", 1, None, "MemoryError"),
    ],
)
def test_a_fault_on_one_rank_ends_both_in_one_line(root: Path, name: str, culprit: int, code: int | None, words: str):
    found = ranks(root, name)
    assert all(words in r["error"] for r in found)
    assert all("\n" not in r["error"] for r in found)
    assert found[culprit]["code"] == code
    assert found[1 - culprit]["code"] == (code or 5)
    if "full-disk" in name:
        newest = load_newest(root / name / "checkpoints", pytest.fail)
        assert newest is not None
        assert newest.step == 3
        assert not list((root / name / "checkpoints").glob("*6*"))
    if name not in ("other-data", "sharded-full-disk"):  # there every rank finds it itself
        assert f"rank {culprit} failed" in found[1 - culprit]["error"]
    if name == "lazy":  # steps before the fault are learned on both
        assert figures(root / name, "step") == [1, 2]
        assert load_newest(root / name / "checkpoints", pytest.fail) is None


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    args = command(folder, "log_every=1", *overrides, ranks=2)
    return subprocess.Popen(args, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_logged(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    while steps_logged(folder) < count and process.poll() is None:
        time.sleep(0.02)


def own_words(said: str) -> list[str]:
    """What the ranks themselves said, without the launcher's report and the run's progress."""
    return [line for line in said.splitlines() if line.startswith("sfumato:")]


def test_sigterm_to_the_launcher_saves_and_the_same_command_goes_on(tmp_path: Path):
    process = start(tmp_path, "steps=4000", "checkpoint_every=4000")
    wait_for_steps(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.json")
    step = json.loads(checkpoint.read_text())["step"]
    assert f"stopped after step {step}; the same command goes on" in " ".join(said.split())
    assert figures(tmp_path, "step") == list(range(1, step + 1))
    assert main(command(tmp_path, f"steps={step + 2}")[3:]) == 0
    assert figures(tmp_path, "step") == list(range(1, step + 3))


@pytest.mark.parametrize("fault", ["picture", "kill"])
def test_a_rank_that_fails_or_dies_ends_the_real_command_in_one_line_each(tmp_path: Path, fault: str):
    root, run = write_pictures(tmp_path / "data", 40), tmp_path / "run"
    process = start(run, "steps=4000", "checkpoint_every=4000", "data.captions=plain", f"data.path={root}",
                    "data.lazy=true")  # fmt: skip
    wait_for_steps(run, 3, process)
    if fault == "picture":
        (root / "007.png").write_bytes(b"<html>")
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    lines = own_words(said)
    if fault == "picture":
        assert len(lines) == 2
        assert all("007.png was whole when the run began, and is not any more" in line for line in lines)
    else:
        assert len(lines) == 1
        # The launcher ends the survivors at once: now and then before they have noticed themselves.
        assert "another rank is gone" in lines[0] or lines[0] == "sfumato: terminated"
    assert said.count("Traceback") == 1  # the launcher's own
