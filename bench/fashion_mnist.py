"""Fashion-MNIST after the same few minutes of one core: Sfumato, denoising-diffusion-pytorch, smalldiffusion.

    pip install -e '.[bench]'
    python bench/fashion_mnist.py DATA [key=value …] [--out DIR] [--budget 300] [--n 1000] [--only NAME …]

DATA is the folder of the four .gz files (Debian: dataset-fashion-mnist). The budget is CPU time, user and system, of
one process with one thread, training alone, loading left out; so that other work beside it changes little. Sfumato
runs the recipe over as many steps as fit, by a trial whose time is counted too; the peers then get as many seconds as
it took in all (the budget, where --only leaves Sfumato out). They are given smaller networks and batches than their
examples have, which are made for GPUs: with those they would hardly begin. Every network computes in bf16 where that
is faster here. All sample in 20 steps of the sampler that comes with them.

Everything done is kept in the folder and not done again: trained weights, pictures, figures. Further arguments override
the recipe's settings, as for ``sfumato train``.

Figures: FD and KID on EfficientNet-lite0 (FD-lite0, not FID) of N pictures against the first 10,000 training and
the 10,000 test pictures (KID: the first 4,000 of each); FD is biased upwards at small N, so a row of as many real
training pictures says what is perfect. Accuracy is that of a small classifier on the classes that were asked for.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peers
from budget import Clock, keep_to, train_within
from sfumato.data.pictures import load_pictures
from sfumato.data.sources import FASHION
from sfumato.evaluation.cache import Cache
from sfumato.evaluation.distances import frechet_distance, kid, moments
from sfumato.evaluation.extractors import lite0
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import load
from sfumato.pipeline.request import Request
from sfumato.training.denoiser import DenoiserTask
from sfumato.training.loop import bf16_pays
from sfumato.training.recipe import Recipe, load_recipe

RECIPE = Path(__file__).parents[1] / "recipes/fashion-mnist.yaml"
KID_REFERENCE, PART = 4_000, 100


def read(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Pictures uint8 (N, 28, 28) and labels (N,) of a split, train or t10k."""

    def array(name: str, header: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(gzip.open(data / name).read(), np.uint8)[header:].copy())

    return array(f"{split}-images-idx3-ubyte.gz", 16).view(-1, 28, 28), array(f"{split}-labels-idx1-ubyte.gz", 8).long()


# ── contenders: train(folder, data, budget) → what was spent; sample(folder, labels, first) → pictures ────────────


class Sfumato:
    conditional = True

    def __init__(self, recipe: Recipe, trial: float = 10.0):
        self.recipe, self.trial = recipe, trial

    def train(self, folder: Path, data: Path, budget: float) -> dict[str, Any]:
        recipe = replace(self.recipe, data=replace(self.recipe.data, path=str(data.resolve())))
        pictures = load_pictures(recipe.data, recipe.model.size, Path(), channels=1)

        def build(recipe: Recipe, run: Path) -> DenoiserTask:
            return DenoiserTask(recipe, pictures, run)

        return train_within(budget, recipe, build, folder, self.trial)

    def sample(self, folder: Path, labels: list[int], first: int) -> Tensor:
        pipe = load(folder / "final.safetensors", batch=PART)
        found: list[Tensor] = []
        for label in sorted(set(labels)):
            request = Request(
                self.words(label), n=labels.count(label), seed=1_000_000 * (label + 1) + first, **self.settings()
            )
            found += [torch.from_numpy(e.pixels[..., 0].copy()) for e in pipe.run(request) if isinstance(e, Picture)]
        return torch.stack(found)

    def words(self, label: int) -> str:
        return FASHION[label]

    def settings(self) -> dict[str, Any]:
        return {}

    def parameters(self, folder: Path) -> int:
        return sum(t.numel() for t in load_file(folder / "final.safetensors").values())


