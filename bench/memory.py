"""Memory, load time and time of one step of published families at their true sizes, with random weights.

    python bench/memory.py sd1 sdxl --modes normal low low:bf16 [--side 512] [--stored F16] [--keep DIR]
    python bench/memory.py flux --blocks 1 2 --modes low:bf16 --side 256          # of 19 and 38 blocks

Weights are written to a folder and deleted afterwards. Each mode runs in a fresh process, its peaks read from the
kernel: resident (VmHWM), and anonymous, which is what cannot be read from the file again (sampled every 5 ms).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "sd35", "flux", "dit")
CUT = {"sd3": 1, "sd35": 1, "flux": 2, "dit": 1}  # families of which fewer blocks can be had, by their kinds of blocks
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
DISCRETE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, **BETAS, "steps_offset": 1}
CLIP_L: dict[str, Any] = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 768,
    "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
    "projection_dim": 768, "hidden_act": "quick_gelu", "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1,
}  # fmt: skip
CLIP_H: dict[str, Any] = {
    **CLIP_L, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 1024, "hidden_act": "gelu", "pad_token_id": 0,
}  # fmt: skip
CLIP_G: dict[str, Any] = {
    **CLIP_L, "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "intermediate_size": 5120,
    "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
T5_XXL: dict[str, Any] = {
    "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64,
    "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4,
    "layers_per_block": 2, "norm_num_groups": 32, "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3], "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip


def vae(channels: int, **more: Any) -> dict[str, Any]:
    """The KL autoencoder of all these families."""
    return {
        "_class_name": "AutoencoderKL", "latent_channels": channels, "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 512, **more,
    }  # fmt: skip


def index(name: str, **parts: str) -> dict[str, Any]:
    """A folder's model_index.json."""
    library = {"text": "transformers", "toke": "transformers"}
    return {"_class_name": name, **{k: [library.get(k[:4], "diffusers"), v] for k, v in parts.items()}}


