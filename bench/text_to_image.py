"""Latent text-to-image after the same CPU minutes: our recipe, with and without alignment, and diffusers' example.

    pip install -e '.[bench]'
    python bench/text_to_image.py DATA.parquet [--out DIR] [--budget 1500] [--n 250] [--only NAME …] [--experts N]

All are given the same pictures and captions, the same autoencoder and the same frozen text tower (weights/), and as
much CPU time, user and system, of one process with one thread. Ours is recipes/emoji-latent.yaml from nothing over as
many steps as fit, without compiling. diffusers' is what its text-to-image example trains: UNet2DConditionModel, ε,
AdamW, EMA; of 13.3 million parameters to our 29.5, of which 12.4 are not the experts' (LOG.md's figures are from before
these: --experts 0), at a rate of 3e-4, which suits so short a run better than its 1e-4.
All sample in 20 steps of DPM-Solver++(2M), guidance 3. What is done is kept in the folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peers
from budget import Clock, keep_to, train_within
from sfumato.data.config import DataConfig
from sfumato.evaluation.cache import Cache, default_folder
from sfumato.evaluation.generate import base_request, generate
from sfumato.evaluation.measure import Yardstick, prepare
from sfumato.evaluation.truth import load_truth
from sfumato.pipeline.pipeline import load
from sfumato.pixels import eight_bits
from sfumato.training.denoiser import DenoiserTask
from sfumato.training.loop import Task, bf16_pays
from sfumato.training.progress import Progress
from sfumato.training.recipe import Recipe, load_recipe
from sfumato.training.tasks import build_task
from sfumato.training.world import World

RECIPES = Path(__file__).parents[1] / "recipes"
GUIDANCE, STEPS, PART = 3.0, 20, 50
PLAIN = ["model.preview=null", "latents.preview=''", "grid_every=0", "compile=false", "threads=0"]


def recipe_of(data: Path, *overrides: str) -> Recipe:
    """The embedded model's recipe, without what is of no use here."""
    return load_recipe(RECIPES / "emoji-latent.yaml", [f"data.path={data.resolve()}", *PLAIN, *overrides])


def build(recipe: Recipe, run: Path) -> Task:
    return build_task(recipe, RECIPES, run, World(), Progress(quiet=True))


class Sfumato:
    def __init__(self, data: Path, *overrides: str):
        self.recipe = recipe_of(data, *overrides)

    def train(self, folder: Path, budget: float) -> dict[str, Any]:
        return train_within(budget, self.recipe, build, folder, trial=30.0)

    def sample(self, folder: Path, captions: Sequence[str]) -> Tensor:
        pipe = load(folder / "final.safetensors")
        return generate(pipe, base_request(pipe, steps=STEPS, guidance=GUIDANCE), captions, Cache(None))


class Batches:
    """What our own run draws at each step, in its order: latents, words' states and their mask."""

    def __init__(self, task: DenoiserTask, size: int):
        self.task, self.size = task, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for first in range(0, 1 << 40, self.size):
            batch = self.task.fetch(range(first, first + self.size))
            with torch.no_grad():
                words = self.task.module.states(batch.words)
            yield batch.x0, words["context"], words["mask"]