class SfumatoWithoutWords(Sfumato):
    """The same weights, asked for nothing."""

    conditional = False

    def train(self, folder: Path, data: Path, budget: float) -> dict[str, Any]:
        other = folder.parent / "sfumato"
        (folder / "final.safetensors").write_bytes((other / "final.safetensors").read_bytes())
        return json.loads((other / "trained.json").read_text())

    def settings(self) -> dict[str, Any]:
        return {"guidance": 0.0}  # the prediction without words alone


class SmallDiffusion:
    """Its example for Fashion-MNIST with classes (DiT, EMA), with squares of 4 pixels and a batch of 64."""

    conditional = True
    batch = 64

    def network(self) -> Any:
        peers.without_torchvision_kernels()
        from smalldiffusion import CondEmbedderLabel, DiT

        return DiT(
            in_dim=28,
            channels=1,
            patch_size=4,
            depth=6,
            head_dim=32,
            num_heads=6,
            cond_embed=CondEmbedderLabel(192, 10),
        )

    def schedule(self) -> Any:
        from smalldiffusion import ScheduleDDPM

        return ScheduleDDPM(beta_start=0.0001, beta_end=0.02, N=1000)

    def train(self, folder: Path, data: Path, budget: float) -> dict[str, Any]:
        images, labels = read(data, "train")
        torch.manual_seed(0)
        network, schedule = self.network(), self.schedule()
        from accelerate import Accelerator
        from smalldiffusion import training_loop
        from torch.utils.data import DataLoader, Dataset

        class Flipped(Dataset[tuple[Tensor, Tensor]]):
            def __len__(self) -> int:
                return len(images)

            def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
                x = images[i][None].float() / 127.5 - 1
                return (x.flip(-1) if torch.rand(()) < 0.5 else x), labels[i]

        peers.without_accelerators_state()
        accelerator = Accelerator(mixed_precision="no", cpu=True)  # bf16 is no faster for this network
        loader = DataLoader(Flipped(), batch_size=self.batch, shuffle=True)
        average = {k: v.clone() for k, v in network.state_dict().items()}
        clock, steps = Clock(), 0
        with peers.silent_bars():
            for _ in training_loop(loader, network, schedule, accelerator, lr=1e-3, conditional=True):
                new = list(network.state_dict().values())
                torch._foreach_lerp_(list(average.values()), new, 1 - min(0.99, (1 + steps) / (10 + steps)))
                steps += 1
                if clock.seconds > budget:
                    break
        save_file({k: v.contiguous() for k, v in average.items()}, folder / "final.safetensors")
        return {"seconds": clock.seconds, "steps": steps, "batch": self.batch}

    def sample(self, folder: Path, labels: list[int], first: int) -> Tensor:
        network = self.network()
        network.load_state_dict(load_file(folder / "final.safetensors"))
        from smalldiffusion import samples

        sigmas = self.schedule().sample_sigmas(20)
        *_, x = samples(network, sigmas, gam=1.6, batchsize=len(labels), cond=torch.tensor(labels))
        return to_uint8((x[:, 0] + 1) / 2)

    def parameters(self, folder: Path) -> int:
        return sum(p.numel() for p in self.network().parameters())


