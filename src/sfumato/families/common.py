"""What the recipes of published families share: their parts, built from configurations and tensors."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from sfumato.checkpoints.published import DTYPES, Json, Published
from sfumato.checkpoints.tensors import LoadReport, load_into
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.parameterizations import PARAMETERIZATIONS, Parameterization
from sfumato.diffusion.schedules import Discrete, cosine, from_betas, linear, scaled_linear
from sfumato.errors import BadCheckpoint
from sfumato.families.configs import (
    autoencoder_config,
    clip_config,
    sd_unet_config,
    t5_config,
    tiny_autoencoder_config,
)
from sfumato.families.model import Defaults, Model
from sfumato.networks.autoencoder import AnyAutoencoder, Autoencoder, Halves, TinyAutoencoder
from sfumato.networks.blocks import sinusoids
from sfumato.networks.compact import CompactAutoencoder
from sfumato.networks.sd_unet import SDUNet
from sfumato.networks.statistics import with_fixed_norms
from sfumato.networks.stored import Mappings, in_dtype, keeper
from sfumato.text.clip import CLIPText
from sfumato.text.prompt import chunks, grid, parse, spell_prompt, weigh, without_breaks
from sfumato.text.spelling import Word
from sfumato.text.t5 import T5Encoder
from sfumato.text.tokenizer import T5_ROWS, Words, clip_words, packaged_t5, t5_words

M = TypeVar("M", bound=nn.Module)


class Unfilled(TorchFunctionMode):
    """Lets modules be built without first values, which take seconds and are about to be replaced."""

    FILLS = frozenset({"uniform_", "normal_", "kaiming_uniform_", "xavier_uniform_", "fill_", "zero_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave a tensor as it is when it is to be filled."""
        if getattr(func, "__name__", "") in self.FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def at_most(parameters: int) -> Iterator[None]:
    """End the building of modules that have more parameters than this: a hostile configuration may ask for any number.

    Raises BadCheckpoint.
    """
    thread, count = threading.get_ident(), 0

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > parameters:
            raise BadCheckpoint("its configuration is of a far larger network than its weights")

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def build(
    model: Published, component: str, network: Callable[[Any], M], config: Any, dtype: torch.dtype | None = None
) -> M:
    """Build a network without memory of its own and give it a component's tensors, in the model's type or ``dtype``.

    Tensors that have that type in the file stay mapped to it; others are changed as they are used, and then kept unless
    the model is to keep little. Raises BadCheckpoint if they do not fit exactly or, where the model is partial, not
    at all; what is missing then has the first values of training.
    """
    if component not in model.tensors:
        raise BadCheckpoint(f"{model.path}: has no {component}")
    try:
        with at_most(2 * len(model.tensors[component]) + 100):
            if model.partial:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    module = network(config)
            else:
                with torch.device("meta"), Unfilled():
                    module = network(config)
        module = module.to(dtype or getattr(torch, DTYPES[model.keep.dtype][0])).requires_grad_(False)
        keep = keeper(Mappings(model.files), module.state_dict(keep_vars=True), model.keep.low)
        model.reports[component] = load_into(
            module, model.tensors[component], partial=model.partial, keep=None if model.partial else keep
        )
    except (BadCheckpoint, ValueError, RuntimeError) as e:
        hint = " (--partial lets that pass)" if "do not fit the network:" in str(e) else ""
        raise BadCheckpoint(f"{model.path}: {component}: {e}{hint}") from None
    return module.eval()


def unet(model: Published) -> SDUNet:
    """Build the model's U-Net; BadCheckpoint also for one that wants to be told what no recipe here tells it."""
    config = sd_unet_config(model.config("unet"))
    if config.classes:
        raise BadCheckpoint(
            f"{model.path}: its U-Net is told one of {config.classes} classes (num_class_embeds), as enlarging "
            "models are: not supported"
        )
    return build(model, "unet", SDUNet, config)


def embedded_guidance(network: SDUNet, guidance: float) -> dict[str, Tensor]:
    """What a network distilled with guidance is told of its scale (2310.04378, section 4.1), one row.

    The numbers are sines and cosines of 1000·(scale − 1), as with the published files; other networks are told nothing.
    """
    dim = network.config.guidance_dim
    return {"guidance": sinusoids(row([1000 * (guidance - 1)])[0], dim, 1.0, sines_first=True)} if dim else {}


