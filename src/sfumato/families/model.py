"""What a loaded model is: a network and the recipe around it, in one small record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn

from sfumato.diffusion.parameterizations import Parameterization
from sfumato.diffusion.schedules import Schedule
from sfumato.families.additions import Ingredient
from sfumato.text.spelling import Word

if TYPE_CHECKING:
    from PIL import Image

# What a network is told besides x and the clock: keyword → tensor with the batch first.
Conditioning: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class Defaults:
    """The settings a request gets where it names none; every family states its own."""

    sampler: str = "dpmpp-2m"
    spacing: str = "trailing"
    steps: int = 20
    guidance: float = 3.0
    width: int = 32
    height: int = 32
    upscale: int = 1


@dataclass(frozen=True)
class Guide:
    """How a network is told of pictures beside the words.

    Args:
        tell: (RGB pictures, a scale for each) → conditioning: one row, or two of which the second is for calls without
            the words.
        sized: whether it wants them at the size that is made, and not as they are.
        count: how many pictures it wants.
        scale: the conditioning, a number for each picture, that is 0 in steps where that picture does not count.
    """

    tell: Callable[[Sequence[Image.Image], Sequence[float]], Conditioning]
    sized: bool
    count: int = 1
    scale: str = ""


def _nothing(width: int, height: int, guidance: float) -> Conditioning:
    return {}


def _no_words(prompt: str) -> list[Word]:
    return []


def _all_fit(prompt: str) -> int:
    return 0


def _no_settings(width: int, height: int) -> Mapping[str, Mapping[str, float]]:
    return {}


@dataclass(frozen=True)
class Model:
    """A denoiser with all that turns words into its input and its output into pictures.

    Args:
        name: what the user called it; ``path`` is the file or folder it came from, ``hash`` identifies its
            weights: the file's SHA-256, or a published model's fingerprint.
        network: ``network(x, clock, **conditioning)`` with x (B, C, H, W) and clock (B,); returns (B, C, H, W).
        encode: prompts → conditioning; the empty prompt is the unconditional one.
        words: prompt → its words, each with the columns of ``context`` that hold it; none where no words are told.
        truncated: prompt → how many of its tokens do not fit, and are left out.
        decode: denoised x (B, C, H, W) → pictures (B, 3, H·factor, W·factor) in [−1, 1].
        preview: a quicker and rougher ``decode`` for steps on the way; None if the model has none.
        guides: how the network is told of pictures beside the words, by the request's field that holds the picture.
        encode_picture: the way back, without noise; None if the model has no encoder.
        channels, factor: shape of x: C, and pixels per side of one of its cells.
        multiple: a picture's sides must be multiples of this many pixels.
        max_pixels: largest width × height the family is fit for.
        situate: (width, height, guidance) → one row of conditioning that goes with the words, for networks that are
            told the picture's size or the guidance scale.
        spacings: (width, height) → settings of timestep spacings, by the spacing's name.
        critic: (uint8 pictures (B, 3, H, W), prompt) → how well each fits it (B,), by which ``best_of`` chooses.
        inpaints: the network is told what to repaint: conditioning ``picture`` (B, 1 + C, H, W) holds the mask, 1 where
            to repaint, and the encoded picture that is grey there.
        distilled: the network itself was trained to follow the guidance scale, which it is told by ``situate``: there
            is no second call without the words.
        card: what is known of the model's origin, for ``sfumato info``.
        ingredients: the files beside the model that it was made of, for its pictures to keep.
    """

    name: str
    family: str
    path: Path
    hash: str
    network: nn.Module
    encode: Callable[[list[str]], Conditioning]
    decode: Callable[[Tensor], Tensor]
    schedule: Schedule
    parameterization: Parameterization
    channels: int = 3
    factor: int = 1
    multiple: int = 8
    max_pixels: int = 1 << 16
    words: Callable[[str], list[Word]] = _no_words
    truncated: Callable[[str], int] = _all_fit
    situate: Callable[[int, int, float], Conditioning] = _nothing
    spacings: Callable[[int, int], Mapping[str, Mapping[str, float]]] = _no_settings
    distilled: bool = False
    preview: Callable[[Tensor], Tensor] | None = None
    encode_picture: Callable[[Tensor], Tensor] | None = None
    critic: Callable[[Tensor, str], Tensor] | None = None
    inpaints: bool = False
    guides: Mapping[str, Guide] = field(default_factory=dict)
    defaults: Defaults = field(default_factory=Defaults)
    card: Mapping[str, str] = field(default_factory=dict)
    ingredients: tuple[Ingredient, ...] = ()

    @property
    def takes_pictures(self) -> bool:
        """Whether it can start from a picture."""
        return self.encode_picture is not None

    @property
    def guide_counts(self) -> dict[str, int]:
        """How many pictures it follows beside the words, by the request's field that holds them."""
        return {name: guide.count for name, guide in self.guides.items()}

    @property
    def has_critic(self) -> bool:
        """Whether it can choose among its pictures."""
        return self.critic is not None
