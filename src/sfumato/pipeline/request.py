"""What a user may ask for: the one schema that command line, JSON and web form derive from."""

from __future__ import annotations

import math
import numbers
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from sfumato.errors import BadRequest, TooLarge, nearest
from sfumato.pipeline.inputs import PictureFile

if TYPE_CHECKING:
    from sfumato.families.model import Model

MAX_SEED = 2**53 - 1  # the largest whole number that JSON keeps exact everywhere
MAX_PICTURES = 100
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_RATIO = 1e6  # of noise to signal
MAX_TEXT = 10_000  # characters
MAX_MARGIN = 1 << 14  # pixels
MAX_HIRES = 8.0
UPSCALES = (1, 4)
MAX_CONTROL = 10.0
STRENGTH, HIRES_STRENGTH, MIX = 0.75, 0.5, 0.5  # where none is asked for; with a mask or margins, strength is 1
NEEDS = {  # settings that would be ignored without another
    "strength": "init",
    "mask": "init",
    "outpaint": "init",
    "variation_seed": "variation_strength",
    "mix": "prompt_to",
    "hires_strength": "hires",
    "control_scale": "control_image",
    "control_range": "control_image",
    "image_prompt_scale": "image_prompt",
}
GUIDES = {  # pictures that a network is told of: their scales, and what a model needs to follow them
    "control_image": ("control_scale", "a ControlNet (--control FILE)"),
    "image_prompt": ("image_prompt_scale", "an IP-Adapter (--ip-adapter FILE)"),
}
SEVERAL = ("control_image", "control_scale", "control_range")  # fields that may hold one for each ControlNet
MAX_GUIDES = 64

T = TypeVar("T")
Range: TypeAlias = "tuple[float, float]"


def _setting(default: Any, help: str, metavar: str, *flags: str) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar, "flags": flags})


