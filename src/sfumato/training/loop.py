"""The training loop. It knows no diffusion: a task gives the losses of some places, the loop does the rest.

    place p = step · batch + i       the endless order of pictures, cut into steps, ranks and micro-batches

Everything random at a place is a function of (seed, place), and every step of (recipe, step, weights). So a run that
was killed and taken up again ends in the same bytes as one that was not, and ranks or accumulation change
nothing but rounding.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from sfumato.config import from_dict, to_dict
from sfumato.errors import BadData
from sfumato.files import write_atomically
from sfumato.training.ema import EMA
from sfumato.training.objective import Losses, loss_by_level
from sfumato.training.optimizers import build_optimizers, empty_state, restore, tensors_of
from sfumato.training.progress import Progress
from sfumato.training.recipe import OptimizerConfig, Recipe
from sfumato.training.runlog import RunLog, spoken
from sfumato.training.state import Checkpoint, load_newest, save_checkpoint, save_shards
from sfumato.training.world import World, full

BAD_STEPS_ALLOWED = 10  # non-finite steps in a row before a run gives up


class Task(Protocol):
    """What is trained: a module, how to fetch a micro-batch, its losses, and what to make of averaged weights."""

    @property
    def module(self) -> nn.Module:
        """The module whose parameters are learned."""
        ...

    def fetch(self, places: range) -> Any:
        """Prepare the micro-batch at some places of the endless order; called from any thread."""
        ...

    def fingerprint(self) -> str:
        """Tell whether the data are those that the run began with."""
        ...

    def losses(self, module: Callable[..., Tensor], batch: Any) -> Losses:
        """Return each picture's loss; ``module`` is the task's own, possibly wrapped or compiled."""
        ...

    def export(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write a model file from averaged weights."""
        ...

    def grid(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Draw samples from averaged weights."""
        ...


# From a function that writes the averaged weights, a folder for it, and whether to stop, to figures; None if stopped.
Watch = Callable[[Callable[[Path], None], Path, Callable[[], bool]], dict[str, Any] | None]


class Stopped(SystemExit):
    """A run that a signal ended after saving its state; its code is the shell's, 128 + the signal's number."""


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Share of the full rate: warm up linearly, stay, then fall linearly to zero over the last share of the run."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    cool = min(1.0, (steps - step) / max(1.0, config.decay * steps))
    return min(warm, cool)


def bf16_pays(device: torch.device, n: int = 1024) -> bool:
    """Measure whether this machine multiplies matrices at least 1.5 times faster in bf16 than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(n, n).to(dtype)
        best = math.inf
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(a, a)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) * 1.5 < seconds(torch.float32)


