"""The training loop. It knows no diffusion: a task gives the losses of some places, the loop does the rest.

    place p = step · batch + i       the endless order of pictures, cut into steps, ranks and micro-batches

Everything random at a place is a function of (seed, place), and every step of (recipe, step, weights). So a run that
was killed and taken up again ends in the same bytes as one that was not. Ranks and accumulation change nothing but
rounding, where a loss is a mean over pictures; what a micro-batch decides as a whole (CLIP's pairs, dropout, the
spread of an autoencoder's latents) they cut anew.
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
from dataclasses import dataclass
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
from sfumato.training.world import World, full, local

BAD_STEPS_ALLOWED = 10  # non-finite steps in a row before a run gives up


class Task(Protocol):
    """What is trained: a module, how to fetch a micro-batch, its losses, and what to make of averaged weights."""

    @property
    def recipe(self) -> Recipe:
        """The recipe with all that the task found out, such as the model that it takes from a file."""
        ...

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
    build_optimizers(task.module, recipe.optimizer)  # what it refuses, it refuses before the run is settled
    learner = _Learner(task, recipe, _settle_recipe(task, recipe, run, world), world)
    start = learner.resume(run, progress)
    if start > recipe.steps:
        raise BadData(
            f"recipe: steps is {recipe.steps}, but the run in {run} has done {start}: ask for more, "
            "or use another --run folder"
        )
    batches = _batches(task, recipe, world, start)
    log = world.together(lambda: RunLog(run, start, recipe.tensorboard, quiet=not world.main))
    with progress.running(recipe.steps, start), _stop_signal() as stop, log:
        look = _Look(learner, run, progress, log, watch, stop)
        if look(start):
            _end(start, progress, stop)
        bad, owed = 0, False
        for step in range(start, recipe.steps):
            share = learning_rate(recipe.optimizer, step, recipe.steps)
            value, norm, losses = learner.gradients(step, batches)
            if math.isfinite(norm) and math.isfinite(value):
                learner.apply(step, share)
                bad = 0
            else:
                bad += 1
                progress.warn(f"step {step}: loss {value}, gradient norm {norm}: not applied")
                if bad >= BAD_STEPS_ALLOWED:
                    raise BadData(
                        f"{bad} steps in a row gave no finite gradient; the last good checkpoint is kept in {run}"
                    )
            done = step + 1
            levels = loss_by_level(losses)
            progress.step(done, value, levels, recipe.batch)
            if done % recipe.log_every == 0:
                log.write(done, {"loss": value, "norm": norm, "by_level": levels, "rate_share": share,
                                 "pictures_per_second": progress.rate, "memory_mb": progress.memory})  # fmt: skip
            stopping = world.any(bool(stop))
            owed = owed or done % recipe.checkpoint_every == 0
            # While steps are bad the weights may be what is wrong: no checkpoint of them takes a good one's place.
            saving = (owed and not bad) or done == recipe.steps or stopping
            if saving:
                learner.save(run, done)
                owed = False
            stopping = stopping or look(done)
            if stopping and done < recipe.steps:
                if not saving:
                    learner.save(run, done)
                _end(done, progress, stop)
    for i, decay in enumerate(recipe.ema):
        weights = _whole(learner.ema.averages[i], world)
        if world.main:
            task.export(weights, run / ("final.safetensors" if i == 0 else f"final-ema-{decay:g}.safetensors"))
    world.barrier()
    return run / "final.safetensors"


class _Learner:
    """What is learned and what moves it: a module, its gradients, its optimizers and its averages."""

    def __init__(self, task: Task, recipe: Recipe, precision: str, world: World):
        self.task, self.recipe, self.world = task, recipe, world
        self.module = task.module.to(world.device)
        self.wrapped = world.wrap(self.module, recipe.parallel)
        self.network = torch.compile(self.wrapped) if recipe.compile else self.wrapped
        self.optimizers = build_optimizers(self.module, recipe.optimizer, precision == "bf16")
        self.names: dict[Tensor, str] = {p: name for name, p in self.module.named_parameters()}
        self.rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.ema = EMA(self.module, recipe.ema)
        self.autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.module.train()
        for part in self.module.modules():
            own = list(part.parameters())
            if own and not any(p.requires_grad for p in own):
                part.eval()  # frozen: what it says does not depend on dropout

    def gradients(self, step: int, batches: Iterator[Any]) -> tuple[float, float, Losses]:
        """Gather a step's gradients, clipped; return its loss, their norm before, and the last part's losses."""
        recipe, world = self.recipe, self.world
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        value, losses = 0.0, None
        for part in range(recipe.accumulate):
            batch = world.together(lambda: next(batches))
            torch.manual_seed(_noise_seed(recipe, _places(recipe, world, step, part).start))  # dropout
            last = part + 1 == recipe.accumulate
            with nullcontext() if last else world.no_sync(self.wrapped):
                with self.autocast:
                    losses = self.task.losses(self.network, batch)
                loss = losses.loss.mean() / recipe.accumulate
                loss.backward()
            value += float(loss.detach())
        assert losses is not None
        norm = float(full(nn.utils.clip_grad_norm_(self.module.parameters(), recipe.optimizer.clip)))
        return world.mean(value), norm, losses

    def apply(self, step: int, share: float) -> None:
        """Move the weights along the gradients at a share of the full rates, and the averages after them."""
        for optimizer, own in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate * share
            optimizer.step()
        self.ema.update(self.module, step)

    def save(self, run: Path, done: int) -> None:
        """Write a checkpoint of the state after a step; all ranks must save together.

        Raises BadData for weights that are not finite: the run is lost, what was saved before is not.
        """
        recipe, world, folder = self.recipe, self.world, run / "checkpoints"
        if world.any(not all(bool(local(v).isfinite().all()) for v in self._weights().values())):
            raise BadData(
                f"after step {done} the weights are no longer finite: start another run with a lower optimizer.rate; "
                f"the last good checkpoint is kept in {run}"
            )
        if recipe.sharded:
            save_shards(folder, _snapshot(done, recipe, self._state()), recipe.keep, world)
        else:
            snapshot = _snapshot(done, recipe, _whole(self._state(), world))
            world.together(lambda: save_checkpoint(folder, snapshot, recipe.keep) if world.main else None)

    def resume(self, run: Path, progress: Progress) -> int:
        """Take up the newest whole checkpoint, if there is one, and return the step to go on from."""
        checkpoint = load_newest(run / "checkpoints", progress.warn, self.world)
        if checkpoint is None:
            return 0
        self._restore(checkpoint)
        progress.note(f"resuming at step {checkpoint.step}")
        return checkpoint.step

    def _state(self) -> dict[str, Tensor]:
        moments = {f"optimizer.{k}": v for k, v in tensors_of(self.optimizers, self.names).items()}
        return {**self._weights(), **moments}

    def _weights(self) -> dict[str, Tensor]:
        weights = {f"model.{k}": v for k, v in self.module.state_dict().items()}
        return weights | {f"ema.{k}": v for k, v in self.ema.tensors().items()}

    @torch.no_grad()
    def _restore(self, checkpoint: Checkpoint) -> None:
        shapes, weights = checkpoint.shapes(), self._weights()
        differing = _differing(checkpoint.plain["recipe"], self.recipe) if "recipe" in checkpoint.plain else []
        if {k: v for k, v in shapes.items() if not k.startswith("optimizer.")} != _shapes(weights, checkpoint):
            differing.append("the weights' shapes")  # and so the optimizer's
        moments = {f"optimizer.{k}": v for k, v in empty_state(self.optimizers, self.names).items()}
        stored = {k: v for k, v in shapes.items() if k.startswith("optimizer.")}
        if not differing and not stored.items() <= _shapes(moments, checkpoint).items():
            differing.append("the optimizer's state")
        if differing:
            raise BadData(
                f"the checkpoint of step {checkpoint.step} is another recipe's (differs in {', '.join(differing)}): "
                "use another --run folder"
            )
        moments = {k: v for k, v in moments.items() if k in stored}
        checkpoint.fill(weights | moments, self.world)
        restore(self.optimizers, {k.removeprefix("optimizer."): v for k, v in moments.items()}, self.names)


@dataclass
class _Look:
    """Draws and measures the averaged weights when it is due."""

    learner: _Learner
    run: Path
    progress: Progress
    log: RunLog
    watch: Watch | None
    stop: list[int]  # signals that came

    def __call__(self, done: int) -> bool:
        """Draw and measure what is due after a step and not there yet; tell whether a signal came meanwhile."""
        recipe, world = self.learner.recipe, self.learner.world
        grid = self.run / f"grid-{done:08d}.png"
        wants_grid = self._due(recipe.grid_every, done) and not grid.exists()
        watch = self.watch if self._due(recipe.evaluate_every, done) and done not in self.log.evaluated else None
        if not world.any(world.main and (wants_grid or watch is not None)):
            return False
        weights = _whole(self.learner.ema.averages[0], world)

        def draw_and_measure() -> None:
            if world.main and wants_grid:
                self.learner.task.grid(weights, grid)
            if world.main and watch is not None:
                self._measure(watch, done, weights)

        with self.progress.aside():
            world.together(draw_and_measure)
        return world.any(bool(self.stop))

    def _due(self, every: int, done: int) -> bool:
        return every > 0 and done > 0 and (done % every == 0 or done == self.learner.recipe.steps)

    def _measure(self, watch: Watch, done: int, weights: Mapping[str, Tensor]) -> None:
        found = watch(lambda path: self.learner.task.export(weights, path), self.run, lambda: bool(self.stop))
        if found is not None:
            self.log.write_evaluation(done, found)
            self.progress.note(f"step {done}: {spoken(found)}")


def _end(done: int, progress: Progress, stop: list[int]) -> NoReturn:
    progress.note(f"stopped after step {done}; the same command goes on from there")
    raise Stopped(128 + (stop[0] if stop else signal.SIGTERM))


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
        write_atomically(path, json.dumps(plain, indent=1, default=str).encode())

    world.together(lambda: settle() if world.main else None)
    return _read_json(path)["resolved_precision"]


def _differing(stored: dict[str, Any], recipe: Recipe) -> list[str]:
    """Name the binding settings in which a recipe differs from a stored one."""
    # Read through today's defaults: a setting that is newer than the run is no difference.
    before, now = _binding(from_dict(Recipe, stored, "the run's recipe")), _binding(recipe)
    return [k for k in now if now[k] != before[k]]


def _binding(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that a run cannot change; where the data lie is told by their content."""
    # A CLIP's pairs are those of a part: there accumulation is no mere way to compute the same.
    plain = {k: v for k, v in to_dict(recipe).items() if k not in FREE or (k == "accumulate" and recipe.task == "clip")}
    return json.loads(json.dumps({**plain, "data": {**plain["data"], "path": ""}}, default=str))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text())
        if not isinstance(plain, dict) or "resolved_precision" not in plain:
            raise ValueError("it is no run's recipe")
        return plain
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


def _shapes(tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """Return the shapes that a checkpoint of its kind would have of these tensors."""
    least = torch.Size([1]) if checkpoint.shards else torch.Size()
    return {k: v.shape or least for k, v in tensors.items()}
