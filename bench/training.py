"""Pictures per second of one U-Net under Sfumato's trainer, diffusers' loop and denoising-diffusion-pytorch's Trainer.

    pip install -e '.[bench]'         # without the peers, ours alone is measured
    python bench/training.py [--precision bf16 fp32] [--rounds 3] [--steps 2] [--batch 16] [--widths 128 160 224]
                              [--compile] [--profile]

The U-Net is Stable Diffusion's in small: 25 million parameters at 32×32, attention to itself and to words at 16×16 and
8×8. The peers' loops train diffusers' class of it, ours trains our own, from the same weights; that both give the
same output is checked first. Data, batch and precision are the same; each loop has the optimizer, clipping and average
of weights that it comes with.

Time is the CPU time of this process with one thread, so that other work on the machine disturbs little. The loops take
turns, a few steps each, and each is compared with ours in the same round; quoted are medians over the rounds. The
rate of a 2048³ product in the same precision, measured between the loops, says what the processor can do: a share is
that of the best round in the best product, since what disturbs slows either.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peers
from sfumato.data.config import DataConfig
from sfumato.data.pictures import Pictures, load_pictures
from sfumato.diffusion import PARAMETERIZATIONS, SCHEDULES
from sfumato.networks.sd_unet import SDUNet, SDUNetConfig
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


# ── our trainer, one step at a time ────────────────────────────────────────────────────────────────────


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


class Stepwise(Progress):
    """Runs ``train`` in a thread of its own and lets it take a step when told to."""

    def __init__(self, task: Task, recipe: Recipe, folder: Path):
        super().__init__(quiet=True)
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.failed: BaseException | None = None

        def work() -> None:
            self.go.acquire()
            try:
                train(task, recipe, folder, self)
            except BaseException as e:
                self.failed = e
                self.done.release()

        threading.Thread(target=work, daemon=True).start()

    def step(self, done: int, loss: float, levels: Any, pictures: int) -> None:
        self.done.release()
        self.go.acquire()

    def __call__(self) -> None:
        self.go.release()
        self.done.acquire()
        if self.failed is not None:
            raise self.failed


# ── contenders ─────────────────────────────────────────────────────────────────────────────────────────


def contenders(
    pictures: Pictures, widths: Sequence[int], batch: int, bf16: bool, folder: Path, compiled: bool
) -> tuple[dict[str, Callable[[], Any]], Ours]:
    """What takes one step of each loop, and our network."""
    torch.manual_seed(0)
    ours = Ours(widths)
    found: dict[str, Callable[[], Any]] = {}
    recipe = Recipe(
        batch=batch, steps=1 << 20, precision="bf16" if bf16 else "fp32", log_every=1 << 30, checkpoint_every=1 << 30
    )
    found["sfumato"] = Stepwise(Task(pictures, ours), recipe, folder / "ours")
    if compiled:
        other = Ours(widths)
        other.load_state_dict(ours.state_dict())
        found["sfumato, compiled"] = Stepwise(Task(pictures, other), replace(recipe, compile=True), folder / "compiled")
    try:
        peers.without_torchvision_kernels()
        peers.without_accelerators_state()
        import denoising_diffusion_pytorch  # noqa: F401
        from torch.utils.data import DataLoader
        from torchvision import transforms
    except ImportError as e:
        print(f"without the peers ({e}): pip install -e '.[bench]'")
        return found, ours

    theirs = [Theirs(widths) for _ in range(2)]
    for one in theirs:
        one.load_state_dict(ours.state_dict())
    x, t = torch.randn(2, 3, SIZE, SIZE), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs[0](x, t), atol=1e-5, rtol=0)

    files = folder / "png"
    files.mkdir()
    drawings = [Image.fromarray(pictures.images[i].permute(1, 2, 0).numpy()) for i in range(len(pictures))]
    for i, drawing in enumerate(drawings):
        drawing.save(files / f"{i:05d}.png")
    prepare = transforms.Compose([
        transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize([0.5], [0.5]),
    ])  # fmt: skip

    def together(some: list[Image.Image]) -> Tensor:
        return torch.stack([prepare(one) for one in some])

    loader = DataLoader(drawings, batch, shuffle=True, drop_last=True, collate_fn=together)  # type: ignore[arg-type]
    steps = peers.diffusers_steps(theirs[0], lambda network, x, t: network(x, t), loader, bf16)
    found["diffusers"] = lambda: next(steps)
    trainer = peers.lucidrains_trainer(theirs[1], files, folder / "theirs", SIZE, bf16, train_batch_size=batch)

    def step() -> None:
        trainer.train_num_steps = trainer.step + 1
        with peers.silent_bars():
            trainer.train()

    found["denoising-diffusion-pytorch"] = step
    return found, ours


def matmul_rate(dtype: torch.dtype, n: int = 2048, times: int = 4) -> float:
    """Floating-point operations per CPU second of the best of some large products."""
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    best = 0.0
    for _ in range(times):
        start = time.process_time()
        a @ b
        best = max(best, 2 * n**3 / (time.process_time() - start))
    return best


def pictures_per_second(step: Callable[[], Any], steps: int, batch: int) -> float:
    start = time.process_time()
    for _ in range(steps):
        step()
    return steps * batch / (time.process_time() - start)


def compare(pictures: Pictures, args: argparse.Namespace, bf16: bool, folder: Path) -> None:
    found, ours = contenders(pictures, args.widths, args.batch, bf16, folder, args.compile)
    with FlopCounterMode(display=False) as counter:
        ours(torch.randn(2, 3, SIZE, SIZE), torch.rand(2)).mean().backward()
    ours.zero_grad()
    flops = counter.get_total_flops() / 2
    for name, step in found.items():  # warm-up
        start = time.process_time()
        step()
        print(f"{name}: first step {time.process_time() - start:.1f} s", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in found}
    peaks: list[float] = []
    for _ in range(args.rounds):
        for name, step in found.items():
            peaks.append(matmul_rate(torch.bfloat16 if bf16 else torch.float32))
            rates[name].append(pictures_per_second(step, args.steps, args.batch))
    parameters = sum(p.numel() for p in ours.parameters()) / 1e6
    print(
        f"\n{'bf16' if bf16 else 'fp32'}: {parameters:.1f} M parameters, {flops / 1e9:.1f} GFLOP a picture, batch "
        f"{args.batch}, a large product {max(peaks) / 1e9:.0f} GFLOP/s, torch {torch.__version__}"
    )
    for name, each in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates["sfumato"], each, strict=True)]
        print(
            f"{name:28} {statistics.median(each):6.2f} pictures/s, share {max(each) * flops / max(peaks):.2f}; ours is "
            f"faster by "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            flush=True,
        )
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found["sfumato"]()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=50))


def main() -> None:
    parser = argparse.ArgumentParser(description="training throughput beside diffusers and denoising-diffusion-pytorch")
    parser.add_argument("--precision", nargs="*", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of each loop in a round")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--widths", type=int, nargs=3, default=WIDTHS, help="channels of the U-Net, multiples of 32")
    parser.add_argument("--compile", action="store_true", help="measure our trainer's compiled step too")
    parser.add_argument("--profile", action="store_true", help="show where one step of ours spends its time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pictures = load_pictures(DataConfig("sample", captions="none"), SIZE, Path())
    for precision in args.precision:
        with TemporaryDirectory() as folder:
            compare(pictures, args, precision == "bf16", Path(folder))


if __name__ == "__main__":
    main()