class Lucidrains:
    """Its Trainer and U-Net at half the usual width, a batch of 32 and a rate of 1e-3; it has no classes here."""

    conditional = False
    batch = 32

    def trainer(self, folder: Path, pictures: Path) -> Any:
        peers.without_torchvision_kernels()
        from denoising_diffusion_pytorch import Unet

        peers.without_accelerators_state()
        return peers.lucidrains_trainer(
            Unet(32, dim_mults=(1, 2, 4), channels=1),
            pictures,
            folder / "results",
            28,
            bf16_pays(torch.device("cpu")),
            train_batch_size=self.batch,
            train_lr=1e-3,
        )

    def train(self, folder: Path, data: Path, budget: float) -> dict[str, Any]:
        pictures = folder.parent / "png"
        if not (pictures / "done").exists():
            pictures.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(read(data, "train")[0].numpy()):
                Image.fromarray(image).save(pictures / f"{i:05d}.png", compress_level=1)
            (pictures / "done").touch()
        torch.manual_seed(0)
        trainer = self.trainer(folder, pictures)
        clock = Clock()
        peers.until(trainer, lambda: clock.seconds > budget)
        seconds = clock.seconds
        trainer.save("final")
        return {"seconds": seconds, "steps": trainer.step, "batch": self.batch}

    def sample(self, folder: Path, labels: list[int], first: int) -> Tensor:
        trainer = self.trainer(folder, folder.parent / "png")
        trainer.load("final")
        with peers.silent_bars(), torch.autocast("cpu", torch.bfloat16, enabled=bf16_pays(torch.device("cpu"))):
            return to_uint8(trainer.ema.ema_model.eval().sample(batch_size=len(labels))[:, 0].float())

    def parameters(self, folder: Path) -> int:
        return sum(p.numel() for p in self.trainer(folder, folder.parent / "png").model.parameters())