@dataclass(frozen=True)
class Request:
    """Everything that decides the pixels of a picture, besides the model; None asks for the model's default.

    Picture i of n is the picture of seed + i alone: the same pixels as a request with that seed and n = 1. Of
    variations, the seed stays and the variation's seed goes on. With ``best_of`` K, picture i is the best of those of
    K seeds from seed + i·K on, and is told under its own seed alone.
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
    init: PictureFile | None = _setting(None, "picture to start from", "PICTURE", "--init")
    strength: float | None = _setting(
        None,
        "above 0, to 1: how much of that picture to make anew (default: 0.75; where a mask says so, all)",
        "F",
        "--strength",
    )
    mask: PictureFile | None = _setting(
        None, "picture as large as that one, white where to repaint; the rest stays", "PICTURE", "--mask"
    )
    outpaint: tuple[int, int, int, int] | None = _setting(
        None, "pixels to paint around that picture", "LEFT,TOP,RIGHT,BOTTOM", "--outpaint"
    )
    variation_seed: int | None = _setting(
        None, "number that decides the other noise of variations (default: random)", "S", "--variation-seed"
    )
    variation_strength: float = _setting(
        0.0, "0 to 1: how far to go from the seed's noise to the other (default: 0)", "F", "--variation-strength"
    )
    prompt_to: str | None = _setting(None, "words to go towards from the prompt", "TEXT", "--prompt-to")
    mix: float | None = _setting(None, "0 to 1: how far to go towards them (default: 0.5)", "F", "--mix")
    hires: float | None = _setting(
        None, "make the picture, enlarge it so many times, and draw its details", "FACTOR", "--hires"
    )
    hires_strength: float | None = _setting(
        None, "above 0, to 1: how much of the enlarged picture to make anew (default: 0.5)", "F", "--hires-strength"
    )
    upscale: int | None = _setting(
        None, "1, or 4 to enlarge the picture at the end by a network for drawings", "FACTOR", "--upscale"
    )
    control_image: PictureFile | tuple[PictureFile, ...] | None = _setting(
        None,
        "picture that the model's ControlNet follows: edges, depth, a pose; again for each further one",
        "PICTURE",
        "--control-image",
    )
    control_scale: float | tuple[float, ...] | None = _setting(
        None, "how closely to follow it, one for all or each (default: 1)", "F", "--control-scale"
    )
    image_prompt: PictureFile | None = _setting(
        None, "picture that the model's IP-Adapter follows as it follows words", "PICTURE", "--image-prompt"
    )
    image_prompt_scale: float | None = _setting(
        None, "how closely to follow it (default: 1)", "F", "--image-prompt-scale"
    )
    best_of: int = _setting(
        1,
        "draw K pictures for each, and keep the one that CLIP finds nearest to the prompt (default: 1)",
        "K",
        "--best-of",
    )
    control_range: tuple[float, float] | tuple[tuple[float, float], ...] | None = _setting(
        None,
        "from and until which share of the steps to follow it, one for all or each (default: 0,1)",
        "START,END",
        "--control-range",
    )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Request:
        """Build a request from JSON's types; refuses unknown fields and values out of range."""
        if not isinstance(settings, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BadRequest("a request must be an object of settings")
        names = [f.name for f in fields(cls)]
        for name in settings:
            if name not in names:
                raise BadRequest(f"unknown setting {_show(name)}{nearest(str(name), names)}", str(name))
        if "prompt" not in settings:
            raise BadRequest("prompt is missing", "prompt")
        return cls(**{key: _tuples(value) for key, value in settings.items()}).checked()

    def to_dict(self, *, pictures: bool = False) -> dict[str, Any]:
        """Give the request as JSON's types; ``from_dict`` is the way back.

        Args:
            pictures: whether the bytes of its pictures go along, as base64; else they are only named.
        """

        def plain(value: Any) -> Any:
            if isinstance(value, PictureFile):
                return value.to_json(pictures)
            return [plain(one) for one in value] if isinstance(value, tuple) else value

        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    def checked(self) -> Request:
        """Check all that can be checked without a model, and give numbers their own types.

        Raises BadRequest with one line for the first value that cannot be served.
        """
        interval = self.guidance_interval
        if interval is not None:
            if not isinstance(interval, tuple) or len(interval) != 2:
                raise BadRequest(
                    f"guidance_interval must be two numbers, low and high, not {_show(interval)}", "guidance_interval"
                )
            low = _real("the lower end of guidance_interval", interval[0], 0.0, MAX_RATIO)
            high = _real("the upper end of guidance_interval", interval[1], 0.0, MAX_RATIO)
            if not low < high:
                raise BadRequest(f"guidance_interval must rise, not {low:g},{high:g}", "guidance_interval")
            interval = (low, high)
        n = _whole("n", self.n, 1, MAX_PICTURES)
        best_of = _whole("best_of", self.best_of, 1, MAX_PICTURES // n)
        last = MAX_SEED - (n * best_of - 1)
        request = replace(
            self,
            prompt=_text("prompt", self.prompt, empty=False),
            negative=_text("negative", self.negative),
            seed=_given(self.seed, lambda v: _whole("seed", v, 0, last)),
            n=n,
            best_of=best_of,
            steps=_given(self.steps, lambda v: _whole("steps", v, 1, MAX_STEPS)),
            sampler=_given(self.sampler, _sampler),
            spacing=_given(self.spacing, _spacing),
            guidance=_given(self.guidance, lambda v: _real("guidance", v, 0.0, MAX_GUIDANCE)),
            guidance_rescale=_real("guidance_rescale", self.guidance_rescale, 0.0, 1.0),
            guidance_interval=interval,
            eta=_given(self.eta, lambda v: _real("eta", v, 0.0, 1.0)),
            width=_given(self.width, lambda v: _whole("width", v, 1, 1 << 20)),
            height=_given(self.height, lambda v: _whole("height", v, 1, 1 << 20)),
            init=_given(self.init, lambda v: PictureFile.of("init", v)),
            strength=_given(self.strength, lambda v: _share("strength", v)),
            mask=_given(self.mask, lambda v: PictureFile.of("mask", v)),
            outpaint=_given(self.outpaint, _margins),
            variation_seed=_given(self.variation_seed, lambda v: _whole("variation_seed", v, 0, last)),
            variation_strength=_real("variation_strength", self.variation_strength, 0.0, 1.0),
            prompt_to=_given(self.prompt_to, lambda v: _text("prompt_to", v, empty=False)),
            mix=_given(self.mix, lambda v: _real("mix", v, 0.0, 1.0)),
            hires=_given(self.hires, _enlargement),
            hires_strength=_given(self.hires_strength, lambda v: _share("hires_strength", v)),
            upscale=_given(self.upscale, _upscale),
            control_image=_one_or_each("control_image", self.control_image, PictureFile.of),
            control_scale=_one_or_each(
                "control_scale", self.control_scale, lambda what, v: _real(what, v, 0.0, MAX_CONTROL)
            ),
            control_range=_ranges("control_range", self.control_range),
            image_prompt=_given(self.image_prompt, lambda v: PictureFile.of("image_prompt", v)),
            image_prompt_scale=_given(
                self.image_prompt_scale, lambda v: _real("image_prompt_scale", v, 0.0, MAX_CONTROL)
            ),
        )
        for name, needed in NEEDS.items():
            if getattr(request, name) is not None and not getattr(request, needed):
                raise BadRequest(f"{name} has no effect without {needed}: give both, or leave it out", name)
        _check_counts(request)
        if request.best_of > 1 and request.prompt_to is not None:
            raise BadRequest("best_of looks for the prompt alone: leave out prompt_to, or best_of", "best_of")
        if request.hires is not None and (request.mask is not None or request.outpaint is not None):
            what = "hires goes with no mask and no margins: paint first, then enlarge the result by init"
            raise BadRequest(what, "hires")
        return request

    def resolve(self, model: Model) -> Request:
        """Fill in the model's defaults and a random seed, and check every value.

        Of the result only ``guidance_interval`` (always guide), ``eta`` (the sampler's own) and the settings of
        pictures, variations and a second prompt that were not asked for may be None; resolving it again changes
        nothing. Raises BadRequest with one line for a value that cannot be served.
        """
        asked, default = self.checked(), model.defaults
        size, strength, variation = (default.width, default.height), asked.strength, asked.variation_seed
        for name in ("init", "hires"):
            if getattr(asked, name) is not None and not model.takes_pictures:
                raise BadRequest(
                    f"{name} cannot be used: model {model.name!r} has no encoder that would turn a picture into "
                    f"what it works on",
                    name,
                )
        if asked.init is not None:
            from sfumato.pipeline.canvas import mask_of, size_for

            if asked.mask is not None:
                mask_of(asked.mask, asked.init, asked.outpaint is not None)
            size = size_for(asked.init, asked.outpaint or (0, 0, 0, 0), model)
            if strength is None:
                strength = STRENGTH if asked.mask is None and asked.outpaint is None else 1.0
        if asked.variation_strength > 0 and variation is None:
            variation = secrets.randbelow(1 << 32)
        request = replace(
            asked,
            seed=secrets.randbelow(1 << 32) if asked.seed is None else asked.seed,
            steps=default.steps if asked.steps is None else asked.steps,
            sampler=default.sampler if asked.sampler is None else asked.sampler,
            spacing=default.spacing if asked.spacing is None else asked.spacing,
            guidance=default.guidance if asked.guidance is None else asked.guidance,
            width=size[0] if asked.width is None else asked.width,
            height=size[1] if asked.height is None else asked.height,
            strength=strength,
            variation_seed=variation,
            upscale=default.upscale if asked.upscale is None else asked.upscale,
            mix=MIX if asked.mix is None and asked.prompt_to is not None else asked.mix,
            hires_strength=HIRES_STRENGTH
            if asked.hires_strength is None and asked.hires is not None
            else asked.hires_strength,
            **{
                scale: 1.0
                for name, (scale, _) in GUIDES.items()
                if getattr(asked, name) is not None and getattr(asked, scale) is None
            },
        ).checked()
        _check_size(*request.size, model)
        if request.hires is not None:
            _check_enlarged(request, model)
        _check_effect(request, model)
        return request

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a resolved request, before ``hires``."""
        assert self.width is not None
        assert self.height is not None
        return self.width, self.height

    def enlarged(self, unit: int) -> tuple[int, int]:
        """Width and height of the picture that ``hires`` makes, in multiples of the model's ``unit``."""
        width, height = (max(1, round(side * (self.hires or 1) / unit)) * unit for side in self.size)
        return width, height

    def rounds(self, unit: int) -> list[tuple[tuple[int, int], float | None]]:
        """Width, height and strength of each round that a resolved request takes: with ``hires`` there is a second."""
        rounds: list[tuple[tuple[int, int], float | None]] = [(self.size, self.strength)]
        if self.hires is not None:
            rounds.append((self.enlarged(unit), self.hires_strength))
        return rounds

    def work(self, own: tuple[int, int], unit: int) -> int:
        """What a resolved request's pictures cost, in steps of one picture of the model's ``own`` size.

        A step costs as its pixels do, which takes attention for as dear as a convolution. ``unit`` is as in `enlarged`.
        """
        assert self.steps is not None
        steps = sum(math.prod(s) * (1.0 if share is None else share) for s, share in self.rounds(unit)) * self.steps
        return max(1, math.ceil(round(self.drawn * steps / math.prod(own), 6)))

    def map_pictures(self, change: Callable[[str, PictureFile], PictureFile]) -> Request:
        """This request with each of its pictures, told by the field's name, put through a function."""

        def changed(name: str) -> Any:
            value = getattr(self, name)
            return tuple(change(name, p) for p in value) if isinstance(value, tuple) else change(name, value)

        return replace(self, **{name: changed(name) for name in PICTURES if getattr(self, name) is not None})

    @property
    def drawn(self) -> int:
        """How many pictures are drawn, of which n are kept."""
        return self.n * self.best_of

    def single(self) -> Request:
        """This request for one picture, without a choice."""
        return replace(self, n=1, best_of=1)

    def nth(self, i: int) -> Request:
        """The request of picture i of a resolved request alone: of the next seed or, of variations, the next one's."""
        return replace(self._from_seed(i * self.best_of), n=1)

    def draw(self, j: int) -> Request:
        """The request of drawn picture j of a resolved request, without the choice."""
        return self._from_seed(j).single()

    def _from_seed(self, offset: int) -> Request:
        if self.variation_strength > 0:
            assert self.variation_seed is not None
            return replace(self, variation_seed=self.variation_seed + offset)
        assert self.seed is not None
        return replace(self, seed=self.seed + offset)


PICTURES = tuple(f.name for f in fields(Request) if str(f.type).startswith("PictureFile"))  # fields that hold one


def each(value: T | Sequence[T] | None, n: int = 1) -> list[T]:
    """The values of a setting that may hold one for each of n, or one for all, or none."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [cast(T, value)] * n


def each_range(value: Range | tuple[Range, ...] | None, n: int) -> list[Range]:
    """The ranges of a setting that may hold one for each of n, or one for all, or none."""
    return each(cast(Any, [value] * n if value and isinstance(value[0], (int, float)) else value))


def _check_counts(request: Request) -> None:
    n = len(each(request.control_image))
    for name, values in (
        ("control_scale", each(request.control_scale, n)),
        ("control_range", each_range(request.control_range, n)),
    ):
        if values and len(values) != n:
            what = f"{name} has {len(values)} values, control_image {_pictures(n)}: give one for each, or one for all"
            raise BadRequest(what, name)


def _pictures(n: int) -> str:
    return f"{n} picture{'s' * (n != 1)}"


def _check_size(width: int, height: int, model: Model) -> None:
    unit = model.multiple
    if width * height > model.max_pixels:
        side = int((model.max_pixels**0.5) // unit) * unit
        raise TooLarge(
            f"size {width}x{height} is too large: model {model.name!r} makes at most {model.max_pixels} pixels, "
            f"such as {side}x{side}",
            "width",
        )
    if width % unit or height % unit:
        fit = [max(1, round(side / unit)) * unit for side in (width, height)]
        raise BadRequest(
            f"size {width}x{height} does not fit: model {model.name!r} needs sides that are multiples of {unit}; "
            f"the nearest is {fit[0]}x{fit[1]}",
            "width" if width % unit else "height",
        )


def _check_enlarged(request: Request, model: Model) -> None:
    unit, size = model.multiple, request.enlarged(model.multiple)
    if size == request.size:
        least = math.floor(100 * (1 + unit / (2 * max(size)))) / 100 + 0.01
        raise BadRequest(
            f"hires {request.hires:g} leaves {size[0]}x{size[1]} as it is, since sides are multiples of {unit}: "
            f"take {least:g} or more",
            "hires",
        )
    _check_size(*size, model)


def _check_effect(request: Request, model: Model) -> None:
    """Refuse settings that would be ignored."""
    from sfumato.diffusion import find_sampler

    if request.guidance == 1 or model.distilled:
        for name in ("negative", "guidance_rescale", "guidance_interval"):
            if getattr(request, name):
                where = f"with model {model.name!r}" if model.distilled else "at guidance 1"
                raise BadRequest(f"{name} has no effect {where}: leave it out", name)
    if request.best_of > 1 and not model.has_critic:
        what = f"best_of cannot be used: model {model.name!r} was loaded without a CLIP to choose by (--critic FILE)"
        raise BadRequest(what, "best_of")
    for name, (_, needed) in GUIDES.items():
        given, wanted = len(each(getattr(request, name))), model.guide_counts.get(name, 0)
        if given and not wanted:
            raise BadRequest(f"{name} has no effect: model {model.name!r} was loaded without {needed}", name)
        if given and given != wanted:
            what = f"{name} has {_pictures(given)}, and model {model.name!r} follows {wanted}: give one for each"
            raise BadRequest(what, name)
    if request.eta is not None and "eta" not in find_sampler(str(request.sampler)).settings:
        raise BadRequest(f"sampler {request.sampler!r} takes no eta; ddim does", "eta")


def _sampler(name: Any) -> str:
    from sfumato.diffusion import find_sampler

    found = _known("sampler", name, find_sampler)
    if found == "ddim-inversion":
        what = "sampler 'ddim-inversion' goes from a picture to noise and makes no picture from words"
        raise BadRequest(what, "sampler")
    return found


def _spacing(name: Any) -> str:
    from sfumato.diffusion import find_spacing

    return _known("spacing", name, find_spacing)


def _given(value: Any, check: Callable[[Any], Any]) -> Any:
    return None if value is None else check(value)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def _one_or_each(what: str, value: Any, check: Callable[[str, Any], T]) -> Any:
    """One value, or a tuple of several, each checked."""
    if not isinstance(value, (list, tuple)):
        return None if value is None else check(what, value)
    if not 1 <= len(value) <= MAX_GUIDES:
        raise BadRequest(f"{what} must be one or up to {MAX_GUIDES}, not {len(value)}", what)
    values = tuple(check(what, one) for one in value)
    return values[0] if len(values) == 1 else values


def _ranges(what: str, value: Any) -> Any:
    """One range, or a tuple of several."""

    def checked(what: str, value: Any) -> Range:
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise BadRequest(f"{what} must be two numbers, start and end, or such pairs, not {_show(value)}", what)
        start, end = (_real(f"an end of {what}", v, 0.0, 1.0) for v in value)
        if not start < end:
            raise BadRequest(f"{what} must rise, not {start:g},{end:g}", what)
        return start, end

    pairs = isinstance(value, (list, tuple)) and any(isinstance(v, (list, tuple)) for v in value)
    return _one_or_each(what, value, checked) if pairs else _given(value, lambda v: checked(what, v))


def _margins(value: Any) -> tuple[int, int, int, int]:
    if not isinstance(value, tuple) or len(value) != 4:
        raise BadRequest(f"outpaint must be four numbers, left, top, right, bottom, not {_show(value)}", "outpaint")
    left, top, right, bottom = (_whole("a margin of outpaint", m, 0, MAX_MARGIN) for m in value)
    if not left + top + right + bottom:
        raise BadRequest("outpaint has no margin above 0: leave it out", "outpaint")
    return left, top, right, bottom


def _enlargement(value: Any) -> float:
    factor = _real("hires", value, 1.0, MAX_HIRES)
    if factor == 1:
        raise BadRequest("hires must be above 1: it says how many times to enlarge the picture", "hires")
    return factor


def _upscale(value: Any) -> int:
    factor = _whole("upscale", value, 1, max(UPSCALES))
    if factor not in UPSCALES:
        raise BadRequest(f"upscale is {' or '.join(map(str, UPSCALES))}, not {factor}", "upscale")
    return factor


def _share(what: str, value: Any) -> float:
    share = _real(what, value, 0.0, 1.0)
    if share == 0:
        raise BadRequest(f"{what} must be above 0: at 0 nothing of the picture would be made anew", what)
    return share


def _known(what: str, value: Any, find: Callable[[str], Any]) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 100:
        raise BadRequest(f"{what} must be a name, not {_show(value)}; see `sfumato samplers`", what)
    try:
        return find(value).name
    except BadRequest as e:
        raise BadRequest(str(e), what) from None


def _whole(what: str, value: Any, low: int, high: int) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not low <= int(value) <= high:
        kind = TooLarge if whole and int(value) > high else BadRequest
        raise kind(f"{what} must be a whole number from {low} to {high}, not {_show(value)}", what.split()[-1])
    return int(value)


def _real(what: str, value: Any, low: float, high: float) -> float:
    fits = isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]
    if not fits:
        raise BadRequest(f"{what} must be a number from {low:g} to {high:g}, not {_show(value)}", what.split()[-1])
    return float(value)


def _text(what: str, value: Any, empty: bool = True) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{what} must be text, not {_show(value)}", what)
    if not empty and not value.strip():
        raise BadRequest(f"{what} is empty: say what the picture should show", what)
    if len(value) > MAX_TEXT:
        raise BadRequest(f"{what} has {len(value)} characters; at most {MAX_TEXT} are taken", what)
    for c in value:
        if (c < " " and c not in "\n\r\t") or c == "\x7f" or "\ud800" <= c <= "\udfff":
            raise BadRequest(f"{what} holds a character that is no text: {c!a}", what)
    return value


def _show(value: Any) -> str:
    """A value as it fits in one line."""
    if isinstance(value, int) and abs(value) > 10**40:
        return "a number of more than 40 digits"
    value = list(value) if isinstance(value, tuple) else value  # as JSON has it
    text = repr(value) if isinstance(value, (str, int, float, type(None), tuple, list)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
