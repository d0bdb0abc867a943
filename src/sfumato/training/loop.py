"""The training loop. It knows no diffusion: a task gives the losses of a step, the loop does the rest.

Every step is a pure function of (recipe, step, weights): its random numbers are seeded by its own number,
so a run that was killed and taken up again ends in the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.config import from_dict, to_dict
from sfumato.errors import BadData
from sfumato.training.ema import EMA
from sfumato.training.objective import Losses, loss_by_level
from sfumato.training.progress import Progress
from sfumato.training.recipe import OptimizerConfig, Recipe
from sfumato.training.state import Checkpoint, load_newest, save_checkpoint, write_atomically

BAD_STEPS_ALLOWED = 10  # non-finite steps in a row before a run gives up


class Task(Protocol):
    """What is trained: a module, the losses of a step, and what to make of the averaged weights."""

    @property
    def module(self) -> nn.Module: ...

    def losses(self, step: int, generator: torch.Generator) -> Losses: ...

    def export(self, weights: Mapping[str, Tensor], path: Path) -> None: ...

    def grid(self, weights: Mapping[str, Tensor], path: Path) -> None: ...


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Warm up linearly, stay, then fall linearly to zero over the last share of the run."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    cool = min(1.0, (steps - step) / max(1.0, config.decay * steps))
    return config.rate * min(warm, cool)


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; matrices and convolutions are decayed, gains, biases and embeddings are not."""
    decayed = [p for n, p in module.named_parameters() if p.ndim >= 2 and "tokens" not in n and "positions" not in n]
    chosen = {id(p) for p in decayed}
    others = [p for p in module.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.rate, betas=config.betas, fused=True)


def bf16_pays(n: int = 1024) -> bool:
    """Measure whether this CPU multiplies matrices at least 1.5 times faster in bf16 than in fp32."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(n, n).to(dtype)
        best = math.inf
        for _ in range(4):
            start = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) * 1.5 < seconds(torch.float32)


def train(task: Task, recipe: Recipe, run: Path, progress: Progress) -> Path:
    """Run or resume a training run in a folder, and return the path of its final weights.

    Raises BadData when the folder holds a run of another recipe, or after too many non-finite steps in a row.
    """
    run.mkdir(parents=True, exist_ok=True)
    precision = _settle_recipe(recipe, run)
    final = run / "final.safetensors"
    module = task.module
    optimizer = build_optimizer(module, recipe.optimizer)
    ema = EMA(module, recipe.ema)
    checkpoint = load_newest(run / "checkpoints", progress.warn)
    start = 0
    if checkpoint is not None:
        start = checkpoint.step
        _restore(checkpoint, module, ema, optimizer)
        progress.note(f"resuming at step {start}")
    _trim_log(run / "log.jsonl", start)

    module.train()
    bad = 0
    with progress.running(recipe.steps, start), (run / "log.jsonl").open("a") as log:
        for step in range(start, recipe.steps):
            seed = _step_seed(recipe.seed, step)
            torch.manual_seed(seed)  # dropout
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.optimizer, step, recipe.steps)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                losses = task.losses(step, torch.Generator().manual_seed(seed))
            loss = losses.loss.mean()
            value = float(loss.detach())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = float(nn.utils.clip_grad_norm_(module.parameters(), recipe.optimizer.clip))
            if math.isfinite(norm) and math.isfinite(value):
                optimizer.step()
                ema.update(module, step)
                bad = 0
            else:
                bad += 1
                progress.warn(f"step {step}: loss {value}, gradient norm {norm}: not applied")
                if bad >= BAD_STEPS_ALLOWED:
                    raise BadData(f"{bad} steps in a row gave no finite gradient; the last good checkpoint is kept in {run}")
            done = step + 1
            progress.step(done, value, recipe.batch)
            if done % recipe.log_every == 0:
                record = {"step": done, "loss": value, "norm": norm, "by_level": loss_by_level(losses),
                          "rate": optimizer.param_groups[0]["lr"], "pictures_per_second": progress.rate}  # fmt: skip
                log.write(json.dumps(record) + "\n")
                log.flush()
            if done % recipe.checkpoint_every == 0 or done == recipe.steps:
                save_checkpoint(run / "checkpoints", _snapshot(done, module, ema, optimizer), recipe.keep)
            if recipe.grid_every and (done % recipe.grid_every == 0 or done == recipe.steps):
                task.grid(ema.state(), run / f"grid-{done:08d}.png")
    task.export(ema.state(), final)
    return final


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % (1 << 63)


def _settle_recipe(recipe: Recipe, run: Path) -> str:
    """Store the resolved recipe at a run's start, refuse another one later, and return the precision in force."""
    path = run / "recipe.json"
    plain = json.loads(json.dumps(to_dict(recipe)))
    if path.exists():
        stored = json.loads(path.read_text())
        precision = stored.pop("resolved_precision")
        stored = json.loads(json.dumps(to_dict(from_dict(Recipe, stored, str(path)))))  # settings newer than the run
        # How long a run goes on, and how often it is watched or saved, may change under way.
        free = ("steps", "checkpoint_every", "keep", "log_every", "grid_every", "grid_prompts", "card", "threads")
        differing = [k for k in plain if k not in free and plain[k] != stored.get(k)]
        if differing:
            raise BadData(f"{run} holds a run of another recipe (differs in {', '.join(differing)}): use another --run folder")
        return precision
    precision = recipe.precision
    if precision == "auto":
        precision = "bf16" if bf16_pays() else "fp32"
    elif precision not in ("bf16", "fp32"):
        raise BadData(f"recipe: precision is auto, bf16 or fp32, not {precision!r}")
    write_atomically(path, json.dumps({**plain, "resolved_precision": precision}, indent=1).encode())
    return precision


def _snapshot(step: int, module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> Checkpoint:
    tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    return Checkpoint(step, tensors, {})


def _restore(checkpoint: Checkpoint, module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}

    module.load_state_dict(part("model."))
    for k, v in part("ema.").items():
        ema.average[k].copy_(v)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for name, v in part("optimizer.").items():
        i, key = name.split(".", 1)
        # The fused AdamW walks memory in order: moments must be laid out as their parameter is.
        laid = v if v.ndim == 0 else torch.empty_like(parameters[int(i)]).copy_(v)
        states.setdefault(int(i), {})[key] = laid
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _trim_log(path: Path, start: int) -> None:
    """Drop lines that a killed run wrote after its last checkpoint, so that no step is logged twice."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _logged_step(line) <= start]
        write_atomically(path, "".join(line + "\n" for line in lines).encode())


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut off by a kill
        return math.inf
