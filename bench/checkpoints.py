"""Load time, time of one call of the denoiser, and peak memory beside diffusers, in fresh processes in turn.

    python bench/checkpoints.py FOLDER [--side 512] [--repeats 3] [--threads 1] [--steps 1]
    python bench/checkpoints.py FOLDER --picture 4                   # from a cold process to a picture of 4 steps

FOLDER holds a Stable Diffusion 1, 2 or XL model; random weights of the true shapes do, since only time is measured:
``bench/memory.py sd1 --modes --keep DIR`` writes such. Times are of the CPU, so that other work beside does not count;
loading is told by the clock too. "all s" of a first picture is the process's whole CPU time, imports included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any


def measure(engine: str, folder: str, side: int, threads: int, steps: int) -> dict[str, float]:
    """Load and call once, in this process."""
    import torch

    torch.set_num_threads(threads)
    if engine == "sfumato":
        from sfumato import families
        from sfumato.families import sd1, sd2, sdxl  # noqa: F401 - imported before the clock starts, as theirs are
    else:
        import diffusers
        import transformers  # noqa: F401

        diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline  # noqa: B018 - both are imported lazily
    begin, wall = time.process_time(), time.perf_counter()
    if engine == "sfumato":
        model = families.load(folder, memory="normal")
        network, channels = model.network, model.channels
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
        network, channels = pipe.unet, pipe.vae.config.latent_channels
    loaded, loaded_wall = time.process_time() - begin, time.perf_counter() - wall
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x, clock = torch.randn(1, channels, side // 8, side // 8), torch.tensor([500.0])
    with torch.inference_mode():
        if engine == "sfumato":
            words = {**model.encode(["a red fox"]), **model.situate(side, side, 5.0)}

            def call() -> Any:
                return network(x, clock, **words)
        else:
            xl = pipe.unet.config.addition_embed_type == "text_time"
            out = pipe.encode_prompt(
                "a red fox", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
            added = {"text_embeds": out[2], "time_ids": sizes} if xl else None

            def call() -> Any:
                return network(x, clock, encoder_hidden_states=out[0], added_cond_kwargs=added).sample

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
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--picture", type=int, default=0, metavar="STEPS", help="a first picture instead")
    parser.add_argument("--child", choices=("sfumato", "diffusers"))
    a = parser.parse_args()
    if a.child:
        facts = (
            first_picture(a.child, a.folder, a.side, a.threads, a.picture)
            if a.picture
            else measure(a.child, a.folder, a.side, a.threads, a.steps)
        )
        print(json.dumps(facts))
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
