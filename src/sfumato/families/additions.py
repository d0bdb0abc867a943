"""What is added to a published model when it is loaded: LoRAs, learned words, other networks, ControlNets, IP-Adapters.

Each is known by its content, so that a picture can say what it was made with and be made again from files that have
moved: ``Ingredient`` is what the picture keeps.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.files import climbs, sha256

if TYPE_CHECKING:
    from sfumato.checkpoints.parts import PartOfModel
    from sfumato.checkpoints.published import Published

NETWORKS = ("denoiser", "vae", "controlnet", "ip_adapter", "image_encoder")
KINDS = ("lora", "embedding", *NETWORKS)
MAX_ADDITIONS = 64
MAX_WEIGHT = 100.0
NOTATION = "()[]\\"  # of weights in prompts

Location: TypeAlias = "str | os.PathLike[str]"
Lora: TypeAlias = "Location | tuple[Location, float]"


@dataclass(frozen=True)
class Ingredient:
    """A file beside the model that a picture was made with.

    Args:
        kind: one of ``KINDS``.
        name: the file's or folder's own name, without where it lay.
        hash: SHA-256 of the file's bytes; of a folder, of its weight files' one after another.
        weight: how strongly a LoRA was applied.
        word: how a learned word is written in prompts.
    """

    kind: str
    name: str
    hash: str
    weight: float | None = None
    word: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Give it as JSON's types, without what does not apply; ``from_dict`` is the way back."""
        return {k: v for k, v in vars(self).items() if v is not None}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Ingredient:
        """Read what ``to_dict`` gave; raises ValueError for anything else."""
        it = cls(**record)
        texts = (it.kind, it.name, it.hash, it.word or "")
        if it.kind not in KINDS or not all(isinstance(t, str) and len(t) < 1000 for t in texts):
            raise ValueError("an ingredient is damaged")
        if it.weight is not None and (isinstance(it.weight, bool) or not isinstance(it.weight, (int, float))):
            raise ValueError("an ingredient's weight is no number")
        return it

    def __str__(self) -> str:
        what = {"embedding": f"embedding {self.word}={self.name}"}.get(self.kind, f"{self.kind} {self.name}")
        return f"{what} × {self.weight:g}" if self.weight is not None else what