def to_uint8(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


# ── figures ────────────────────────────────────────────────────────────────────────────────────────────


def in_colour(images: Tensor) -> Tensor:
    return images[:, None].expand(-1, 3, -1, -1).contiguous()


def features(images: Tensor, out: Path) -> np.ndarray:
    """lite0's head of uint8 pictures (N, 28, 28), kept in parts."""
    extractor, cache = lite0(), Cache(out / "features")
    return np.concatenate([extractor(in_colour(part), cache) for part in images.split(1000)])[:, -1280:]


def classifier(data: Path, out: Path) -> Callable[[Tensor], Tensor]:
    """A small network that tells the classes of uint8 pictures (N, 28, 28) apart, trained once."""
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    path = out / "classifier.safetensors"

    def classes(images: Tensor) -> Tensor:
        network.eval()
        with torch.inference_mode():
            return torch.cat([network(part[:, None].float() / 127.5 - 1).argmax(1) for part in images.split(500)])

    if path.exists():
        network.load_state_dict(load_file(path))
        return classes
    torch.manual_seed(0)
    images, labels = read(data, "train")
    epochs, batch = 3, 128
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    steps = epochs * len(images) // batch
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps + epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch):
            loss = nn.functional.cross_entropy(network(images[chosen][:, None].float() / 127.5 - 1), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    save_file(network.state_dict(), path)
    return classes


def measure(images: Tensor, labels: list[int] | None, data: Path, out: Path, reference: int) -> dict[str, Any]:
    """FD and KID against training and test pictures, and the share of classes that came out as asked for."""
    found: dict[str, Any] = {"n": len(images)}
    x = features(images, out)
    for split, name in (("train", "train"), ("test", "t10k")):
        y = features(read(data, name)[0][:reference], out)
        found[f"fd_{split}"] = frechet_distance(moments(x), moments(y))
        distance = kid(x, y[:KID_REFERENCE], subsets=1)
        found[f"kid_{split}"], found[f"kid_{split}_error"] = distance.value, distance.error
    if labels is not None:
        found["accuracy"] = float((classifier(data, out)(images) == torch.tensor(labels)).float().mean())
    return found


# ── stages ─────────────────────────────────────────────────────────────────────────────────────────────


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds, made now if it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = json.dumps(make(), indent=1)
        path.write_text(made)
    return json.loads(path.read_text())


def pictures_of(contender: Any, folder: Path, n: int) -> tuple[Tensor, list[int]]:
    """N pictures, classes in turn, made and kept in parts; and the classes asked for."""
    every = [i * 10 // n for i in range(n)]
    parts = []
    for first in range(0, n, PART):
        path, labels = folder / f"pictures-{n}-{first:05d}.safetensors", every[first : first + PART]
        if not path.exists():
            torch.manual_seed(first)
            save_file({"pictures": contender.sample(folder, labels, first)}, path)
        parts.append(load_file(path)["pictures"])
    return torch.cat(parts), every


def contact_sheet(images: Tensor, path: Path) -> None:
    """Ten pictures of each tenth, one row each."""
    rows = images.reshape(10, -1, 28, 28)[:, :10].permute(0, 2, 1, 3).reshape(280, 280)
    Image.fromarray(rows.numpy()).save(path)


def contenders(recipe: Recipe) -> dict[str, Any]:
    return {
        "sfumato": Sfumato(recipe),
        "sfumato, no words": SfumatoWithoutWords(recipe),
        "smalldiffusion": SmallDiffusion(),
        "denoising-diffusion-pytorch": Lucidrains(),
    }


def rows(args: argparse.Namespace, recipe: Recipe) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every contender's name, what it spent, and its figures; real pictures last."""
    budget = args.budget
    for name, contender in contenders(recipe).items():
        if args.only and name not in args.only:
            continue
        folder = args.out / name.replace(", ", "-").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)

        def do(contender: Any = contender, folder: Path = folder, budget: float = budget) -> dict[str, Any]:
            spent = contender.train(folder, args.data, budget)
            return {**spent, "parameters": contender.parameters(folder)}

        print(f"{name}: training", flush=True)
        spent = kept(folder / "trained.json", do)
        budget = max(budget, spent["seconds"])
        print(f"{name}: {spent}", flush=True)
        images, labels = pictures_of(contender, folder, args.n)
        contact_sheet(images, folder / "pictures.png")
        asked = labels if contender.conditional else None
        figures = kept(
            folder / f"figures-{args.n}-{args.reference}.json",
            lambda i=images, a=asked: measure(i, a, args.data, args.out, args.reference),
        )
        print(f"{name}: {figures}", flush=True)
        yield name, spent, figures
    if not args.only:
        images, labels = (v[args.reference : args.reference + args.n] for v in read(args.data, "train"))
        figures = kept(
            args.out / f"real-{args.n}-{args.reference}.json",
            lambda: measure(images, labels.tolist(), args.data, args.out, args.reference),
        )
        yield "real training pictures", {}, figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Fashion-MNIST at a fixed budget of CPU time")
    parser.add_argument("data", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/fashion-mnist"))
    parser.add_argument("--budget", type=float, default=300.0, help="CPU seconds of training")
    parser.add_argument("--n", type=int, default=1000, help="pictures to compare, a multiple of 100")
    parser.add_argument("--reference", type=int, default=10_000, help="real pictures of either split to compare with")
    names = list(contenders(Recipe()))
    parser.add_argument("--only", nargs="*", default=[], choices=names, help="these contenders alone")
    args = parser.parse_intermixed_args()
    if args.n < PART or args.n % PART:
        parser.error(f"--n must be a multiple of {PART}, not {args.n}")
    if "sfumato, no words" in args.only and "sfumato" not in args.only and not (args.out / "sfumato").exists():
        parser.error("--only 'sfumato, no words' draws with the weights of sfumato: name that, too")
    keep_to(args.out, {"data": args.data.name, "budget": args.budget, "overrides": sorted(args.overrides)})
    torch.set_num_threads(1)
    recipe = load_recipe(RECIPE, ["grid_every=0", "threads=0", *args.overrides])
    lines = [
        f"| {args.budget:.0f} CPU s, {args.n} pictures against {args.reference} | M parameters | steps × batch | CPU s "
        "| FD-lite0 train / test | KID·10³ train / test | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, spent, f in rows(args, recipe):
        size = "| |"
        if spent:
            size = f"{spent['parameters'] / 1e6:.1f} | {spent['steps']} × {spent['batch']} | {spent['seconds']:.0f}"
        lines.append(
            f"| {name} | {size} | {f['fd_train']:.1f} / {f['fd_test']:.1f} | {f['kid_train'] * 1e3:.1f} / "
            f"{f['kid_test'] * 1e3:.1f} ± {f['kid_test_error'] * 1e3:.1f} | "
            + (f"{f['accuracy']:.3f} |" if "accuracy" in f else "– |")
        )
    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
