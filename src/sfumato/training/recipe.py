"""Recipes: small YAML files over frozen dataclasses, strict in every key and type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sfumato.config import from_dict, to_dict
from sfumato.data.config import DataConfig
from sfumato.errors import BadData
from sfumato.families.clip import TwoTowersConfig
from sfumato.families.native import NativeConfig
from sfumato.networks.compact import CompactConfig, PreviewConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """How levels are drawn and errors weighted: times ``uniform`` or ``logit-normal``; weight ``none``, ``min-snr``."""

    times: str = "uniform"
    mean: float = 0.0
    deviation: float = 1.0
    weight: str = "none"
    gamma: float = 5.0


@dataclass(frozen=True)
class LatentRecipe:
    """What a latent denoiser starts from; paths are read from the recipe's folder.

    Args:
        autoencoder: file of a trained autoencoder; given, ``model.autoencoder`` is its shape.
        text: file that holds a trained text tower of ``model.text``'s shape; left out, it is trained from nothing.
        freeze_text: whether that tower stays as it is.
        denoiser: file of a model whose denoiser is the warm start; experts that it lacks start at zero.
        preview: file of a trained ``task: decoder``; given, ``model.preview`` is its shape.
        align: weight of the alignment of the states after layer ``align_layer`` with a pretrained network's features
            of the clean picture (REPA, 2410.06940), up to the share ``align_until`` of the run (HASTE, 2505.16792).
        perceptual: weight of LPIPS between the decoded prediction of x0 and the picture, at levels up to the share
            ``perceptual_until`` of the schedule's range, from its clean end (2401.00110 has the idea, without a
            decoder); ``perceptual_net``: ``alex`` or ``vgg``.
    """

    autoencoder: str = ""
    text: str = ""
    freeze_text: bool = True
    denoiser: str = ""
    preview: str = ""
    align: float = 0.0
    align_layer: int = 3
    align_until: float = 1.0
    perceptual: float = 0.0
    perceptual_until: float = 0.7
    perceptual_net: str = "alex"

    def __post_init__(self) -> None:
        if self.perceptual_net not in ("alex", "vgg"):
            raise BadData(f"recipe: latents.perceptual_net is alex or vgg, not {self.perceptual_net!r}")
        if self.perceptual and not self.autoencoder:
            raise BadData("recipe: latents.perceptual looks at decoded pictures: it needs latents.autoencoder")


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights move: linear warm-up, a plateau, then a linear fall to zero over the last ``decay`` share of steps.

    Args:
        name: ``adamw``, or ``muon`` for the hidden matrices with AdamW for all else.
        rate: AdamW's learning rate; ``muon_rate``: Muon's, per unit of a matrix's root-mean-square size.
        clip: largest gradient norm.
        slow: beginning of parameters' names → their share of ``rate``, for what was trained before; never by Muon.
    """

    name: str = "adamw"
    slow: Mapping[str, float] = field(default_factory=dict)
    muon_rate: float = 0.02
    momentum: float = 0.95
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 100
    decay: float = 0.5
    clip: float = 1.0


@dataclass(frozen=True)
class AutoencoderLoss:
    """Weights of an autoencoder's losses beside the mean absolute error.

    Args:
        square: of the squared error; ``perceptual``: of LPIPS; ``kl``: of the divergence per latent number.
        adversarial: of the discriminator's opinion, from the share ``adversarial_from`` of the run on; 0: none.
        noise: most that latents get beside their own noise in training, as a share of their deviation.
    """

    square: float = 1.0
    perceptual: float = 0.2
    kl: float = 1e-3
    adversarial: float = 0.0
    adversarial_from: float = 0.6
    noise: float = 0.0


@dataclass(frozen=True)
class AutoencoderRecipe:
    """What ``task: autoencoder`` trains, on pictures of ``size`` pixels per side.

    Args:
        start: file of an autoencoder of the network's shape, to start from; read from the recipe's folder.
    """

    size: int = 64
    network: CompactConfig = field(default_factory=CompactConfig)
    loss: AutoencoderLoss = field(default_factory=AutoencoderLoss)
    start: str = ""

    def __post_init__(self) -> None:
        if self.size % self.network.factor:
            raise ValueError(f"autoencoder: size {self.size} is not a multiple of the factor {self.network.factor}")


