"""Pictures per second of one U-Net under Sfumato's trainer, diffusers' loop and denoising-diffusion-pytorch's Trainer.

    pip install -e '.[bench]'         # without the peers, ours alone is measured
    python bench/training.py [--precision bf16 fp32] [--rounds 3] [--steps 2] [--batch 16] [--widths 128 160 224]
                              [--compile] [--profile]

The U-Net is Stable Diffusion's in small: 25 million parameters at 32×32, attention to itself and to words at 16×16 and
8×8. The peers' loops train diffusers' class of it, ours trains our own, from the same weights; that both give the
same output is checked first. Data, batch and precision are the same; each loop has the optimizer, clipping and average
of weights that it comes with, and a process of its own, since what one sets for its process another would have too.

Time is the CPU time of a process with one thread, so that other work on the machine disturbs little. The loops take
turns, a few steps each, and each is compared with ours in the same round; quoted are medians over the rounds. The
rate of a 2048³ product in the same precision, measured between the loops, says what the processor can do: a share is
that of the best round in the best product, since what disturbs slows either.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peers
from sfumato.data.config import DataConfig
from sfumato.data.pictures import Pictures, load_pictures
from sfumato.diffusion import PARAMETERIZATIONS, SCHEDULES
from sfumato.networks.sd_unet import SDUNet, SDUNetConfig
from sfumato.training.allocator import keep_freed_memory
from sfumato.training.draws import draws
from sfumato.training.loop import train
from sfumato.training.objective import DenoisingObjective, Losses
from sfumato.training.progress import Progress
from sfumato.training.recipe import ObjectiveConfig, Recipe

SIZE, HEADS, WORDS = 32, 4, (8, 128)
WIDTHS = (128, 160, 224)  # 25 million parameters


# ── the network, ours and theirs ───────────────────────────────────────────────────────────────────────


class Ours(nn.Module):
    """Our U-Net under words that are always the same."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        levels = len(widths)
        self.unet = SDUNet(
            SDUNetConfig(
                3, 3, tuple(widths), (2,) * levels, (0, 1, 1), (1, 1, 0), heads=(HEADS,) * levels,
                context_dim=(WORDS[1],) * levels, self_attention=(True,) * levels,
            )
        )  # fmt: skip
        self.words: Tensor
        self.register_buffer("words", torch.zeros(1, *WORDS), persistent=False)

    def forward(self, x: Tensor, clock: Tensor) -> Tensor:
        return self.unet(x, clock, self.words.expand(len(x), -1, -1))


class Theirs(nn.Module):
    """diffusers' class of it, called as either peer's loop does."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        self.unet = UNet2DConditionModel(
            sample_size=SIZE, in_channels=3, out_channels=3, block_out_channels=tuple(widths), layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WORDS[1], attention_head_dim=HEADS,
        )  # fmt: skip
        self.words: Tensor
        self.register_buffer("words", torch.zeros(1, *WORDS), persistent=False)

    def forward(self, x: Tensor, clock: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.unet(x, clock, self.words.expand(len(x), -1, -1)).sample


# ── what our trainer trains ────────────────────────────────────────────────────────────────────────────


class Task:
    """ε of DDPM's linear schedule on plain pictures."""

    def __init__(self, pictures: Pictures, module: nn.Module):
        self.pictures = pictures
        self.module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.objective = DenoisingObjective(SCHEDULES["linear"](), PARAMETERIZATIONS["eps"], ObjectiveConfig())

    def fetch(self, places: range) -> tuple[Tensor, Tensor, Tensor]:
        x0 = self.pictures.take(0, places).x0
        return x0, *draws(0, places, x0.shape[1:])

    def fingerprint(self) -> str:
        return "bench"

    def losses(self, module: Callable[..., Tensor], batch: tuple[Tensor, Tensor, Tensor]) -> Losses:
        x0, u, eps = batch
        x0, eps = (v.contiguous(memory_format=torch.channels_last) for v in (x0, eps))
        return self.objective(module, x0, u, eps)

    def export(self, weights: Mapping[str, Tensor], path: Path) -> None: ...

    def grid(self, weights: Mapping[str, Tensor], path: Path) -> None: ...


