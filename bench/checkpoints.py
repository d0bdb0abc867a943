"""Load time, time of one call of the denoiser, and peak memory beside diffusers, in fresh processes in turn.

    python bench/checkpoints.py FOLDER [--side 512] [--repeats 3] [--threads 1] [--steps 1]
    python bench/checkpoints.py FOLDER --picture 4                   # from a cold process to a picture of 4 steps
    python bench/checkpoints.py FOLDER --pairs 10 [--dtype bf16]     # both networks in one process, called in turn

FOLDER holds a Stable Diffusion 1, 2 or XL model; random weights of the true shapes do, since only time is measured:
``bench/memory.py sd1 --modes --keep DIR`` writes such as DIR/sd1. Before each load of the first two kinds 7 GiB of
memory are touched and the folder is read, so that neither engine finds what the other does not. Times are of the CPU,
so that other work beside does not count; loading is told by the clock too. "all s" of a first picture is the process's
whole CPU time, imports included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

Call = Callable[[], Any]


def import_engine(engine: str) -> None:
    """Import all that loading needs, so that the clock can start after it."""
    if engine == "sfumato":
        from sfumato.families import sd1, sd2, sdxl  # noqa: F401
    else:
        import diffusers
        import transformers  # noqa: F401

        diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline  # noqa: B018 - both are imported lazily


def load(engine: str, folder: str, dtype: str = "fp32") -> Any:
    """Load the whole model."""
    if engine == "sfumato":
        from sfumato import families

        return families.load(folder, memory="normal", dtype=dtype)
    import diffusers
    import torch

    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=wanted)


def caller(engine: str, model: Any, side: int) -> Call:
    """One call of a loaded model's denoiser, under the words of a prompt."""
    import torch

    if engine == "sfumato":
        own = next(model.network.parameters()).dtype
        words = {**model.encode(["a red fox"]), **model.situate(side, side, 5.0)}
        words = {k: v.to(own) if v.ndim > 2 else v for k, v in words.items()}
        x, clock = torch.randn(1, model.channels, side // 8, side // 8).to(own), torch.tensor([500.0])
        return lambda: model.network(x, clock, **words)
    xl = model.unet.config.addition_embed_type == "text_time"
    out = model.encode_prompt("a red fox", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    added = {"text_embeds": out[2], "time_ids": sizes} if xl else None
    x = torch.randn(1, model.vae.config.latent_channels, side // 8, side // 8).to(model.unet.dtype)
    clock = torch.tensor([500.0])
    return lambda: model.unet(x, clock, encoder_hidden_states=out[0], added_cond_kwargs=added).sample


def pairs(folder: str, side: int, threads: int, n: int, dtype: str) -> None:
    """Call both denoisers in turn, once their weights are in memory, and print the times."""
    import torch

    torch.set_num_threads(threads)
    calls: list[Call] = []
    with torch.inference_mode():
        for engine in ("sfumato", "diffusers"):
            import_engine(engine)
            model = load(engine, folder, dtype)
            small = caller(engine, model, 64)
            for _ in range(6):
                small()
            calls.append(caller(engine, model, side))
        rows: list[list[float]] = []  # of the clock and of the CPU, ours and theirs
        for i in range(n):
            row = [0.0] * 4
            for k in (0, 1) if i % 2 == 0 else (1, 0):
                wall, cpu = time.perf_counter(), time.process_time()
                calls[k]()
                row[k], row[2 + k] = time.perf_counter() - wall, time.process_time() - cpu
            rows.append(row)
            print(" ".join(f"{seconds:.2f}" for seconds in row), flush=True)
    print(f"{dtype}, {side}x{side}, {threads} threads, {n} pairs of calls: seconds, sfumato / diffusers, their ratio")
    for name, k in (("clock", 0), ("CPU", 2)):
        ratio, (ours, theirs) = median(r[k] / r[k + 1] for r in rows), zip(*(r[k : k + 2] for r in rows), strict=True)
        print(f"{name}: median {median(ours):.2f} / {median(theirs):.2f}, of the ratios {ratio:.3f}; ", end="")
        print(f"least {min(ours):.2f} / {min(theirs):.2f}: {min(ours) / min(theirs):.3f}")


def measure(engine: str, folder: str, side: int, threads: int, steps: int) -> dict[str, float]:
    """Load and call once, in this process."""
    import torch

    torch.set_num_threads(threads)
    import_engine(engine)
    begin, wall = time.process_time(), time.perf_counter()
    model = load(engine, folder)
    loaded, loaded_wall = time.process_time() - begin, time.perf_counter() - wall
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.inference_mode():
        call = caller(engine, model, side)
        begin = time.process_time()
        call()
        first = time.process_time() - begin
        times = []
        for _ in range(steps):
            begin = time.process_time()
            call()
            times.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "load s": loaded, "load wall s": loaded_wall, "first call s": first, "call s": min(times),
        "loaded MiB": rss / 1024, "peak MiB": peak / 1024,
    }  # fmt: skip


def first_picture(engine: str, folder: str, side: int, threads: int, steps: int) -> dict[str, float]:
    """Import, load, and make one picture, in this process."""
    import torch

    torch.set_num_threads(threads)
    clock = time.process_time
    asked: dict[str, Any] = {"prompt": "a red fox", "width": side, "height": side}
    if engine == "sfumato":
        import sfumato

        sfumato.Pipeline  # noqa: B018 - imported lazily
        imported = clock()
        pipe: Any = sfumato.load(folder, memory="normal")
        loaded = clock()
        pipe.generate(**asked, steps=steps, guidance=7.5, sampler="ddim", seed=0)
    else:
        import diffusers

        diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline  # noqa: B018
        imported = clock()
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        loaded = clock()
        pipe(**asked, num_inference_steps=steps, guidance_scale=7.5)
    end = clock()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "import s": imported, "load s": loaded - imported, "picture s": end - loaded, "all s": end, "peak MiB": peak,
    }  # fmt: skip


TOUCHED = 7 << 30  # bytes


def warm(folder: Path) -> None:
    """Read every file, and touch as much memory as a load takes: neither gets from the disk, or from a host that hands
    out memory slowly, what the other finds at hand."""
    subprocess.run([sys.executable, "-c", f"b'x' * {TOUCHED}"], check=True)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def main() -> None:
    """Measure both in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--picture", type=int, default=0, metavar="STEPS", help="a first picture instead")
    parser.add_argument("--pairs", type=int, default=0, metavar="N", help="both in one process, N calls each, in turn")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of --pairs")
    parser.add_argument("--child", choices=("sfumato", "diffusers"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.dtype != "fp32" and not a.pairs:
        parser.error("--dtype is of --pairs alone: the other measurements are in fp32")
    if a.child:
        facts = (
            first_picture(a.child, a.folder, a.side, a.threads, a.picture)
            if a.picture
            else measure(a.child, a.folder, a.side, a.threads, a.steps)
        )
        print(json.dumps(facts))
        return
    if a.pairs:
        pairs(a.folder, a.side, a.threads, a.pairs, a.dtype)
        return
    results: dict[str, list[dict[str, float]]] = {"sfumato": [], "diffusers": []}
    options = [f"--{k}={getattr(a, k)}" for k in ("side", "threads", "steps", "picture")]
    for _ in range(a.repeats):
        for engine, rows in results.items():
            warm(Path(a.folder))
            command = [sys.executable, __file__, a.folder, "--child", engine, *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"median of {a.repeats}, {a.threads} threads, {a.side}x{a.side}")
    print(f"{'':<14}{'sfumato':>12}{'diffusers':>12}{'ratio':>8}")
    for key in results["sfumato"][0]:
        ours, theirs = (median(row[key] for row in rows) for rows in results.values())
        print(f"{key:<14}{ours:>12.2f}{theirs:>12.2f}{ours / theirs:>8.2f}")


if __name__ == "__main__":
    main()