@dataclass(frozen=True)
class DecoderRecipe:
    """What ``task: decoder`` trains: a decoder of the latents of ``latents.autoencoder``.

    Args:
        size: side of the pictures in pixels.
        network: a small one, for previews; null: the autoencoder's own goes on learning, its encoder as it is.
        blocks: residual blocks per resolution of the autoencoder's own decoder, the new ones starting as the identity;
            null: as many as it has.
        square, perceptual: weights of the squared error and of LPIPS beside the mean absolute error.
        noise: largest share of noise in the latents: a look on the way must bear what is not yet clean.
        model: file of a model on these latents; given, every other picture comes from latents that it drew back, in
            ``steps``, from a share of the way to noise that lies within ``strength``.
    """

    size: int = 64
    network: PreviewConfig | None = field(default_factory=PreviewConfig)
    blocks: int | None = None
    square: float = 0.0
    perceptual: float = 0.1
    noise: float = 0.3
    model: str = ""
    strength: tuple[float, float] = (0.3, 0.7)
    steps: int = 8

    def __post_init__(self) -> None:
        if self.blocks is not None and self.network is not None:
            raise BadData("recipe: decoder.blocks is for the autoencoder's own decoder: set decoder.network to null")
        low, high = self.strength
        if not 0 < low <= high <= 1:
            raise ValueError(f"decoder: strength is two shares in (0, 1], the lower first, not {list(self.strength)}")


@dataclass(frozen=True)
class DistillRecipe:
    """What ``task: distill`` trains: a model that draws in few steps what its teacher draws in many.

    Args:
        teacher: file of a model of our own; read from the recipe's folder.
        guidance: at which the teacher is followed; null: its own default. The student is called without.
        steps: that the student takes; ``substeps``: how many of the teacher's each of them stands for.
        adversarial: weight of an adversary's opinion, which looks through the teacher's eyes; 0: there is none.
    """

    teacher: str = ""
    guidance: float | None = None
    steps: int = 4
    substeps: int = 8
    adversarial: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "substeps"):
            if getattr(self, name) < 1:
                raise BadData(f"recipe: distill.{name} must be at least 1, not {getattr(self, name)}")
        if self.guidance is not None and not 1 <= self.guidance < math.inf:
            raise BadData(f"recipe: distill.guidance must be a number of at least 1, not {self.guidance}")
        if not 0 <= self.adversarial < math.inf:
            raise BadData(f"recipe: distill.adversarial must be a number of at least 0, not {self.adversarial}")