# ── contenders, each in a process of its own ───────────────────────────────────────────────────────────


class Settings(NamedTuple):
    """What is the same for all."""

    widths: tuple[int, ...]
    batch: int
    bf16: bool


class Turns(Progress):
    """A process's side of the turns: waits to be told how many steps to take, then says how long they took."""

    def __init__(self, pipe: Connection):
        super().__init__(quiet=True)
        self.pipe, self.left, self.started = pipe, 0, 0.0

    def wait(self) -> None:
        """Wait to be told; 0 is the end."""
        self.left = self.pipe.recv()
        if self.left == 0:
            raise SystemExit
        self.started = time.process_time()

    def step(self, done: int = 0, loss: float = 0.0, levels: Any = (), pictures: int = 0) -> None:
        """Count a step that was taken."""
        self.left -= 1
        if self.left == 0:
            self.pipe.send((time.process_time() - self.started, self.memory))
            self.wait()


def sfumato(turns: Turns, settings: Settings, folder: Path, compiled: bool = False) -> None:
    """Our trainer, set up as its command does."""
    keep_freed_memory()
    recipe = Recipe(
        batch=settings.batch, steps=1 << 20, precision="bf16" if settings.bf16 else "fp32", compile=compiled,
        log_every=1 << 30, checkpoint_every=1 << 30,
    )  # fmt: skip
    train(Task(drawings(), network(settings)), recipe, folder / "run", turns)


def compiled(turns: Turns, settings: Settings, folder: Path) -> None:
    """Our trainer with a compiled step."""
    sfumato(turns, settings, folder, compiled=True)


def profiled(turns: Turns, settings: Settings, folder: Path) -> None:
    """Our trainer, whose last step is profiled."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, suppress(SystemExit):
        sfumato(turns, settings, folder)
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=50))


def diffusers(turns: Turns, settings: Settings, folder: Path) -> None:
    """The loop of diffusers' examples."""
    peers.without_torchvision_kernels()
    from torch.utils.data import DataLoader
    from torchvision import transforms

    prepare = transforms.Compose([
        transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize([0.5], [0.5]),
    ])  # fmt: skip

    def together(some: list[Image.Image]) -> Tensor:
        return torch.stack([prepare(one) for one in some])

    loader = DataLoader(as_images(drawings()), settings.batch, shuffle=True, drop_last=True, collate_fn=together)  # type: ignore[arg-type]
    for _ in peers.diffusers_steps(theirs(settings), lambda network, x, t: network(x, t), loader, settings.bf16):
        turns.step()


def denoising_diffusion_pytorch(turns: Turns, settings: Settings, folder: Path) -> None:
    """denoising-diffusion-pytorch's Trainer."""
    peers.without_torchvision_kernels()
    files = folder / "png"
    files.mkdir()
    for i, drawing in enumerate(as_images(drawings())):
        drawing.save(files / f"{i:05d}.png")
    trainer = peers.lucidrains_trainer(
        theirs(settings), files, folder / "results", SIZE, settings.bf16, train_batch_size=settings.batch
    )
    with peers.silent_bars():
        while True:
            trainer.train_num_steps = trainer.step + 1
            trainer.train()
            turns.step()


def drawings() -> Pictures:
    return load_pictures(DataConfig("sample", captions="none"), SIZE, Path())


def as_images(pictures: Pictures) -> list[Image.Image]:
    return [Image.fromarray(pictures.images[i].permute(1, 2, 0).numpy()) for i in range(len(pictures))]


def network(settings: Settings) -> Ours:
    torch.manual_seed(0)
    return Ours(settings.widths)


def theirs(settings: Settings) -> Theirs:
    """Their network of our weights, checked to give the same."""
    ours, found = network(settings), Theirs(settings.widths)
    found.load_state_dict(ours.state_dict())
    x, t = torch.randn(2, 3, SIZE, SIZE), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), found(x, t), atol=1e-5, rtol=0)
    return found


