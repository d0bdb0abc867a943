"""Where each tensor of the original single files lies in the published folders: tables, one per network.

    Place(theirs, ours, shape)      one tensor of the file is one of ours, or several, one after another along axis 0

Names are facts of the published files: CompVis' and Stability's latent diffusion, OpenCLIP, Stable Diffusion 3, FLUX.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a tensor is in the original file and in ours.

    Args:
        ours: one name, or several whose tensors follow one another along axis 0.
        shape: "" the same, "1x1" if theirs is a 1×1 convolution and ours a linear layer, "transposed", or "halves" if
            the two halves along axis 0 change their places.
        sizes: how long ours are along axis 0, in proportion; all alike without.
    """

    theirs: str
    ours: tuple[str, ...]
    shape: str = ""
    sizes: tuple[int, ...] = ()

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Cut one of theirs into ours."""
        sizes = self.sizes or (1,) * len(self.ours)
        unit = len(tensor) // sum(sizes) if tensor.ndim else 0
        return [tensor] if len(sizes) == 1 else tensor.split([n * unit for n in sizes])


def to_ours(tensors: Mapping[str, Tensor], places: Iterable[Place]) -> dict[str, Tensor]:
    """Rename and reshape tensors of an original file; those without a place are left out."""
    result: dict[str, Tensor] = {}
    for place in places:
        if place.theirs not in tensors:
            continue
        tensor = tensors[place.theirs]
        if place.shape == "1x1" and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        elif place.shape == "transposed":
            tensor = tensor.T.contiguous()  # products with strided matrices round otherwise
        elif place.shape == "halves":
            tensor = tensor.roll(tensor.shape[0] // 2, 0)
        result.update(zip(place.ours, place.split(tensor), strict=True))
    return result


def to_theirs(tensors: Mapping[str, Tensor], places: Iterable[Place]) -> dict[str, Tensor]:
    """The way back; raises KeyError for a tensor that has no place."""
    import torch

    result: dict[str, Tensor] = {}
    left = set(tensors)
    for place in places:
        if not all(name in tensors for name in place.ours):
            continue
        left -= set(place.ours)
        parts = [tensors[name] for name in place.ours]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if place.shape == "1x1" and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        elif place.shape == "transposed":
            tensor = tensor.T
        elif place.shape == "halves":
            tensor = tensor.roll(tensor.shape[0] // 2, 0)
        result[place.theirs] = tensor
    if left:
        raise KeyError(min(left))
    return result


def module(theirs: str, ours: str, shape: str = "") -> Iterator[Place]:
    """Weight and bias of a layer."""
    yield Place(f"{theirs}.weight", (f"{ours}.weight",), shape)
    yield Place(f"{theirs}.bias", (f"{ours}.bias",), "" if shape in ("1x1", "transposed") else shape)


def modules(theirs: str, ours: str, names: Mapping[str, str], shape: str = "") -> Iterator[Place]:
    """Several layers within one module: their names to ours."""
    for a, b in names.items():
        yield from module(f"{theirs}.{a}" if theirs else a, f"{ours}.{b}" if ours else b, shape)


def prefixed(prefix: str, places: Iterable[Place]) -> Iterator[Place]:
    """The same places where the file puts a prefix before every name."""
    for place in places:
        yield replace(place, theirs=prefix + place.theirs)


UNET_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
TRANSFORMER_BLOCK = (
    "norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2",
    *(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
)  # fmt: skip
AUTOENCODER_RESIDUAL = {
    "norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut",
}  # fmt: skip
AUTOENCODER_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _transformer(theirs: str, ours: str, depth: int) -> Iterator[Place]:
    yield from modules(theirs, ours, {name: name for name in ("norm", "proj_in", "proj_out")})
    for k in range(depth):
        for name in TRANSFORMER_BLOCK:
            yield from module(f"{theirs}.transformer_blocks.{k}.{name}", f"{ours}.transformer_blocks.{k}.{name}")


def unet(config: Json) -> Iterator[Place]:
    """Latent diffusion's U-Net; the configuration is that of the published folder."""
    n = len(config["block_out_channels"])
    blocks = _each(config.get("layers_per_block", 2), n)
    layers = _depth(config)
    layers_up = config.get("reverse_transformer_layers_per_block") or layers[::-1]
    depth, depth_up = (
        [_each(d, n) if "CrossAttn" in t else [] for d, t, n in zip(numbers, config[types], counts, strict=True)]
        for numbers, types, counts in (
            (layers, "down_block_types", blocks),
            (layers_up, "up_block_types", [count + 1 for count in reversed(blocks)]),
        )
    )
    yield from modules("", "", UNET_ENDS)
    k = 1
    for i in range(n):
        for j in range(blocks[i]):
            yield from modules(f"input_blocks.{k}.0", f"down_blocks.{i}.resnets.{j}", UNET_RESIDUAL)
            if depth[i]:
                yield from _transformer(f"input_blocks.{k}.1", f"down_blocks.{i}.attentions.{j}", depth[i][j])
            k += 1
        if i < n - 1:
            yield from module(f"input_blocks.{k}.0.op", f"down_blocks.{i}.downsamplers.0.conv")
            k += 1
    yield from modules("middle_block.0", "mid_block.resnets.0", UNET_RESIDUAL)
    yield from _transformer("middle_block.1", "mid_block.attentions.0", _each(layers[-1], 1)[0])
    yield from modules("middle_block.2", "mid_block.resnets.1", UNET_RESIDUAL)
    k = 0
    for i, count in enumerate(reversed(blocks)):
        for j in range(count + 1):
            yield from modules(f"output_blocks.{k}.0", f"up_blocks.{i}.resnets.{j}", UNET_RESIDUAL)
            if depth_up[i]:
                yield from _transformer(f"output_blocks.{k}.1", f"up_blocks.{i}.attentions.{j}", depth_up[i][j])
            if j == count and i < n - 1:
                last = 2 if depth_up[i] else 1
                yield from module(f"output_blocks.{k}.{last}.conv", f"up_blocks.{i}.upsamplers.0.conv")
            k += 1


