"""Other projects' trainers, run as their own examples run them, for the benches beside them.

pip install -e '.[bench]'
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def without_torchvision_kernels() -> None:
    """Let a torchvision whose compiled half was built for another torch be imported for its transforms."""
    try:
        import torchvision
    except RuntimeError as e:
        if "does not exist" not in str(e):
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        without_torchvision_kernels.library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[attr-defined]
        for kernel in ("nms", "qnms"):
            without_torchvision_kernels.library.define(  # type: ignore[attr-defined]
                f"{kernel}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        import torchvision  # noqa: F401


# ── denoising-diffusion-pytorch ────────────────────────────────────────────────────────────────────────


def lucidrains_trainer(network: nn.Module, folder: Path, results: Path, size: int, bf16: bool, **settings: Any) -> Any:
    """Return its Trainer over a folder of pictures, loading in this process, with no samples or FID on the way."""
    without_torchvision_kernels()
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, denoising_diffusion_pytorch

    denoising_diffusion_pytorch.cpu_count = lambda: 0  # its loader's workers would escape the CPU clock
    diffusion = GaussianDiffusion(network, image_size=size, sampling_timesteps=20)  # the network says its channels
    return Trainer(
        diffusion,
        folder,
        results_folder=results,
        save_and_sample_every=1 << 40,
        calculate_fid=False,
        amp=bf16,
        mixed_precision_type="bf16",
        **settings,
    )


def without_accelerators_state() -> None:
    """Forget the precision that Accelerate keeps for the whole process, so that a second trainer may have another."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def silent_bars() -> Iterator[None]:
    """Keep tqdm's bars, and what a Trainer prints at the end of every call, off the terminal."""
    from tqdm import std

    write, std.tqdm.display = std.tqdm.display, lambda *args, **kwargs: True  # type: ignore[method-assign]
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        std.tqdm.display = write  # type: ignore[method-assign]


def until(trainer: Any, over: Callable[[], bool]) -> None:
    """Run a Trainer step by step until over() says so."""
    with silent_bars():
        while not over():
            trainer.train_num_steps = trainer.step + 1
            trainer.train()


# ── diffusers ──────────────────────────────────────────────────────────────────────────────────────────


def diffusers_steps(
    network: nn.Module, call: Callable[..., Tensor], loader: Any, bf16: bool, clip: float = 1.0, rate: float = 1e-4,
    warmup: int = 500,
) -> Iterator[Any]:  # fmt: skip
    """Train as its examples for unconditional and text-guided pictures do, one step for every ``next``: its EMA.

    Accelerate's precision and clipping, DDPM's noise and ε, AdamW with the examples' settings, a cosine rate, EMA.
    ``call`` is given the network, noisy pictures, timesteps, and what else the loader gives beside the pictures.
    """
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=True)
    noising = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.95, 0.999), weight_decay=1e-6)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=100_000)
    network, optimizer, loader, rates = accelerator.prepare(network, optimizer, loader, rates)
    ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, power=3 / 4)
    network.train()
    while True:
        for batch in loader:
            clean, *words = batch if isinstance(batch, (tuple, list)) else (batch,)
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, 1000, (len(clean),))
            noisy = noising.add_noise(clean, noise, timesteps)
            with accelerator.accumulate(network):
                loss = nn.functional.mse_loss(call(network, noisy, timesteps, *words).float(), noise)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(network.parameters(), clip)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            ema.step(network.parameters())
            loss.detach().item()
            yield ema