Loop = Callable[[Turns, Settings, Path], None]


def in_turns(loop: Loop, settings: Settings, pipe: Connection) -> None:
    """Run a loop in this process, a few steps whenever it is told to."""
    torch.set_num_threads(1)
    turns = Turns(pipe)
    with TemporaryDirectory() as folder:
        turns.wait()
        loop(turns, settings, Path(folder))


@contextmanager
def at_work(loop: Loop, settings: Settings) -> Iterator[Callable[[int], tuple[float, int]]]:
    """Start a loop's process; yields what takes some steps of it and returns their CPU seconds and its peak in MB."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=in_turns, args=(loop, settings, other), daemon=True)
    process.start()
    other.close()

    def take(steps: int) -> tuple[float, int]:
        pipe.send(steps)
        return pipe.recv()

    try:
        yield take
        pipe.send(0)
    except BaseException:
        process.kill()  # a run that is being trained takes a gentler signal for a wish to be saved
        raise
    finally:
        process.join()


def matmul_rate(dtype: torch.dtype, n: int = 2048, times: int = 4) -> float:
    """Floating-point operations per CPU second of the best of some large products."""
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    best = 0.0
    for _ in range(times):
        start = time.process_time()
        a @ b
        best = max(best, 2 * n**3 / (time.process_time() - start))
    return best


def compare(loops: Mapping[str, Loop], settings: Settings, rounds: int, steps: int) -> None:
    ours = network(settings)
    with FlopCounterMode(display=False) as counter:
        ours(torch.randn(2, 3, SIZE, SIZE), torch.rand(2)).mean().backward()
    flops = counter.get_total_flops() / 2
    rates: dict[str, list[float]] = {name: [] for name in loops}
    memory: dict[str, int] = {}
    peaks: list[float] = []
    with ExitStack() as stack:
        taking = {name: stack.enter_context(at_work(loop, settings)) for name, loop in loops.items()}
        for take in taking.values():  # warm-up
            take(2)
        for _ in range(rounds):
            for name, take in taking.items():
                peaks.append(matmul_rate(torch.bfloat16 if settings.bf16 else torch.float32))
                seconds, memory[name] = take(steps)
                rates[name].append(steps * settings.batch / seconds)
    parameters = sum(p.numel() for p in ours.parameters()) / 1e6
    print(
        f"\n{'bf16' if settings.bf16 else 'fp32'}: {parameters:.1f} M parameters, {flops / 1e9:.1f} GFLOP a picture, "
        f"batch {settings.batch}, a large product {max(peaks) / 1e9:.0f} GFLOP/s, torch {torch.__version__}"
    )
    for name, each in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates["sfumato"], each, strict=True)]
        print(
            f"{name:28} {statistics.median(each):6.2f} pictures/s, share {max(each) * flops / max(peaks):.2f}, "
            f"{memory[name]} MB; ours is faster by "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="training throughput beside diffusers and denoising-diffusion-pytorch")
    parser.add_argument("--precision", nargs="*", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of each loop in a round")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--widths", type=int, nargs=3, default=WIDTHS, help="channels of the U-Net, multiples of 32")
    parser.add_argument("--compile", action="store_true", help="measure our trainer's compiled step too")
    parser.add_argument("--profile", action="store_true", help="show where two steps of ours spend their time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    loops: dict[str, Loop] = {"sfumato": sfumato}
    if args.compile:
        loops["sfumato, compiled"] = compiled
    try:
        peers.without_torchvision_kernels()
        import accelerate  # noqa: F401
        import denoising_diffusion_pytorch as _  # noqa: F401

        loops |= {"diffusers": diffusers, "denoising-diffusion-pytorch": denoising_diffusion_pytorch}
    except ImportError as e:
        print(f"without the peers ({e}): pip install -e '.[bench]'")
    for precision in args.precision:
        settings = Settings(tuple(args.widths), args.batch, precision == "bf16")
        compare(loops, settings, args.rounds, args.steps)
        if args.profile:
            with at_work(profiled, settings) as take:
                take(2)


if __name__ == "__main__":
    main()