def configs(family: str, blocks: list[int]) -> dict[str, dict[str, Any]]:
    """The configurations of a family's published folder, with as many blocks as asked for."""
    none = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    if family == "sd1":
        return {
            "": {**index("StableDiffusionPipeline", unet="UNet2DConditionModel", vae="AutoencoderKL",
                         text_encoder="CLIPTextModel", tokenizer="CLIPTokenizer", scheduler="DDIMScheduler"), **none},
            "unet": UNET, "vae": vae(4, scaling_factor=0.18215), "text_encoder": CLIP_L, "scheduler": DISCRETE,
        }  # fmt: skip
    if family == "sd2":
        unet = {
            **UNET, "sample_size": 96, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
            "use_linear_projection": True,
        }  # fmt: skip
        return {
            "": {**index("StableDiffusionPipeline", unet="UNet2DConditionModel", vae="AutoencoderKL",
                         text_encoder="CLIPTextModel", tokenizer="CLIPTokenizer", scheduler="DDIMScheduler"), **none},
            "unet": unet, "vae": vae(4, scaling_factor=0.18215), "text_encoder": CLIP_H,
            "scheduler": {**DISCRETE, "prediction_type": "v_prediction"},
        }  # fmt: skip
    if family == "sdxl":
        unet = {
            **UNET, "sample_size": 128, "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 2048,
            "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }  # fmt: skip
        return {
            "": index("StableDiffusionXLPipeline", unet="UNet2DConditionModel", vae="AutoencoderKL",
                      text_encoder="CLIPTextModel", text_encoder_2="CLIPTextModelWithProjection",
                      tokenizer="CLIPTokenizer", tokenizer_2="CLIPTokenizer", scheduler="DDIMScheduler"),
            "unet": unet, "vae": vae(4, scaling_factor=0.13025), "text_encoder": CLIP_L, "text_encoder_2": CLIP_G,
            "scheduler": DISCRETE,
        }  # fmt: skip
    if family in ("sd3", "sd35"):  # the medium ones
        transformer = {
            "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16,
            "out_channels": 16, "num_layers": blocks[0] if blocks else 24, "attention_head_dim": 64,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
        }  # fmt: skip
        if family == "sd35":
            transformer |= {"pos_embed_max_size": 384, "dual_attention_layers": [*range(13)], "qk_norm": "rms_norm"}
        return {
            "": index("StableDiffusion3Pipeline", transformer="SD3Transformer2DModel", vae="AutoencoderKL",
                      text_encoder="CLIPTextModelWithProjection", text_encoder_2="CLIPTextModelWithProjection",
                      text_encoder_3="T5EncoderModel"),
            "transformer": transformer, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL,
            "text_encoder": {**CLIP_L, "architectures": ["CLIPTextModelWithProjection"]},
            "vae": vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
            "scheduler": {**FLOW, "shift": 3.0},
        }  # fmt: skip
    if family == "flux":
        double, single = blocks or (19, 38)
        transformer = {
            "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": double,
            "num_single_layers": single, "attention_head_dim": 128, "num_attention_heads": 24,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
            "axes_dims_rope": [16, 56, 56],
        }  # fmt: skip
        return {
            "": index("FluxPipeline", transformer="FluxTransformer2DModel", vae="AutoencoderKL",
                      text_encoder="CLIPTextModel", text_encoder_2="T5EncoderModel"),
            "transformer": transformer, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL,
            "vae": vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            "scheduler": {**FLOW, "use_dynamic_shifting": True, "shift": 3.0},
        }  # fmt: skip
    transformer = {
        "_class_name": "DiTTransformer2DModel", "norm_type": "ada_norm_zero", "num_attention_heads": 16,
        "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": blocks[0] if blocks else 28,
        "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000,
    }  # fmt: skip
    return {
        "": index("DiTPipeline", transformer="DiTTransformer2DModel", vae="AutoencoderKL"),
        "transformer": transformer, "vae": vae(4, scaling_factor=0.18215),
        "scheduler": {**DISCRETE, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    }  # fmt: skip


def network(config: dict[str, Any]) -> Any:
    """The network that a component's configuration asks for."""
    from sfumato.families import configs as readers
    from sfumato.networks.autoencoder import Autoencoder
    from sfumato.networks.dit import DiT
    from sfumato.networks.flux import Flux
    from sfumato.networks.mmdit import MMDiT
    from sfumato.networks.sd_unet import SDUNet
    from sfumato.text.clip import CLIPText
    from sfumato.text.t5 import T5Encoder

    kinds: dict[str, Any] = {
        "UNet2DConditionModel": lambda c: SDUNet(readers.sd_unet_config(c)),
        "AutoencoderKL": lambda c: Autoencoder(readers.autoencoder_config(c)),
        "SD3Transformer2DModel": lambda c: MMDiT(readers.mmdit_config(c)),
        "FluxTransformer2DModel": lambda c: Flux(readers.flux_config(c)),
        "DiTTransformer2DModel": lambda c: DiT(readers.dit_config(c)),
        "CLIPTextModel": lambda c: CLIPText(readers.clip_config(c, False)),
        "CLIPTextModelWithProjection": lambda c: CLIPText(readers.clip_config(c, True)),
        "T5EncoderModel": lambda c: T5Encoder(readers.t5_config(c)),
    }
    return kinds[config.get("_class_name") or config["architectures"][0]](config)


def networks(parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of each component's tensors, without their numbers."""
    import torch

    from sfumato.families import common

    found = {}
    for part, c in parts.items():
        if part in ("", "scheduler"):
            continue
        with torch.device("meta"), common.Unfilled():
            state = network(c).state_dict()
        prefix = "text_model." if "embeddings.token_embedding.weight" in state else ""
        found[part] = {(k if k.startswith("text_projection") else prefix + k): tuple(t.shape) for k, t in state.items()}
    return found


def write(family: str, folder: Path, blocks: list[int], stored: str) -> int:
    """Write a published folder with random weights, a piece at a time; returns the bytes of its weights."""
    import torch

    from sfumato.checkpoints.folder import write_folder
    from sfumato.checkpoints.published import Published
    from sfumato.families.convert import with_tokenizers

    parts = configs(family, blocks)
    shapes = networks(parts)
    with torch.device("meta"):
        towers = {
            part: {k.removeprefix("text_model."): torch.empty(shape) for k, shape in own.items()}
            for part, own in shapes.items()
            if "text_encoder" in part
        }
    tokenizers = with_tokenizers(Published(folder, "folder", parts, towers)).tokenizers
    write_folder(Published(folder, "folder", parts, {}, tokenizers), folder)
    dtype, size = {"F16": (torch.float16, 2), "BF16": (torch.bfloat16, 2), "F32": (torch.float32, 4)}[stored]
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    total = 0
    for part, own in shapes.items():
        header, end = {}, 0
        for name, shape in own.items():
            stop = end + size * math.prod(shape)
            header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [end, stop]}
            end = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = "model.safetensors" if part.startswith("text") else "diffusion_pytorch_model.safetensors"
        with open(folder / part / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, shape in own.items():
                n = math.prod(shape)
                if len(shape) == 1:
                    out.write(torch.full((n,), float(name.endswith("weight")), dtype=dtype).view(torch.uint8).numpy())
                    continue
                fan_in = math.prod(shape[1:])
                scaled = (pool[:n] / math.sqrt(fan_in)).to(dtype).view(torch.uint8).numpy()
                for start in range(0, n * size, len(scaled)):
                    out.write(scaled[: n * size - start])
        total += end
    return total


def status(key: str) -> float:
    """A line of the kernel's account of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return math.nan


class Peak(threading.Thread):
    """The largest anonymous memory seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib = 0.0

    def run(self) -> None:
        """Look every 5 ms."""
        while True:
            self.mib = max(self.mib, status("RssAnon"))
            time.sleep(0.005)


def measure(folder: str, mode: str, side: int, steps: int, decode: bool) -> dict[str, float]:
    """Load, encode, take a step, and decode if asked to, in this process; CPU seconds, since others may be at work."""
    import torch

    from sfumato import families

    torch.set_num_threads(1)
    memory, _, dtype = mode.partition(":")
    base, peak = status("RssAnon"), Peak()
    peak.start()
    clock = time.process_time
    begin, wall = clock(), time.perf_counter()
    model = families.load(folder, memory=memory, dtype=dtype or "fp32")
    result = {"load CPU s": clock() - begin, "load wall s": time.perf_counter() - wall, "loaded MiB": status("VmRSS")}
    own = next(model.network.parameters()).dtype
    prompt = "7" if model.family == "dit" else "a red fox"
    with torch.inference_mode():
        begin = clock()
        words = {**model.encode([prompt]), **model.situate(side, side, 3.5)}
        result["encode CPU s"] = clock() - begin
        words = {k: v.to(own) if v.ndim > 2 else v for k, v in words.items()}
        x = torch.randn(1, model.channels, side // model.factor, side // model.factor)
        level = torch.tensor([0.5 if model.family == "flux" else 500.0])
        for i in range(steps):
            begin = clock()
            out = model.network(x.to(own), level, **words)
            result[f"step {i + 1} CPU s"] = clock() - begin
            assert out.isfinite().all()
        if decode:
            begin = clock()
            model.decode(x)
            result["decode CPU s"] = clock() - begin
    result |= {"peak RSS MiB": status("VmHWM"), "peak anonymous MiB": peak.mib, "of which before": base}
    return result


def main() -> None:
    """Write, measure each mode, print a line for each, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--modes", nargs="*", default=["normal", "low"])
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="fewer: one number, of flux two")
    parser.add_argument("--stored", choices=("F16", "BF16", "F32"), default="F16")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--keep", type=Path, help="a folder for the weights, which then are left there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        print(json.dumps(measure(a.child, a.modes[0], a.side, a.steps, a.decode)))
        return
    for family in a.families:
        if a.blocks and len(a.blocks) != CUT.get(family, 0):
            parser.error(f"--blocks takes {CUT.get(family, 0) or 'no'} number(s) for {family}, not {len(a.blocks)}")
    for family in a.families:
        folder = (a.keep or Path(tempfile.mkdtemp(prefix="sizes-"))) / family
        try:
            if folder.exists():
                print(f"{family}: weights as they are in {folder}", flush=True)
            else:
                part = folder.with_name(f".{family}.part")  # what is broken off is not taken for whole
                shutil.rmtree(part, ignore_errors=True)
                size = write(family, part, a.blocks, a.stored)
                part.rename(folder)
                print(f"{family}: {size / 2**30:.2f} GiB as {a.stored}", flush=True)
            for mode in a.modes:
                command = [sys.executable, __file__, family, f"--child={folder}", f"--modes={mode}", f"--side={a.side}"]
                command += [f"--steps={a.steps}"] + ["--decode"] * a.decode
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                facts = json.loads(done.stdout.splitlines()[-1])
                print(f"{family:<5} {mode:<10}", *(f"{k} {v:.1f};" for k, v in facts.items()), flush=True)
        finally:
            if a.keep is None:
                shutil.rmtree(folder.parent, ignore_errors=True)


if __name__ == "__main__":
    main()
