"""Evaluation during training: what is logged, and that the run itself does not notice."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import command, states

from sfumato.checkpoints.packaged import LITE0
from sfumato.cli import main
from sfumato.data.config import DataConfig
from sfumato.evaluation.truth import load_truth

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))
from shapes import drawings, missing, needs_weights


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes in a parquet file with training, validation and test rows."""
    import io

    from PIL import Image

    images, rows = drawings()
    encoded: list[bytes] = []
    for i, image in enumerate(images):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
        if rows[i]["split"] == "test" and i % 2:
            rows[i]["split"] = "val"
    path = tmp_path_factory.mktemp("data") / "shapes.parquet"
    columns = {k: [row[k] for row in rows] for k in rows[0]}
    pq.write_table(pa.table({"image": encoded, **columns}), path)
    return path


def test_what_a_run_is_steered_by_leaves_the_test_split_alone(data: Path):
    choosing = load_truth(DataConfig(path=str(data)), 16, 12, choosing=True)
    assert set(choosing.drawn) == {"seen", "val"}
    assert not any(row["split"] == "test" for row in choosing.rows)
    assert set(load_truth(DataConfig(path=str(data)), 16, 12).drawn) == {"seen", "val", "test"}


def test_a_lean_truth_draws_the_same_and_keeps_a_few_others(data: Path):
    truth = load_truth(DataConfig(path=str(data)), 16, 12)
    lean = truth.lean(30)
    assert len(lean.rows) == 12 * 3 + 30 == len(lean.images)
    for split, rows in truth.drawn.items():
        assert truth.captions(rows) == lean.captions(lean.drawn[split])
        assert (truth.images[list(rows)] == lean.images[list(lean.drawn[split])]).all()
    assert {lean.rows[i]["split"] for i in lean.others} == {"train"}


def argv(folder: Path, data: Path, *overrides: str) -> list[str]:
    return command(folder, f"data.path={data}", "data.where={split: train}", "data.captions=plain", "model.size=8",
                   "model.defaults={width: 8, height: 8, steps: 2}", *overrides)[3:]  # fmt: skip


@needs_weights
def test_figures_are_logged_once_with_all_that_decided_them_and_change_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    watched = ("evaluate_every=4", "evaluate_n=12", "evaluate_steps=1", "steps=6")
    assert main(argv(tmp_path / "blind", data, "steps=6")) == 0
    assert main(argv(tmp_path / "watched", data, *watched)) == 0
    assert states(tmp_path / "watched") == states(tmp_path / "blind")
    for file in ("final.safetensors",):
        assert (tmp_path / "watched" / file).read_bytes() == (tmp_path / "blind" / file).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "watched/log.jsonl").read_text().splitlines()]
    found = [line for line in lines if "evaluation" in line]
    assert [line["step"] for line in found] == [4, 6]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    for line in found:
        evaluation = line["evaluation"]
        assert {(f["metric"], f["split"], f["n"]) for f in evaluation["figures"]} == {
            ("KID", "seen", 12),
            ("KID", "val", 12),
        }
        for f in evaluation["figures"]:
            assert f["interval"][0] < f["value"] < f["interval"][1]
            assert f["extractor"].startswith("lite0")
            assert len(f["reference"]) == 16
        assert (evaluation["steps"], evaluation["seed"], evaluation["sampler"]) == (1, 0, "dpmpp-2m")
    # Started again, nothing is measured twice; going on, only what is new.
    assert main(argv(tmp_path / "watched", data, *watched)) == 0
    assert main(argv(tmp_path / "watched", data, *watched, "steps=8")) == 0
    lines = [json.loads(line) for line in (tmp_path / "watched/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" in line] == [4, 6, 8]


@needs_weights
def test_a_signal_while_measuring_saves_at_once_and_the_figures_are_made_up(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from sfumato.training import watch

    real = watch.evaluate

    def evaluate(*args: object, **kwargs: object) -> object:
        if not (tmp_path / "asked").exists():
            (tmp_path / "asked").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    watched = ("evaluate_every=4", "evaluate_n=12", "evaluate_steps=1", "steps=6")
    assert main(argv(tmp_path / "whole", data, *watched)) == 0
    monkeypatch.setattr(watch, "evaluate", evaluate)
    assert main(argv(tmp_path / "stopped", data, *watched)) == 143
    assert (tmp_path / "stopped/checkpoints/step-00000004.json").exists()
    assert main(argv(tmp_path / "stopped", data, *watched)) == 0
    whole, stopped = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    )
    assert [line for line in stopped if "evaluation" in line] == [line for line in whole if "evaluation" in line]
    finals = [(tmp_path / name / "final.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert finals[0] == finals[1]


def test_what_cannot_be_measured_is_said_before_the_first_step(data: Path, tmp_path: Path, capsys):
    for overrides, code, words in (
        (("evaluate_every=4", "evaluate_metrics=[kidd]"), 2, "did you mean 'kid'"),
        (("evaluate_every=4", "evaluate_n=3"), 2, "n must be at least 10"),
        (("evaluate_every=4", "evaluate_guidance=-1"), 2, "guidance must be a number from 0"),
        (("evaluate_every=4", "evaluate_steps=5000"), 2, "steps must be a whole number from 1 to 1000"),
        (("evaluate_every=4", "model.defaults.width=24"), 4, "only squares"),
        (("evaluate_every=4", "data.where={split: [train, val]}"), 4, "learns from split 'val'"),
        (("evaluate_every=4", "data.where={style: plain}"), 4, "learns from split 'val'"),
        (("evaluate_every=4", "evaluate_metrics=[judge]", "data.where={style: plain, split: train}"), 4, "judge"),
    ):
        if missing(LITE0) and code == 4:
            continue
        assert main(argv(tmp_path / words[:4], data, *overrides)) == code
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("sfumato: evaluate_every: ")
        assert words in last
        assert not (tmp_path / words[:4] / "log.jsonl").exists()