@dataclass(frozen=True)
class ClipRecipe:
    """What ``task: clip`` trains.

    Args:
        words: where the table of tokens starts: ``minilm``, a sentence encoder's vectors, or ``random``.
        freeze_words: whether it stays there, and only what widens it is learned.
        text: file that holds a trained text tower of the network's shape, to start from; read from the recipe's folder.
        freeze_text: whether that tower stays as it is, and pictures learn to meet it (LiT, 2111.07991).
        views: how many views of each picture are looked at, itself included; the others are turned, moved, tinted.
    """

    network: TwoTowersConfig = field(default_factory=TwoTowersConfig)
    words: str = "minilm"
    freeze_words: bool = True
    text: str = ""
    freeze_text: bool = False
    views: int = 3

    def __post_init__(self) -> None:
        if self.words not in ("minilm", "random"):
            raise BadData(f"recipe: clip.words is minilm or random, not {self.words!r}")
        if self.freeze_text and not self.text:
            raise BadData("recipe: clip.freeze_text needs the tower that stays, in clip.text")
        if self.views < 1:
            raise BadData(f"recipe: clip.views must be at least 1, not {self.views}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run.

    Args:
        task: what is trained, a name in ``training.tasks.TASKS``; each reads the settings of its own name.
        batch: pictures per step over all ranks; ``accumulate``: into how many parts each rank cuts its share.
        ema: decays of the averages that are kept; the first is the one that is sampled from and shipped.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where this machine multiplies faster in it.
        device: ``cpu``, ``cuda``, or ``auto``.
        parallel: how several ranks share the work: ``ddp``, or ``fsdp`` where the state does not fit in one.
        compile: whether to compile the network's forward and backward passes.
        workers: threads that prepare batches ahead.
        keep: how many checkpoints stay.
        evaluate_every: steps between two evaluations of the averaged weights on held-out pictures, 0: none. Validation
            splits are used where there are any, test splits only where there are none; ``evaluate_n`` captions of
            each, ``evaluate_metrics`` as in ``sfumato evaluate``, ``evaluate_steps`` of the sampler (0: the model's
            default) and ``evaluate_guidance`` (null: the model's default). The figures go to ``log.jsonl``.
        sharded: whether each rank writes what it holds of a checkpoint, for a state that no rank could hold whole
            (torch.distributed.checkpoint, in safetensors); either kind is taken up by any number of ranks.
    """

    name: str = "model"
    task: str = "denoiser"
    autoencoder: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)
    clip: ClipRecipe = field(default_factory=ClipRecipe)
    decoder: DecoderRecipe = field(default_factory=DecoderRecipe)
    distill: DistillRecipe = field(default_factory=DistillRecipe)
    model: NativeConfig = field(default_factory=NativeConfig)
    latents: LatentRecipe = field(default_factory=LatentRecipe)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: int = 64
    steps: int = 1000
    accumulate: int = 1
    ema: tuple[float, ...] = (0.999,)
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    parallel: str = "ddp"
    compile: bool = False
    threads: int = 0
    workers: int = 0
    checkpoint_every: int = 500
    keep: int = 2
    sharded: bool = False
    log_every: int = 20
    grid_every: int = 0
    grid_prompts: tuple[str, ...] = ()
    evaluate_every: int = 0
    evaluate_n: int = 64
    evaluate_metrics: tuple[str, ...] = ("kid",)
    evaluate_steps: int = 0
    evaluate_guidance: float | None = None
    tensorboard: bool = False
    card: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "accumulate", "checkpoint_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise BadData(f"recipe: {name} must be at least 1, not {getattr(self, name)}")
        for name in ("workers", "threads", "grid_every", "evaluate_every", "evaluate_steps", "seed"):
            if getattr(self, name) < 0:
                raise BadData(f"recipe: {name} must not be negative, not {getattr(self, name)}")
        if self.seed >= 1 << 63:
            raise BadData(f"recipe: seed must be below 2^63, not {self.seed}")
        if not self.ema or not all(0 <= decay < 1 for decay in self.ema):
            raise BadData(f"recipe: ema is a list of decays in [0, 1), not {list(self.ema)}")
        for name, choices in (("precision", ("auto", "fp32", "bf16")), ("device", ("auto", "cpu", "cuda")),
                              ("parallel", ("ddp", "fsdp"))):  # fmt: skip
            if getattr(self, name) not in choices:
                raise BadData(f"recipe: {name} is one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.parallel == "fsdp" and self.optimizer.name == "muon":
            raise BadData("recipe: muon needs whole matrices, fsdp cuts them: use adamw, or parallel: ddp")


class _Once(yaml.SafeLoader):
    """Plain YAML in which no key of a mapping comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise yaml.constructor.ConstructorError(problem=f"{twice} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a YAML recipe and apply ``key=value`` overrides.

    Raises BadData for an unreadable file, an unknown key (naming the nearest) or a value of the wrong type.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Once)
    except FileNotFoundError:
        raise BadData(f"no recipe at {path}") from None
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise BadData(f"{path}: not a readable YAML recipe ({str(e).splitlines()[0]})") from None
    if not isinstance(raw, dict):
        raise BadData(f"{path}: a recipe is a mapping of settings, not {type(raw).__name__}")
    return build_recipe(raw, overrides, str(path))


def build_recipe(raw: dict[str, Any], overrides: list[str], where: str) -> Recipe:
    """Build a recipe from plain data and overrides such as ``steps=100`` or ``optimizer.rate=1e-4``."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise BadData(f"{override!r} is not of the form key=value")
        place = raw
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise BadData(f"{key}: {parent} is not a group of settings")
        try:
            place[last] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # such as a date that no calendar has
            raise BadData(f"{override!r}: the value is not readable YAML") from None
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(own := model.get("defaults") or {}, dict):
        side = model.get("size", NativeConfig().size)
        raw = {**raw, "model": {**model, "defaults": {"width": side, "height": side, **own}}}
    return from_dict(Recipe, _over(to_dict(Recipe()), raw), where)


def _over(before: Mapping[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """Lay settings over the defaults, group by group: a recipe says what differs."""
    old = {k: v for k, v in before.items() if isinstance(v, Mapping)}
    return {**before, **{k: _over(old[k], v) if isinstance(v, dict) and k in old else v for k, v in raw.items()}}