def usual_unet(scheduler: Json, network: SDUNet, steps: int, guidance: float, side: int) -> Defaults:
    """The settings of a request that names none, for a U-Net; fewer steps for those distilled to few."""
    if network.config.guidance_dim:
        return Defaults("lcm", "trailing", 4, 8.5, side, side)
    if few_steps(scheduler):
        return Defaults("euler", "trailing", 1, 1.0, side, side)
    return Defaults("dpmpp-2m", usual_spacing(scheduler), steps, guidance, side, side)


def autoencoder(model: Published) -> AnyAutoencoder:
    """Build the model's autoencoder, the KL one or the tiny one, with another one's decoder if it has that too."""
    own = _autoencoder(model, "vae")
    if "vae_decoder" not in model.tensors:
        return own
    decoder = _autoencoder(model, "vae_decoder")
    if decoder.config.factor != own.config.factor:
        raise BadCheckpoint(f"the decoder makes {decoder.config.factor} pixels a cell, the model {own.config.factor}")
    return Halves(own, decoder)


def _autoencoder(model: Published, component: str) -> Autoencoder | TinyAutoencoder:
    return build(model, component, *autoencoder_of(model.config(component)), torch.float32)


def autoencoder_of(config: Json) -> tuple[Callable[[Any], Autoencoder | TinyAutoencoder], Any]:
    """The network that an autoencoder's configuration asks for, and its shape."""
    if "num_decoder_blocks" in config or config.get("_class_name") == "AutoencoderTiny":
        return TinyAutoencoder, tiny_autoencoder_config(config)
    return Autoencoder, autoencoder_config(config)


@dataclass(frozen=True, eq=False)
class Way:
    """One way through an autoencoder, in the type that its input comes in; a wider one makes a wider copy of it.

    Args:
        direction: the network's method, "encode" (to the mean of what x may be) or "decode".
    """

    network: AnyAutoencoder | CompactAutoencoder
    direction: str

    def __call__(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) to x (B, C, h, w), or back."""
        return getattr(in_type_of(x, self.network), self.direction)(x)

    def normalized_by(self, sample: Tensor) -> Way:
        """The same way for parts of pictures, with every group norm's mean and variance from a sample of the whole."""
        way = Way(with_fixed_norms(self.network), self.direction)
        with torch.inference_mode():
            way(sample)
        return way


def decoder(vae: AnyAutoencoder | CompactAutoencoder) -> Way:
    """The way from x to pictures."""
    return Way(vae, "decode")


def encoder(vae: AnyAutoencoder | CompactAutoencoder) -> Way:
    """The way from pictures to x."""
    return Way(vae, "encode")


def in_type_of(x: Tensor, network: M) -> M:
    """A network in the type that x comes in; a wider one is a copy."""
    return network if x.dtype == next(network.parameters()).dtype else in_dtype(network, x.dtype)


