"""What a user may ask for: the one schema that command line, JSON and web form derive from."""

from __future__ import annotations

import numbers
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from sfumato.errors import BadRequest, nearest

if TYPE_CHECKING:
    from sfumato.families.model import Model

MAX_SEED = 2**53 - 1  # the largest whole number that JSON keeps exact everywhere
MAX_PICTURES = 100
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_RATIO = 1e6  # of noise to signal
MAX_TEXT = 10_000  # characters


def _setting(default: Any, help: str, metavar: str, *flags: str) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar, "flags": flags})


@dataclass(frozen=True)
class Request:
    """Everything that decides the pixels of a picture, besides the model; None asks for the model's default.

    Picture i of n is the picture of seed + i alone: the same pixels as a request with that seed and n = 1.
    """

    prompt: str = field(metadata={"help": "what the picture should show", "metavar": "PROMPT", "flags": ()})
    negative: str = _setting("", "what it should not show", "TEXT", "--negative")
    seed: int | None = _setting(None, "number that decides the noise (default: random)", "S", "--seed")
    n: int = _setting(1, "number of pictures, of seeds S, S+1, ... (default: 1)", "N", "-n")
    steps: int | None = _setting(None, "steps from noise to picture", "K", "--steps")
    sampler: str | None = _setting(None, "how to step; see `sfumato samplers`", "NAME", "--sampler")
    spacing: str | None = _setting(None, "where to step; see `sfumato samplers`", "NAME", "--spacing")
    guidance: float | None = _setting(None, "how strongly to follow the prompt; 1 = plain", "W", "--guidance")
    guidance_rescale: float = _setting(
        0.0, "0 to 1: how much to take back guidance's contrast (default: 0)", "F", "--guidance-rescale"
    )
    guidance_interval: tuple[float, float] | None = _setting(
        None, "guide only while the noise-to-signal ratio is between these", "LOW,HIGH", "--guidance-interval"
    )
    eta: float | None = _setting(None, "fresh noise per step, 0 to 1, of samplers that take it", "F", "--eta")
    width: int | None = _setting(None, "pixels", "W")
    height: int | None = _setting(None, "pixels", "H")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Request:
        """Build a request from JSON's types; refuses unknown fields and values out of range."""
        names = [f.name for f in fields(cls)]
        for name in settings:
            if name not in names:
                raise BadRequest(f"unknown setting {_show(name)}{nearest(str(name), names)}")
        if "prompt" not in settings:
            raise BadRequest("prompt is missing")
        values = dict(settings)
        if isinstance(values.get("guidance_interval"), list):
            values["guidance_interval"] = tuple(values["guidance_interval"])
        return cls(**values).checked()

    def to_dict(self) -> dict[str, Any]:
        """Give the request as JSON's types; ``from_dict`` is the way back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.guidance_interval, tuple):
            values["guidance_interval"] = list(self.guidance_interval)
        return values

    def checked(self) -> Request:
        """Check all that can be checked without a model, and give numbers their own types.

        Raises BadRequest with one line for the first value that cannot be served.
        """
        interval = self.guidance_interval
        if interval is not None:
            if not isinstance(interval, tuple) or len(interval) != 2:
                raise BadRequest(f"guidance_interval must be two numbers, low and high, not {_show(interval)}")
            low = _real("the lower end of guidance_interval", interval[0], 0.0, MAX_RATIO)
            high = _real("the upper end of guidance_interval", interval[1], 0.0, MAX_RATIO)
            if not low < high:
                raise BadRequest(f"guidance_interval must rise, not {low:g},{high:g}")
            interval = (low, high)
        n = _whole("n", self.n, 1, MAX_PICTURES)
        return replace(
            self,
            prompt=_text("prompt", self.prompt, empty=False),
            negative=_text("negative", self.negative),
            seed=None if self.seed is None else _whole("seed", self.seed, 0, MAX_SEED - (n - 1)),
            n=n,
            steps=None if self.steps is None else _whole("steps", self.steps, 1, MAX_STEPS),
            sampler=None if self.sampler is None else _sampler(self.sampler),
            spacing=None if self.spacing is None else _spacing(self.spacing),
            guidance=None if self.guidance is None else _real("guidance", self.guidance, 0.0, MAX_GUIDANCE),
            guidance_rescale=_real("guidance_rescale", self.guidance_rescale, 0.0, 1.0),
            guidance_interval=interval,
            eta=None if self.eta is None else _real("eta", self.eta, 0.0, 1.0),
            width=None if self.width is None else _whole("width", self.width, 1, 1 << 20),
            height=None if self.height is None else _whole("height", self.height, 1, 1 << 20),
        )

    def resolve(self, model: Model) -> Request:
        """Fill in the model's defaults and a random seed, and check every value.

        Of the result only ``guidance_interval`` (always guide) and ``eta`` (the sampler's own) may be None;
        resolving it again changes nothing. Raises BadRequest with one line for a value that cannot be served.
        """
        default = model.defaults
        request = replace(
            self,
            seed=secrets.randbelow(1 << 32) if self.seed is None else self.seed,
            steps=default.steps if self.steps is None else self.steps,
            sampler=default.sampler if self.sampler is None else self.sampler,
            spacing=default.spacing if self.spacing is None else self.spacing,
            guidance=default.guidance if self.guidance is None else self.guidance,
            width=default.width if self.width is None else self.width,
            height=default.height if self.height is None else self.height,
        ).checked()
        assert request.width is not None
        assert request.height is not None
        _check_size(request.width, request.height, model)
        _check_effect(request, model)
        return request


def _check_size(width: int, height: int, model: Model) -> None:
    unit = model.multiple
    if width % unit or height % unit:
        fit = [max(1, round(side / unit)) * unit for side in (width, height)]
        raise BadRequest(
            f"size {width}x{height} does not fit: model {model.name!r} needs sides that are multiples of {unit}; "
            f"the nearest is {fit[0]}x{fit[1]}"
        )
    if width * height > model.max_pixels:
        side = int((model.max_pixels**0.5) // unit) * unit
        raise BadRequest(
            f"size {width}x{height} is too large: model {model.name!r} makes at most {model.max_pixels} pixels, "
            f"such as {side}x{side}"
        )


def _check_effect(request: Request, model: Model) -> None:
    """Refuse settings that would be ignored."""
    from sfumato.diffusion import find_sampler

    if request.guidance == 1 or model.distilled:
        for name in ("negative", "guidance_rescale", "guidance_interval"):
            if getattr(request, name):
                where = f"with model {model.name!r}" if model.distilled else "at guidance 1"
                raise BadRequest(f"{name} has no effect {where}: leave it out")
    if request.eta is not None and "eta" not in find_sampler(str(request.sampler)).settings:
        raise BadRequest(f"sampler {request.sampler!r} takes no eta; ddim does")


def _sampler(name: Any) -> str:
    from sfumato.diffusion import find_sampler

    found = find_sampler(_name("sampler", name)).name
    if found == "ddim-inversion":
        raise BadRequest("sampler 'ddim-inversion' goes from a picture to noise and makes no picture from words")
    return found


def _spacing(name: Any) -> str:
    from sfumato.diffusion import find_spacing

    return find_spacing(_name("spacing", name)).name


def _name(what: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 100:
        raise BadRequest(f"{what} must be a name, not {_show(value)}; see `sfumato samplers`")
    return value


def _whole(what: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise BadRequest(f"{what} must be a whole number from {low} to {high}, not {_show(value)}")
    return int(value)


def _real(what: str, value: Any, low: float, high: float) -> float:
    fits = isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]
    if not fits:
        raise BadRequest(f"{what} must be a number from {low:g} to {high:g}, not {_show(value)}")
    return float(value)


def _text(what: str, value: Any, empty: bool = True) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{what} must be text, not {_show(value)}")
    if not empty and not value.strip():
        raise BadRequest(f"{what} is empty: say what the picture should show")
    if len(value) > MAX_TEXT:
        raise BadRequest(f"{what} has {len(value)} characters; at most {MAX_TEXT} are taken")
    for c in value:
        if (c < " " and c not in "\n\r\t") or c == "\x7f" or "\ud800" <= c <= "\udfff":
            raise BadRequest(f"{what} holds a character that is no text: {c!a}")
    return value


def _show(value: Any) -> str:
    """A value as it fits in one line."""
    if isinstance(value, int) and abs(value) > 10**40:
        return "a number of more than 40 digits"
    text = repr(value) if isinstance(value, (str, int, float, type(None), tuple, list)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