def train(
    task: Task,
    recipe: Recipe,
    run: Path,
    progress: Progress,
    world: World = World(),  # noqa: B008
    watch: Watch | None = None,
) -> Path:
    """Train or resume a training run in a folder, and return the path of its final weights.

    ``watch`` measures the averaged weights every ``recipe.evaluate_every`` steps; the main rank alone needs one.
    Raises BadData when the folder holds a run of another recipe, or after too many non-finite steps in a row;
    Stopped when SIGTERM or SIGINT ended it, its state saved.
    """
    parts = world.size * recipe.accumulate
    if recipe.batch % parts:
        raise BadData(f"recipe: batch {recipe.batch} cannot be cut into {world.size} ranks × {recipe.accumulate} parts")
    precision = _settle_recipe(task, recipe, run, world)
    module = task.module.to(world.device)
    wrapped = world.wrap(module, recipe.parallel)
    optimizers = build_optimizers(module, recipe.optimizer, precision == "bf16")
    ema = EMA(module, recipe.ema)
    found = load_newest(run / "checkpoints", progress.warn, world)
    start = 0 if found is None else found.step
    if found is not None:
        _restore(found, recipe, module, ema, optimizers, world)
        progress.note(f"resuming at step {start}")
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    network = torch.compile(wrapped) if recipe.compile else wrapped
    autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16")

    def save(done: int) -> None:
        tensors, folder = _state(module, ema, optimizers), run / "checkpoints"
        if recipe.sharded:
            save_shards(folder, _snapshot(done, recipe, tensors), recipe.keep, world)
        else:
            snapshot = _snapshot(done, recipe, _whole(tensors, world))
            world.together(lambda: save_checkpoint(folder, snapshot, recipe.keep) if world.main else None)

    def due(every: int, done: int) -> bool:
        return every > 0 and done > 0 and (done % every == 0 or done == recipe.steps)

    def look(done: int) -> bool:
        """Draw and measure what is due after a step and not there yet; tell whether a signal came meanwhile."""
        grid = run / f"grid-{done:08d}.png"
        wants_grid = due(recipe.grid_every, done) and not grid.exists()
        wants_figures = due(recipe.evaluate_every, done) and watch is not None and done not in log.evaluated
        if not world.any(world.main and (wants_grid or wants_figures)):
            return False
        weights = _whole(ema.averages[0], world)

        def draw_and_measure() -> None:
            if world.main and wants_grid:
                task.grid(weights, grid)
            if world.main and wants_figures and watch is not None:
                found = watch(lambda path: task.export(weights, path), run, lambda: bool(stop))
                if found is not None:
                    log.write_evaluation(done, found)
                    progress.note(f"step {done}: {spoken(found)}")

        with progress.aside():
            world.together(draw_and_measure)
        return world.any(bool(stop))

    def end(done: int) -> NoReturn:
        progress.note(f"stopped after step {done}; the same command goes on from there")
        raise Stopped(128 + (stop[0] if stop else signal.SIGTERM))

    module.train()
    bad = 0
    batches = _batches(task, recipe, world, start)
    log = world.together(lambda: RunLog(run, start, recipe.tensorboard, quiet=not world.main))
    with progress.running(recipe.steps, start), _stop_signal() as stop, log:
        if look(start):
            end(start)
        for step in range(start, recipe.steps):
            share = learning_rate(recipe.optimizer, step, recipe.steps)
            for optimizer, own in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, own, strict=True):
                    group["lr"] = rate * share
                optimizer.zero_grad(set_to_none=True)
            value, losses = 0.0, None
            for part in range(recipe.accumulate):
                batch = world.together(lambda: next(batches))
                torch.manual_seed(_noise_seed(recipe, _places(recipe, world, step, part).start))  # dropout
                last = part + 1 == recipe.accumulate
                with nullcontext() if last else world.no_sync(wrapped):
                    with autocast:
                        losses = task.losses(network, batch)
                    loss = losses.loss.mean() / recipe.accumulate
                    loss.backward()
                value += float(loss.detach())
            value = world.mean(value)
            norm = float(full(nn.utils.clip_grad_norm_(module.parameters(), recipe.optimizer.clip)))
            if math.isfinite(norm) and math.isfinite(value):
                for optimizer in optimizers:
                    optimizer.step()
                ema.update(module, step)
                bad = 0
            else:
                bad += 1
                progress.warn(f"step {step}: loss {value}, gradient norm {norm}: not applied")
                if bad >= BAD_STEPS_ALLOWED:
                    raise BadData(
                        f"{bad} steps in a row gave no finite gradient; the last good checkpoint is kept in {run}"
                    )
            done = step + 1
            assert losses is not None
            levels = loss_by_level(losses)
            progress.step(done, value, levels, recipe.batch)
            if done % recipe.log_every == 0:
                log.write(done, {"loss": value, "norm": norm, "by_level": levels, "rate_share": share,
                                 "pictures_per_second": progress.rate, "memory_mb": progress.memory})  # fmt: skip
            stopping = world.any(bool(stop))
            saving = done % recipe.checkpoint_every == 0 or done == recipe.steps or stopping
            if saving:
                save(done)
            stopping = stopping or look(done)
            if stopping and done < recipe.steps:
                if not saving:
                    save(done)
                end(done)
    for i, decay in enumerate(recipe.ema):
        weights = _whole(ema.averages[i], world)
        if world.main:
            task.export(weights, run / ("final.safetensors" if i == 0 else f"final-ema-{decay:g}.safetensors"))
    world.barrier()
    return run / "final.safetensors"