@dataclass(frozen=True)
class Tower:
    """A text tower with the words it reads."""

    network: CLIPText
    words: Words

    def ids(self, prompts: Sequence[str], rows: int = 1) -> tuple[Tensor, Tensor]:
        """Ids and weights (B, K, M) of the prompts."""
        return grid(prompts, self.words, rows)

    def spell(self, prompt: str) -> list[Word]:
        """The prompt's words with their columns of the states."""
        return spell_prompt(prompt, self.words)

    def states(self, ids: Tensor, weights: Tensor, skip: int | None) -> tuple[Tensor, Tensor]:
        """States (B, K·M, D) and the first chunk's pooled vector (B, P).

        Args:
            skip: None takes the last states, normalized; 1 those before the last layer, as they are; and so on.
        """
        b, k, m = ids.shape
        device = self.network.final_layer_norm.weight.device
        out = self.network(ids.reshape(b * k, m).to(device))
        states = out.last if skip is None else out.layers[-1 - skip]
        states = weigh(states, weights.reshape(b * k, m).to(device))
        return states.reshape(b, k * m, -1), out.pooled.reshape(b, k, -1)[:, 0]

    def context(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What a U-Net under this tower alone is told: its last states, normalized."""
        return {"context": self.states(*self.ids(prompts), skip=None)[0]}


def tower(model: Published, component: str, tokenizer: str, projected: bool, pad: int | None = None) -> Tower:
    """Build a CLIP tower and its tokenizer; BadCheckpoint if the one has more words than the other."""
    config = clip_config(model.config(component), projected)
    try:
        words = clip_words(model.tokenizers.get(tokenizer, {}), config.positions, pad)
    except BadCheckpoint as e:
        raise BadCheckpoint(f"{model.path}: {tokenizer}: {e}") from None
    _check_vocabulary(model, component, words, config.vocabulary)
    if words.added and config.end is None:  # the end's id is no longer the largest
        config = replace(config, end=words.end)
    return Tower(build(model, component, CLIPText, config), words)


@dataclass(frozen=True)
class LongTower:
    """T5's encoder with the words it reads: one row for each prompt, the rest is dropped."""

    network: T5Encoder
    words: Words

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """States (B, M, D) of the prompts, padding among them, as the published models were trained."""
        first = [chunks(without_breaks(prompt), self.words)[0] for prompt in prompts]
        device = self.network.shared.weight.device
        states = self.network(torch.tensor([c.ids for c in first], device=device))
        return weigh(states, torch.tensor([c.weights for c in first], device=device))

    def spell(self, prompt: str) -> list[Word]:
        """The prompt's words with their columns of the states."""
        return spell_prompt(without_breaks(prompt), self.words, rows=1)

    def truncated(self, prompt: str) -> int:
        """Number of a prompt's tokens that do not fit."""
        return max(0, sum(len(self.words(part[0])) for part in parse(prompt) if part is not None) - self.words.room)


def t5(model: Published, component: str, tokenizer: str, length: int) -> LongTower | None:
    """Build T5's encoder and its tokenizer; None if the model has not both, and the packaged vocabulary is not its."""
    if component not in model.tensors:
        return None
    config, texts = t5_config(model.config(component)), model.tokenizers.get(tokenizer, {})
    if not texts and config.vocabulary != T5_ROWS:
        return None
    try:
        words = t5_words(texts, length, config.vocabulary)
    except BadCheckpoint as e:
        raise BadCheckpoint(f"{model.path}: {tokenizer}: {e}") from None
    _check_vocabulary(model, component, words, config.vocabulary)
    return LongTower(build(model, component, T5Encoder, config), words)


def t5_used(tower: LongTower) -> dict[str, str]:
    """Whose vocabulary a T5 encoder reads by, for the card."""
    packaged = tower.words.tokenizer is packaged_t5()
    return {"T5": f"used, by {'the packaged vocabulary' if packaged else 'its own tokenizer.json'}"}


def no_t5(model: Published, component: str) -> str:
    """Why a model's T5 encoder cannot be built, and what would help."""
    if component not in model.tensors:
        return "it holds no T5 encoder"
    return (
        f"it holds a T5 encoder without its tokenizer.json, and not of the packaged vocabulary's {T5_ROWS} rows: take "
        "a folder that has both, and of this --denoiser FILE"
    )


def _check_vocabulary(model: Published, component: str, words: Words, known: int) -> None:
    pieces = words.tokenizer.get_vocab_size()
    pieces = max(pieces, 1 + max((i for ids in words.added.values() for i in ids), default=-1))
    if pieces > known:
        raise BadCheckpoint(f"{model.path}: the tokenizer has {pieces} pieces, but the {component} knows {known}")


def flow(clock: float) -> Parameterization:
    """The row of the straight path, with σ times a factor as the network's clock."""
    return replace(PARAMETERIZATIONS["flow"], clock=lambda level: clock * level.t)


def shifted(scheduler: Json, unit: int, usual: float) -> Callable[[int, int], Mapping[str, Mapping[str, float]]]:
    """The shift of a flow's times towards noise, at any size of picture: one number or, where the scheduler says so, by
    the number of cells; then μ is linear in that number, and the shift e^μ (FLUX) or μ itself.

    Args:
        unit: pixels per side of one cell of the transformer.
        usual: the shift where the scheduler names none.

    Raises BadCheckpoint for times that are changed in other ways besides.
    """
    for setting in ("shift_terminal", "invert_sigmas"):
        if scheduler.get(setting):
            raise BadCheckpoint(f"its scheduler's {setting} is not supported")
    low, high = float(scheduler.get("base_image_seq_len", 256)), float(scheduler.get("max_image_seq_len", 4096))
    start, end = float(scheduler.get("base_shift", 0.5)), float(scheduler.get("max_shift", 1.15))
    constant = float(scheduler.get("shift", scheduler.get("flow_shift", usual)))
    by_size, exponential = scheduler.get("use_dynamic_shifting"), scheduler.get("time_shift_type") != "linear"

    def spacings(width: int, height: int) -> dict[str, dict[str, float]]:
        cells = (width // unit) * (height // unit)
        mu = start + (end - start) * (cells - low) / (high - low)
        return {"shift": {"s": constant if not by_size else math.exp(mu) if exponential else mu}}

    return spacings


MAX_LEVELS = 100_000  # of a discrete noise schedule


def schedule(config: Json) -> Discrete:
    """The discrete noise schedule that a scheduler's configuration states."""
    kinds = ("scaled_linear", "linear", "squaredcos_cap_v2")
    kind = config.get("beta_schedule", "scaled_linear")
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if str(config.get("_class_name")).startswith("EDM"):
        raise BadCheckpoint(f"its scheduler, {config['_class_name']}, is for networks in EDM's form: not supported")
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        raise BadCheckpoint("its scheduler gives the network ln(σ)/4 as its clock (timestep_type): not supported")
    try:
        if config.get("trained_betas") is not None:
            return from_betas(config["trained_betas"], zero_snr=zero_snr)
        if kind not in kinds:
            raise BadCheckpoint(f"noise schedule {kind!r} is not supported; there are {', '.join(kinds)}")
        start, end = float(config.get("beta_start", 0.00085)), float(config.get("beta_end", 0.012))
        levels = int(config.get("num_train_timesteps", 1000))
        if not 1 < levels <= MAX_LEVELS:
            raise BadCheckpoint(f"a noise schedule of {levels} levels; 2 to {MAX_LEVELS} are supported")
        if kind == "squaredcos_cap_v2":
            return cosine(steps=levels, zero_snr=zero_snr)
        return (scaled_linear if kind == "scaled_linear" else linear)(start, end, levels, zero_snr)
    except (ValueError, TypeError, OverflowError) as e:
        raise BadCheckpoint(f"the scheduler's configuration is damaged: {e}") from None


PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def parameterization(
    config: Json, probe: Callable[[], tuple[str, str]] | None = None, usual: str = "eps"
) -> tuple[Parameterization, str]:
    """What the network's output means, and why that is known.

    Args:
        config: the scheduler's; if it does not say, ``probe`` finds out, and else it is the family's usual one.
    """
    stated = config.get("prediction_type")
    if stated is not None:
        if stated not in PREDICTIONS:
            raise BadCheckpoint(f"prediction type {stated!r} is not supported; there are {', '.join(PREDICTIONS)}")
        name, why = PREDICTIONS[stated], "stated in the configuration"
    elif probe is not None:
        name, why = probe()
    else:
        name, why = usual, "this family's usual one"
    return PARAMETERIZATIONS[name], f"{name}: {why}"


def probe(network: nn.Module, level: NoiseLevel, channels: int, conditioning: Mapping[str, Tensor]) -> tuple[str, str]:
    """Tell eps from v by one call on pure noise, which at this level is nearly all of x.

    A network that predicts the noise gives x back; one that predicts v = α·eps − σ·x0 does not.
    """
    x = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out = network(x, torch.tensor([float(level.t)]), **conditioning)
    alike = float(torch.corrcoef(torch.stack([x.flatten(), out.flatten()]))[0, 1])
    name = "eps" if alike > 0.5 else "v"
    return name, f"on pure noise the output correlates by {alike:.2f} with the input"


def assemble(
    model: Published,
    name: str,
    family: str,
    network: nn.Module,
    vae: AnyAutoencoder,
    prediction: str,
    facts: Mapping[str, str] | None = None,
    **own: Any,
) -> Model:
    """The record of a model over an autoencoder's latents: what all recipes fill alike, and their ``own`` fields.

    Args:
        prediction: what the network's output means, and why that is known.
        facts: more for the card.
        own: fields of ``Model``.
    """
    factor = vae.config.factor
    return Model(
        name=name,
        family=family,
        path=model.path,
        hash=model.fingerprint(),
        network=network,
        decode=decoder(vae),
        encode_picture=encoder(vae),
        card={**card(model, prediction), **(facts or {})},
        **{"channels": vae.config.latent_channels, "factor": factor, "multiple": factor, **own},
    )


def assemble_unet(
    model: Published,
    name: str,
    family: str,
    network: SDUNet,
    vae: AnyAutoencoder,
    prediction: str,
    usual: tuple[int, float, int],
    **own: Any,
) -> Model:
    """``assemble`` for a U-Net under a discrete noise schedule.

    Args:
        usual: steps, guidance scale and side in pixels where neither request nor files name any.
    """
    scheduler = model.configs.get("scheduler", {})
    steps, guidance, pixels = usual
    shared: dict[str, Any] = {
        "schedule": schedule(scheduler),
        "inpaints": inpaints(model, network.config.in_channels, vae),
        "max_pixels": 1 << 22,
        "situate": lambda width, height, guidance: embedded_guidance(network, guidance),
        "distilled": network.config.guidance_dim > 0,
        "spacings": spacings(scheduler),
        "defaults": usual_unet(scheduler, network, steps, guidance, side(model.config("unet"), vae, pixels)),
    }
    return assemble(model, name, family, network, vae, prediction, left_out(scheduler), **{**shared, **own})


def matched(reports: Mapping[str, LoadReport]) -> dict[str, str]:
    """What share of a model's tensors found its place and, of components where some did not, which."""
    loaded = sum(len(r.loaded) for r in reports.values())
    wanted = loaded + sum(len(r.missing) + len(r.misshaped) for r in reports.values())
    gaps = {f"{c}'s gaps": str(r) for c, r in reports.items() if r.matched < 1 or r.extra}
    return {"matched": f"{100 * loaded / max(1, wanted):.4g}% of {wanted} tensors", **gaps}


def card(model: Published, prediction: str) -> dict[str, str]:
    """What ``sfumato info`` tells of a published model."""
    return {
        "form": model.form,
        **model.why,
        "prediction": model.why.get("prediction", prediction),
        **matched(model.reports),
        "stored as": model.dtypes,
        "parameters": f"{model.parameters / 1e6:.1f} M",
        "size": f"{model.size / 2**20:.0f} MiB",
    }


def usual_spacing(config: Json) -> str:
    """The timestep spacing that a scheduler's configuration states."""
    for spacing in ("karras", "exponential", "beta"):
        if config.get(f"use_{spacing}_sigmas"):
            return spacing
    spacing = config.get("timestep_spacing", "leading")
    return spacing if spacing in ("leading", "trailing", "linspace") else "leading"


def spacings(config: Json) -> Callable[[int, int], Mapping[str, Mapping[str, float]]]:
    """The settings of spacings that a scheduler's configuration states, at any size of picture."""
    return lambda width, height: {"leading": {"offset": float(config.get("steps_offset", 0))}}


def left_out(config: Json) -> dict[str, str]:
    """What a scheduler's configuration states for its sampler that no request here does, for the card."""
    names = [name for name in ("clip_sample", "thresholding") if config.get(name)]
    return {"not followed": f"the scheduler's {' and '.join(names)}: samples stay as they are"} if names else {}


def few_steps(config: Json) -> bool:
    """Whether a model is distilled to few steps without guidance: published so, with trailing spacing and no v."""
    plain = config.get("prediction_type", "epsilon") == "epsilon" and not config.get("rescale_betas_zero_snr")
    return plain and config.get("timestep_spacing") == "trailing"


def row(values: Sequence[float]) -> Tensor:
    """One row (1, n) of conditioning."""
    return torch.tensor([list(values)], dtype=torch.float32)


def same_rows(prompts: Sequence[str], *towers: Tower) -> list[tuple[Tensor, Tensor]]:
    """Ids and weights for several towers, with as many chunks for each."""
    rows = max(t.ids(prompts)[0].shape[1] for t in towers)
    return [t.ids(prompts, rows) for t in towers]


def side(config: Json, vae: AnyAutoencoder, usual: int) -> int:
    """The side in pixels for which a network was trained: its ``sample_size``, if that is stated and whole."""
    size = config.get("sample_size")
    return size * vae.config.factor if isinstance(size, int) and size > 0 else usual


def check_width(model: Published, what: str, wanted: int, given: int) -> None:
    """Refuse a denoiser that is told words, or their pooled vectors, of another width than its towers give."""
    if wanted != given:
        raise BadCheckpoint(f"{model.path}: its denoiser takes {what} of width {wanted}, its text towers give {given}")


def check_context(model: Published, network: SDUNet, given: int) -> None:
    """Refuse a U-Net some of whose resolutions are told words of another width than its towers give."""
    for width in set(network.config.context_dim):
        check_width(model, "words", width, given)


def check_latents(model: Published, channels: int, vae: AnyAutoencoder) -> None:
    """Refuse a denoiser that takes other than noisy latents."""
    latents = vae.config.latent_channels
    if channels != latents:
        raise BadCheckpoint(f"{model.path}: its denoiser takes {channels} channels, its autoencoder makes {latents}")


def inpaints(model: Published, channels: int, vae: AnyAutoencoder) -> bool:
    """Whether a U-Net takes a mask and a masked picture beside noisy latents; BadCheckpoint if it takes neither."""
    if channels == 2 * vae.config.latent_channels + 1:
        return True
    check_latents(model, channels, vae)
    return False