class Diffusers:
    """UNet2DConditionModel over the latents of our autoencoder, under the states of our text tower."""

    batch, rate = 128, 3e-4

    def __init__(self, data: Path):
        self.recipe = recipe_of(data, "latents.align=0")

    def network(self) -> Any:
        peers.without_torchvision_kernels()
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        return UNet2DConditionModel(
            sample_size=8, in_channels=16, out_channels=16, block_out_channels=(128, 160), layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=256, attention_head_dim=4,
        )  # fmt: skip

    def task(self, folder: Path) -> DenoiserTask:
        task = build(self.recipe, folder)
        assert isinstance(task, DenoiserTask)
        task.module.text.eval()
        return task

    def train(self, folder: Path, budget: float) -> dict[str, Any]:
        task = self.task(folder)
        torch.manual_seed(0)
        network = self.network()
        peers.without_accelerators_state()

        def call(network: nn.Module, x: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
            return network(x, t, context, encoder_attention_mask=mask).sample

        bf16 = bf16_pays(torch.device("cpu"))
        steps = peers.diffusers_steps(network, call, Batches(task, self.batch), bf16, rate=self.rate, warmup=100)
        clock, done, ema = Clock(), 0, None
        while clock.seconds < budget:
            ema = next(steps)
            done += 1
            if done % 100 == 0:
                print(f"  step {done}: {clock.seconds:.0f} s", flush=True)
        assert ema is not None
        ema.copy_to(network.parameters())
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "final.safetensors")
        return {"seconds": clock.seconds, "steps": done, "batch": self.batch}

    @torch.no_grad()
    def sample(self, folder: Path, captions: Sequence[str]) -> Tensor:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        task, network = self.task(folder), self.network().eval()
        network.load_state_dict(load_file(folder / "final.safetensors"))
        assert task.autoencoder is not None
        found: list[Tensor] = []
        for first in range(0, len(captions), PART):
            part = captions[first : first + PART]
            words = task.module.text.encode([*part, *[""] * len(part)])
            sampler = DPMSolverMultistepScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
            sampler.set_timesteps(STEPS)
            x = torch.randn(len(part), 16, 8, 8, generator=torch.Generator().manual_seed(first))
            for t in sampler.timesteps:
                eps = network(torch.cat([x, x]), t, words["context"], encoder_attention_mask=words["mask"]).sample
                wanted, plain = eps.chunk(2)
                x = sampler.step(plain + GUIDANCE * (wanted - plain), t, x).prev_sample
            found.append(eight_bits(task.autoencoder.decode(x)))
        return torch.cat(found)


CONTENDERS: dict[str, Callable[[Path, str], Any]] = {
    "sfumato": Sfumato,
    "sfumato, not aligned": lambda data, experts: Sfumato(data, experts, "latents.align=0"),
    "diffusers": lambda data, experts: Diffusers(data),
}


def figures(yardstick: Yardstick, made: dict[str, Tensor]) -> dict[str, Any]:
    found = yardstick.measure(made, keep=False)
    return {f"{f.metric} {f.split}": [f.value, *f.interval] for f in found if not f.style}


def main() -> None:
    parser = argparse.ArgumentParser(description="latent text-to-image at a fixed budget of CPU time")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/text-to-image"))
    parser.add_argument("--budget", type=float, default=1500.0, help="CPU seconds of training each")
    parser.add_argument("--n", type=int, default=250, help="captions of each split")
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--experts", type=int, default=8, help="of our denoiser in each layer, 0: none (default: 8)")
    args = parser.parse_args()
    keep_to(args.out, {"data": args.data.name, "budget": args.budget, "experts": args.experts})
    torch.set_num_threads(1)
    where = {"core": True, "split": ["train", "test_combo"]}
    truth = load_truth(DataConfig(path=str(args.data), where=where), 64, args.n)
    yardstick = prepare(truth, ("kid", "lpips", "judge"), Cache(default_folder()))
    for name in args.only:
        contender = CONTENDERS[name](args.data, f"model.transformer.experts={args.experts}")
        folder = args.out / name.replace(", ", "-").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "spent.json").exists():
            print(f"{name}: training", flush=True)
            (folder / "spent.json").write_text(json.dumps(contender.train(folder, args.budget)))
        made = {split: contender.sample(folder, truth.captions(rows)) for split, rows in truth.drawn.items()}
        parameters = sum(t.numel() for k, t in load_file(folder / "final.safetensors").items()
                         if not k.startswith(("text.", "autoencoder.")))  # fmt: skip
        row = {"parameters": parameters, **json.loads((folder / "spent.json").read_text()), **figures(yardstick, made)}
        print(name, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