@dataclass(frozen=True)
class Additions:
    """Files to add to a model.

    Args:
        loras: each with its weight: 1 as trained, 0 without effect, negative ones take away.
        embeddings: words learned by textual inversion: how each is written in prompts, and its file.
        vae: an autoencoder to use instead of the model's own.
        controlnets: networks that guide the denoiser, each by a control picture of its own.
        denoiser: a denoiser to use instead of the model's own, such as a GGUF file.
        ip_adapter: a network by which the denoiser follows a picture as it follows words.
        image_encoder: the folder of CLIP's tower for pictures that the IP-Adapter goes with; None takes one named
            image_encoder beside its file, or in the model's folder.
    """

    loras: tuple[tuple[Path, float], ...] = ()
    embeddings: Mapping[str, Path] = field(default_factory=dict)
    vae: Path | None = None
    controlnets: tuple[Path, ...] = ()
    denoiser: Path | None = None
    ip_adapter: Path | None = None
    image_encoder: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.loras or self.embeddings or self.networks)

    @property
    def named(self) -> tuple[tuple[str, Path], ...]:
        """The networks' files and folders that were named, each with its kind."""
        one = ((kind, getattr(self, kind)) for kind in NETWORKS if kind != "controlnet")
        several = (("controlnet", path) for path in self.controlnets)
        return tuple((kind, path) for kind, path in (*several, *one) if path is not None)

    @property
    def networks(self) -> tuple[tuple[str, Path], ...]:
        """Those that were named and, if it was not, the image encoder beside an IP-Adapter's file."""
        if self.ip_adapter is not None and self.image_encoder is None:
            beside = self.ip_adapter.parent / "image_encoder"
            if (beside / "config.json").is_file():
                return (*self.named, ("image_encoder", beside))
        return self.named

    @classmethod
    def of(
        cls,
        loras: Sequence[Lora] = (),
        embeddings: Mapping[str, Location] | None = None,
        vae: Location | None = None,
        controlnet: Location | Sequence[Location] = (),
        denoiser: Location | None = None,
        ip_adapter: Location | None = None,
        image_encoder: Location | None = None,
    ) -> Additions:
        """Build it from paths; a LoRA alone has weight 1, ControlNets are one or several.

        Raises BadRequest for what is no path, weight or word.
        """
        if image_encoder is not None and ip_adapter is None:
            raise BadRequest("an image encoder has no effect without an IP-Adapter (--ip-adapter FILE)")
        pairs = [lora if isinstance(lora, tuple) else (lora, 1.0) for lora in loras]
        for path, weight in pairs:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) <= MAX_WEIGHT:
                raise BadRequest(f"the weight of {path} must be a number from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        for word in embeddings or {}:
            if not word or len(word) > 100 or any(c.isspace() or not c.isprintable() or c in NOTATION for c in word):
                raise BadRequest(
                    f"a learned word must be 1 to 100 letters without spaces and without {' '.join(NOTATION)}, "
                    f"which weigh words in prompts, not {word[:100]!r}"
                )
        controls = [controlnet] if isinstance(controlnet, (str, os.PathLike)) else list(controlnet)
        if max(len(pairs), len(embeddings or {}), len(controls)) > MAX_ADDITIONS:
            raise BadRequest(f"at most {MAX_ADDITIONS} files of a kind can be added")
        return cls(
            tuple((Path(path).expanduser(), float(weight)) for path, weight in pairs),
            {word: Path(path).expanduser() for word, path in (embeddings or {}).items()},
            _path(vae),
            tuple(Path(path).expanduser() for path in controls),
            *(_path(path) for path in (denoiser, ip_adapter, image_encoder)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Give it as JSON's types; ``from_dict`` is the way back."""
        networks: dict[str, Any] = {kind: str(path) for kind, path in self.named if kind != "controlnet"}
        return {
            "loras": [[str(path), weight] for path, weight in self.loras],
            "embeddings": {word: str(path) for word, path in self.embeddings.items()},
            "controlnet": [str(path) for path in self.controlnets],
            **networks,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Additions:
        """Read what ``to_dict`` gave."""
        return cls.of(**{**record, "loras": [(path, weight) for path, weight in record["loras"]]})

    def check(self) -> None:
        """Raise BadCheckpoint for a file that is not there, without reading any."""
        for path in (*(p for p, _ in self.loras), *self.embeddings.values(), *(p for _, p in self.networks)):
            _check_there(path)

    def ingredients(self) -> Iterator[Ingredient]:
        """What pictures keep of each file; raises BadCheckpoint for one that cannot be read."""
        for path, weight in self.loras:
            yield Ingredient("lora", path.name, content_hash(path), weight=weight)
        for word, path in self.embeddings.items():
            yield Ingredient("embedding", path.name, content_hash(path), word=word)
        for kind, path in self.networks:
            yield Ingredient(kind, path.name, content_hash(path))

    def apply(self, model: Published, *, allow_pickle: bool = False, partial: bool = False) -> Published:
        """The model with LoRAs, words and other networks; tensors that these leave as they are stay shared.

        Raises BadCheckpoint, naming the file, for what is none, is for another family, or matches nothing.
        """
        from sfumato.checkpoints.lora import add_loras, add_words, read_lora
        from sfumato.checkpoints.parts import (
            read_autoencoder,
            read_controlnet,
            read_denoiser,
            read_image_encoder,
            read_ip_adapter,
        )

        if self.denoiser is not None:  # LoRAs are added to it
            component = next((c for c in ("unet", "transformer") if c in model.configs), "unet")
            part = read_denoiser(self.denoiser, model.configs.get(component, {}), allow_pickle=allow_pickle)
            model = _with(model, component, self.denoiser, part)
        loras = [(read_lora(path, allow_pickle=allow_pickle), weight) for path, weight in self.loras]
        model = add_loras(model, loras, partial=partial)
        for word, path in self.embeddings.items():
            model = add_words(model, path, word, allow_pickle=allow_pickle)
        if self.vae is not None:
            model = _with_autoencoder(model, self.vae, read_autoencoder(self.vae, allow_pickle=allow_pickle))
        for k, path in enumerate(self.controlnets):
            part = read_controlnet(path, allow_pickle=allow_pickle)
            model = _with(model, f"controlnet_{k + 1}" if k else "controlnet", path, part)
        if self.ip_adapter is not None:
            encoder = dict(self.networks).get("image_encoder", model.path / "image_encoder")
            if not encoder.is_dir():
                raise BadCheckpoint(
                    f"{self.ip_adapter}: needs the image encoder that it was trained with: --image-encoder FOLDER"
                )
            adapter = read_ip_adapter(self.ip_adapter, allow_pickle=allow_pickle)
            model = _with(model, "ip_adapter", self.ip_adapter, adapter)
            tower = read_image_encoder(encoder, allow_pickle=allow_pickle)
            model = _with(model, "image_encoder", encoder, tower)
        return model


def _path(location: Location | None) -> Path | None:
    return None if location is None else Path(location).expanduser()


def _with(model: Published, component: str, path: Path, part: PartOfModel) -> Published:
    from sfumato.checkpoints.tensors import non_finite

    if damaged := non_finite(part.tensors):
        raise BadCheckpoint(f"{path}: NaN or infinity in {damaged[0]}, and in {len(damaged) - 1} more tensors")
    configs = {**model.configs, component: part.config}
    if part.scheduler:
        configs["scheduler"] = {**model.configs.get("scheduler", {}), **part.scheduler}
    return replace(
        model,
        configs=configs,
        tensors={**model.tensors, component: part.tensors},
        why={**model.why, **part.why},
        files=(*model.files, *part.files),
    )


def _with_autoencoder(model: Published, path: Path, part: PartOfModel) -> Published:
    """The model with another autoencoder, or only another decoder, for the same latents."""
    own, config = model.config("vae"), dict(part.config)
    if (theirs := config.get("latent_channels", 4)) != (ours := own.get("latent_channels", 4)):
        raise BadCheckpoint(f"{path}: an autoencoder for another family: of {theirs} channels, where {ours} are needed")
    if config["_class_name"] == "AutoencoderKL":  # the denoiser's latents keep their scale
        scales = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
        config |= {k: own[k] for k in scales if k in own and k not in config}
    decodes_alone = config["_class_name"] == "AutoencoderTiny" and not any(
        k.startswith("encoder.") for k in part.tensors
    )
    component = "vae_decoder" if decodes_alone else "vae"
    return _with(model, component, path, replace(part, config=config))


def _check_there(path: Path) -> None:
    if path.is_file() and climbs(path):
        raise BadCheckpoint(f"{path}: a path with '..' in it must end as files of weights do, such as .safetensors")
    if not path.is_file() and not path.is_dir():
        raise BadCheckpoint(f"{path}: {'not a file' if path.exists() else 'no such file'}")


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's weight files' and configuration's."""
    if path.is_dir():
        names = [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", ".json", ".bin") and p.is_file()]
        return hashlib.sha256("".join(content_hash(p) for p in names).encode()).hexdigest()
    _check_there(path)
    try:
        return sha256(path)
    except OSError as e:
        raise BadCheckpoint(f"{path}: {e.strerror or e}") from None