def _whole(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Gather on the main rank tensors that ranks may hold in shards, one at a time; all ranks must ask together."""
    whole: dict[str, Tensor] = {}
    for k, v in tensors.items():
        gathered = full(v)
        if world.main:
            whole[k] = gathered.cpu()
    return whole


def _places(recipe: Recipe, world: World, step: int, part: int) -> range:
    """Return the places of this rank's micro-batch."""
    size = recipe.batch // (world.size * recipe.accumulate)
    first = step * recipe.batch + (world.rank * recipe.accumulate + part) * size
    return range(first, first + size)


def _noise_seed(recipe: Recipe, place: int) -> int:
    """Seed what a network draws itself, such as dropout, for the micro-batch that begins at a place."""
    return (recipe.seed * 1_000_003 + place) % (1 << 63)


def _batches(task: Task, recipe: Recipe, world: World, start: int) -> Iterator[Any]:
    """Yield this rank's micro-batches from a step on; with workers, prepared ahead in the same order."""
    places = (
        _places(recipe, world, step, part) for step in range(start, recipe.steps) for part in range(recipe.accumulate)
    )
    if recipe.workers == 0:
        yield from map(task.fetch, places)
        return
    ahead: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(recipe.workers) as pool:
        try:
            for where in places:
                ahead.append(pool.submit(task.fetch, where))
                if len(ahead) > 2 * recipe.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


@contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """Collect the first SIGTERM or SIGINT instead of dying of it; a second SIGINT interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# What may change under way: how long a run goes on, where, and how often it is watched or saved.
FREE = {"steps", "checkpoint_every", "keep", "log_every", "grid_every", "grid_prompts", "evaluate_every", "evaluate_n",
        "evaluate_metrics", "evaluate_steps", "evaluate_guidance", "card", "threads", "workers",
        "accumulate", "compile", "device", "parallel", "sharded", "tensorboard"}  # fmt: skip


def _settle_recipe(task: Task, recipe: Recipe, run: Path, world: World) -> str:
    """Store the resolved recipe at a run's start, refuse another one later, and return the precision in force."""
    path = run / "recipe.json"
    data = world.together(task.fingerprint)
    for rank, other in enumerate(world.gather(data)):
        if other != data:
            raise BadData(f"rank {max(rank, world.rank)} has other data than rank {min(rank, world.rank)}")

    def settle() -> None:
        run.mkdir(parents=True, exist_ok=True)
        if path.exists():
            stored = _read_json(path)
            precision, first = stored.pop("resolved_precision"), stored.pop("data_fingerprint", data)
            differing = _differing(stored, recipe) + (["the data's content"] if first != data else [])
            if differing:
                raise BadData(
                    f"{run} holds a run of another recipe (differs in {', '.join(differing)}): use another --run folder"
                )
        else:
            precision = recipe.precision
            if precision == "auto":
                precision = "bf16" if bf16_pays(world.device) else "fp32"
        plain = {**to_dict(recipe), "resolved_precision": precision, "data_fingerprint": data}
        write_atomically(path, json.dumps(plain, indent=1).encode())

    world.together(lambda: settle() if world.main else None)
    return _read_json(path)["resolved_precision"]


def _differing(stored: dict[str, Any], recipe: Recipe) -> list[str]:
    """Name the binding settings in which a recipe differs from a stored one."""
    # Read through today's defaults: a setting that is newer than the run is no difference.
    before, now = _binding(from_dict(Recipe, stored, "the run's recipe")), _binding(recipe)
    return [k for k in now if now[k] != before[k]]


def _binding(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that a run cannot change; where the data lie is told by their content."""
    plain = {k: v for k, v in to_dict(recipe).items() if k not in FREE}
    return json.loads(json.dumps({**plain, "data": {**plain["data"], "path": ""}}))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise BadData(f"{path} cannot be read ({e}): use another --run folder") from None


def _snapshot(step: int, recipe: Recipe, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """Join a run's tensors with all else that it is in.

    Random numbers are counter-based: all that any rank draws next follows from the seed and the next place.
    """
    plain = {
        "version": version("sfumato"),
        "recipe": _binding(recipe),
        "cursor": {"place": step * recipe.batch},
        "rng": {"seed": recipe.seed, "counter": step * recipe.batch},
    }
    return Checkpoint(step, tensors, plain)


def _state(module: nn.Module, ema: EMA, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.tensors().items()}
    return tensors | {f"optimizer.{k}": v for k, v in tensors_of(optimizers).items()}


@torch.no_grad()
def _restore(
    checkpoint: Checkpoint,
    recipe: Recipe,
    module: nn.Module,
    ema: EMA,
    optimizers: list[torch.optim.Optimizer],
    world: World,
) -> None:
    shapes = checkpoint.shapes()
    differing = _differing(checkpoint.plain["recipe"], recipe) if "recipe" in checkpoint.plain else []
    state = _state(module, ema, [])
    if {k: v for k, v in shapes.items() if not k.startswith("optimizer.")} != _shapes(state, checkpoint):
        differing.append("the weights' shapes")
    if differing:
        raise BadData(
            f"the checkpoint of step {checkpoint.step} is another recipe's (differs in {', '.join(differing)}): "
            "use another --run folder"
        )
    names = [k.removeprefix("optimizer.") for k in shapes if k.startswith("optimizer.")]
    moments = empty_state(optimizers, names)
    checkpoint.fill(state | {f"optimizer.{k}": v for k, v in moments.items()}, world)
    restore(optimizers, moments)


def _shapes(tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """Return the shapes that a checkpoint of its kind would have of these tensors."""
    least = torch.Size([1]) if checkpoint.shards else torch.Size()
    return {k: v.shape or least for k, v in tensors.items()}