def controlnet(config: Json) -> Iterator[Place]:
    """A ControlNet under the names of latent diffusion's U-Net."""
    types = config["down_block_types"]
    up = ["CrossAttnUpBlock2D" if "CrossAttn" in t else "UpBlock2D" for t in reversed(types)]
    no_way_up = {"up_block_types": up, "reverse_transformer_layers_per_block": [1] * len(types)}
    for place in unet({**config, **no_way_up}):
        if not place.theirs.startswith(("output_blocks.", "out.")):
            yield place
    hints = 2 * len(config["conditioning_embedding_out_channels"])
    for i in range(hints):  # convolutions, with an activation after each but the last
        ours = "conv_in" if i == 0 else "conv_out" if i == hints - 1 else f"blocks.{i - 1}"
        yield from module(f"input_hint_block.{2 * i}", f"controlnet_cond_embedding.{ours}")
    n = len(config["block_out_channels"])
    for i in range(sum(_each(config.get("layers_per_block", 2), n)) + n):
        yield from module(f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}")
    yield from module("middle_block_out.0", "controlnet_mid_block")


def _each(value: Any, n: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * n


def _depth(config: Json) -> list[int]:
    return _each(config.get("transformer_layers_per_block", 1), len(config["block_out_channels"]))


def autoencoder(config: Json) -> Iterator[Place]:
    """Latent diffusion's KL autoencoder."""
    n, blocks = len(config["block_out_channels"]), config.get("layers_per_block", 1)
    yield from modules("", "", {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"})
    for half, level, count in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        ends = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
        yield from modules(half, half, ends)
        for i in range(n):
            ours = f"{half}.{level}_blocks.{i}"
            theirs = f"{half}.{level}.{i if level == 'down' else n - 1 - i}"
            for j in range(count):
                yield from modules(f"{theirs}.block.{j}", f"{ours}.resnets.{j}", AUTOENCODER_RESIDUAL)
            yield from module(f"{theirs}.{level}sample.conv", f"{ours}.{level}samplers.0.conv")
        for j in range(2):
            yield from modules(f"{half}.mid.block_{j + 1}", f"{half}.mid_block.resnets.{j}", AUTOENCODER_RESIDUAL)
        attention = f"{half}.mid_block.attentions.0"
        yield from module(f"{half}.mid.attn_1.norm", f"{attention}.group_norm")
        yield from modules(f"{half}.mid.attn_1", attention, AUTOENCODER_ATTENTION, "1x1")


CLIP_LAYER = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2",
)  # fmt: skip


def clip(config: Json) -> Iterator[Place]:
    """CLIP's text tower under transformers' own names, as in SD 1 files."""
    names = ["embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm"]
    names += [f"encoder.layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in CLIP_LAYER]
    for name in names:
        yield from module(f"text_model.{name}", name)
    yield from module("text_projection", "text_projection")


OPEN_CLIP_LAYER = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def open_clip(config: Json) -> Iterator[Place]:
    """CLIP's text tower under OpenCLIP's names, as in SD 2 and XL files: queries, keys and values in one."""
    yield Place("token_embedding.weight", ("embeddings.token_embedding.weight",))
    yield Place("positional_embedding", ("embeddings.position_embedding.weight",))
    if "CLIPTextModel" not in config.get("architectures", ()):  # SD 2 files hold a projection that it does not use
        yield Place("text_projection", ("text_projection.weight",), "transposed")
    yield from module("ln_final", "final_layer_norm")
    for i in range(config["num_hidden_layers"]):
        theirs, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        yield from modules(theirs, ours, OPEN_CLIP_LAYER)
        for kind in ("weight", "bias"):
            parts = tuple(f"{ours}.self_attn.{name}_proj.{kind}" for name in "qkv")
            yield Place(f"{theirs}.attn.in_proj_{kind}", parts)


def fused(theirs: str, ours: Sequence[str], sizes: tuple[int, ...] = ()) -> Iterator[Place]:
    """Several layers of ours that are one of theirs."""
    for kind in ("weight", "bias"):
        yield Place(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours), "", sizes)


def t5(config: Json) -> Iterator[Place]:
    """T5's encoder under transformers' own names."""
    yield Place("shared.weight", ("shared.weight",))
    yield Place("encoder.final_layer_norm.weight", ("encoder.final_layer_norm.weight",))
    leaves = [f"0.SelfAttention.{n}" for n in ("q", "k", "v", "o", "relative_attention_bias")]
    leaves += ["0.layer_norm", "1.layer_norm", *(f"1.DenseReluDense.{n}" for n in ("wi", "wi_0", "wi_1", "wo"))]
    for i in range(config["num_layers"]):
        for leaf in leaves:
            name = f"encoder.block.{i}.layer.{leaf}.weight"
            yield Place(name, (name,))


JOINT_ENDS = {
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out",
}


def mmdit(config: Json) -> Iterator[Place]:
    """Stable Diffusion 3's transformer; its last norms have shift before scale, ours scale before shift."""
    yield Place("pos_embed", ("pos_embed.pos_embed",))
    yield from modules("", "", JOINT_ENDS)
    yield from module("final_layer.adaLN_modulation.1", "norm_out.linear", "halves")
    for i in range(config["num_layers"]):
        x, words, ours = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block", f"transformer_blocks.{i}"
        last = i == config["num_layers"] - 1
        yield from module(f"{x}.adaLN_modulation.1", f"{ours}.norm1.linear")
        yield from module(f"{words}.adaLN_modulation.1", f"{ours}.norm1_context.linear", "halves" if last else "")
        for theirs, attn in (("attn", "attn"), ("attn2", "attn2")):
            yield from fused(f"{x}.{theirs}.qkv", [f"{ours}.{attn}.to_{n}" for n in "qkv"])
            yield from module(f"{x}.{theirs}.proj", f"{ours}.{attn}.to_out.0")
            yield from modules(f"{x}.{theirs}", f"{ours}.{attn}", {"ln_q": "norm_q", "ln_k": "norm_k"})
        yield from fused(f"{words}.attn.qkv", [f"{ours}.attn.add_{n}_proj" for n in "qkv"])
        yield from module(f"{words}.attn.proj", f"{ours}.attn.to_add_out")
        yield from modules(f"{words}.attn", f"{ours}.attn", {"ln_q": "norm_added_q", "ln_k": "norm_added_k"})
        for theirs, ff in ((x, "ff"), (words, "ff_context")):
            yield from modules(f"{theirs}.mlp", f"{ours}.{ff}", {"fc1": "net.0.proj", "fc2": "net.2"})


FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    **{
        f"{a}.{c}_layer": f"time_text_embed.{b}_embedder.linear_{d}"
        for a, b in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance"))
        for c, d in (("in", 1), ("out", 2))
    },
}


def flux(config: Json) -> Iterator[Place]:
    """FLUX's transformer; its last norm has shift before scale, ours scale before shift."""
    yield from modules("", "", FLUX_ENDS)
    yield from module("final_layer.adaLN_modulation.1", "norm_out.linear", "halves")
    for i in range(config["num_layers"]):
        theirs, ours = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for side, norm, ff, names, out, q, k in (
            ("img", "norm1", "ff", "to_{}", "to_out.0", "norm_q", "norm_k"),
            ("txt", "norm1_context", "ff_context", "add_{}_proj", "to_add_out", "norm_added_q", "norm_added_k"),
        ):
            yield from module(f"{theirs}.{side}_mod.lin", f"{ours}.{norm}.linear")
            yield from fused(f"{theirs}.{side}_attn.qkv", [f"{ours}.attn.{names.format(n)}" for n in "qkv"])
            yield from module(f"{theirs}.{side}_attn.proj", f"{ours}.attn.{out}")
            yield Place(f"{theirs}.{side}_attn.norm.query_norm.scale", (f"{ours}.attn.{q}.weight",))
            yield Place(f"{theirs}.{side}_attn.norm.key_norm.scale", (f"{ours}.attn.{k}.weight",))
            yield from modules(f"{theirs}.{side}_mlp", f"{ours}.{ff}", {"0": "net.0.proj", "2": "net.2"})
    for i in range(config["num_single_layers"]):
        theirs, ours = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        yield from module(f"{theirs}.modulation.lin", f"{ours}.norm.linear")
        parts = [*(f"{ours}.attn.to_{n}" for n in "qkv"), f"{ours}.proj_mlp"]
        yield from fused(f"{theirs}.linear1", parts, (1, 1, 1, 4))
        yield from module(f"{theirs}.linear2", f"{ours}.proj_out")
        yield Place(f"{theirs}.norm.query_norm.scale", (f"{ours}.attn.norm_q.weight",))
        yield Place(f"{theirs}.norm.key_norm.scale", (f"{ours}.attn.norm_k.weight",))


def dit(config: Json) -> Iterator[Place]:
    """DiT as its makers publish it; the folders hold one embedding of clock and class for each block."""
    yield from module("x_embedder.proj", "pos_embed.proj")
    yield from modules("final_layer", "", {"adaLN_modulation.1": "proj_out_1", "linear": "proj_out_2"})
    for i in range(config["num_layers"]):
        theirs, ours = f"blocks.{i}", f"transformer_blocks.{i}"
        yield from modules("t_embedder.mlp", f"{ours}.norm1.emb.timestep_embedder", {"0": "linear_1", "2": "linear_2"})
        yield Place("y_embedder.embedding_table.weight", (f"{ours}.norm1.emb.class_embedder.embedding_table.weight",))
        yield from module(f"{theirs}.adaLN_modulation.1", f"{ours}.norm1.linear")
        yield from fused(f"{theirs}.attn.qkv", [f"{ours}.attn1.to_{n}" for n in "qkv"])
        yield from module(f"{theirs}.attn.proj", f"{ours}.attn1.to_out.0")
        yield from modules(f"{theirs}.mlp", f"{ours}.ff", {"fc1": "net.0.proj", "fc2": "net.2"})
