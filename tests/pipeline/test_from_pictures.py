"""Pictures made from pictures: image to image, inpainting, outpainting, variations, mixed prompts, hires."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_request import png

from sfumato.diffusion import SAMPLERS, SPACINGS, Step, q_sample, slerp
from sfumato.errors import BadRequest
from sfumato.families.model import Model
from sfumato.pipeline.canvas import canvas_of, cover
from sfumato.pipeline.noise import start
from sfumato.pipeline.picture import Picture, grid
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.request import Request

WORDS = "a red apple"
MAKERS = [name for name in SAMPLERS if name != "ddim-inversion"]


def encoded(pixels: Any) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "PNG")
    return file.getvalue()


def noise_picture(height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def half_mask(height: int = 16, width: int = 16) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 255
    return mask


def events(pipe: Pipeline, **settings: Any) -> tuple[list[Step], list[Picture]]:
    made = list(pipe.run(Request(**{"prompt": WORDS, "seed": 5, **settings})))
    return [e for e in made if isinstance(e, Step)], [e for e in made if isinstance(e, Picture)]


class Truth(torch.nn.Module):
    """A flow network that always sees one picture: out = ε − x0, for x = (1 − t)·x0 + t·ε."""

    def __init__(self, x0: torch.Tensor):
        super().__init__()
        self.x0 = torch.nn.Parameter(x0, requires_grad=False)

    def forward(self, x: torch.Tensor, clock: torch.Tensor, **words: torch.Tensor) -> torch.Tensor:
        return (x - self.x0) / clock[:, None, None, None]


class Spy(torch.nn.Module):
    """A network that remembers what it is given."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor, clock: torch.Tensor, **words: torch.Tensor) -> torch.Tensor:
        self.seen.append((x, clock))
        return self.network(x, clock, **words)


@pytest.mark.parametrize("strength", [1.0, 0.75, 0.5, 0.1])
def test_image_to_image_starts_from_the_picture_at_a_level(tiny: Model, strength: float) -> None:
    spy, given = Spy(tiny.network), noise_picture()
    pipe = Pipeline(replace(tiny, network=spy))
    steps, _ = events(pipe, init=encoded(given), strength=strength, steps=8, guidance=1.0)
    x0 = torch.from_numpy(given).permute(2, 0, 1)[None] / 127.5 - 1
    noise = torch.from_numpy(start([5], (3, 16, 16)))
    path = SPACINGS["trailing"](tiny.schedule, 8).last(strength)
    x, clock = spy.seen[0]
    torch.testing.assert_close(x, q_sample(x0, noise, path[0]))
    assert float(clock) == pytest.approx(strength)  # of a flow, whose time is the share of noise
    assert len(steps) == len(path) - 1 == int(np.ceil(8 * strength))
    assert pipe.steps(Request(WORDS, init=encoded(given), strength=strength, steps=8)) == len(steps)  # type: ignore[arg-type]


def test_a_little_strength_changes_a_picture_little(tiny: Model) -> None:
    pipe, given = Pipeline(tiny), noise_picture()
    far = [np.abs(p.pixels.astype(int) - given).mean() for s in (0.01, 0.3, 0.9)
           for p in events(pipe, init=encoded(given), strength=s)[1]]  # fmt: skip
    assert far == sorted(far)
    assert far[0] < 3


@pytest.mark.parametrize("sampler", MAKERS)
def test_what_a_mask_leaves_alone_stays_to_the_bit(tiny: Model, sampler: str) -> None:
    given, mask = noise_picture(), half_mask()
    steps, [picture] = events(Pipeline(tiny), init=encoded(given), mask=encoded(mask), sampler=sampler, steps=5)
    assert np.array_equal(picture.pixels[:, :8], given[:, :8])
    assert not np.array_equal(picture.pixels[:, 8:], given[:, 8:])
    x0 = torch.from_numpy(given).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(steps[-1].x[..., :8], x0[..., :8])
    if not SAMPLERS[sampler].stochastic:
        noise = torch.from_numpy(start([5], (3, 16, 16)))
        for step in steps:
            expected = q_sample(x0, noise, step.level)
            torch.testing.assert_close(step.x[..., :8], expected[..., :8], atol=2e-4, rtol=1e-4)


def test_a_white_mask_is_no_mask_and_strength_one_forgets(tiny: Model) -> None:
    pipe, white = Pipeline(tiny), encoded(np.full((16, 16), 255))
    init = encoded(noise_picture())
    for strength in (0.5, 0.8):
        [plain] = events(pipe, init=init, strength=strength)[1]
        [masked] = events(pipe, init=init, strength=strength, mask=white)[1]
        assert np.array_equal(plain.pixels, masked.pixels)
    [words] = events(pipe)[1]
    assert np.array_equal(events(pipe, init=init, mask=white)[1][0].pixels, words.pixels)


def test_grey_in_a_mask_mixes(tiny: Model) -> None:
    given, mask = noise_picture(), half_mask()
    hard = events(Pipeline(tiny), init=encoded(given), mask=encoded(mask))[1][0].pixels
    mask[:, 8:10] = 64
    soft = events(Pipeline(tiny), init=encoded(given), mask=encoded(mask))[1][0].pixels
    share = 64 / 255
    expected = np.round(share * hard[:, 8:10].astype(float) + (1 - share) * given[:, 8:10])
    assert np.abs(soft[:, 8:10] - expected).max() <= 1
    assert np.array_equal(soft[:, 10:], hard[:, 10:])


def test_outpainting_keeps_the_picture_in_its_place(tiny: Model) -> None:
    given = noise_picture(12, 14)
    _, [picture] = events(Pipeline(tiny), init=encoded(given), outpaint=(2, 4, 6, 0))
    assert picture.pixels.shape == (16, 22, 3)
    assert np.array_equal(picture.pixels[4:, 2:16], given)
    canvas = canvas_of(Request(WORDS, init=encoded(given), outpaint=(2, 4, 6, 0)).resolve(tiny), tiny)  # type: ignore[arg-type]
    assert canvas is not None
    assert np.array_equal(canvas.pixels[0, 0], given[0, 0])
    assert canvas.mask is not None
    assert canvas.mask.sum() == 16 * 22 - 12 * 14


def test_a_picture_from_a_picture_is_the_same_in_any_batch_and_slot(tiny: Model) -> None:
    settings = {"init": encoded(noise_picture()), "mask": encoded(half_mask()), "sampler": "dpmpp-sde", "hires": None}
    together = events(Pipeline(tiny), **settings, n=3)[1]
    for i, picture in enumerate(together):
        [alone] = events(Pipeline(tiny), **settings | {"seed": 5 + i})[1]
        assert np.array_equal(picture.pixels, alone.pixels)
        assert picture.request == alone.request


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.zeros((16, 16)), "the mask is all black: paint white"),
        (np.full((16, 12), 255), "the mask is 12x16, but the picture 16x16"),
    ],
)
def test_masks_that_cannot_be_are_refused_at_once(tiny: Model, mask: np.ndarray, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        Pipeline(tiny).run(Request(WORDS, init=encoded(noise_picture()), mask=encoded(mask)))  # type: ignore[arg-type]


def test_strokes_on_a_transparent_layer_are_the_mask(tiny: Model) -> None:
    """As editors save them; the rest is left alone, and that transparency was read so is said."""
    layer = np.zeros((16, 16, 4), np.uint8)
    layer[4:8, 4:8] = 255
    grey = np.zeros((16, 16), np.uint8)
    grey[4:8, 4:8] = 255
    settings: dict[str, Any] = {"init": encoded(noise_picture()), "steps": 2}
    strokes, plain = (events(Pipeline(tiny), mask=encoded(m), **settings)[1][0] for m in (layer, grey))
    assert np.array_equal(strokes.pixels, plain.pixels)
    assert strokes.warnings == ("mask: transparency laid on black",)
    assert plain.warnings == ()


def test_pillow_images_of_any_mode_are_taken_and_turned_as_files_are(tiny: Model, tmp_path: Path) -> None:
    photo = Image.fromarray(noise_picture(16, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "me.jpg", exif=exif, quality=95)
    by_path, by_image = (
        Request(WORDS, init=init).resolve(tiny) for init in (tmp_path / "me.jpg", Image.open(tmp_path / "me.jpg"))
    )
    assert by_path.size == by_image.size == (16, 24)
    pixels = [np.asarray(r.init.image("init")) for r in (by_path, by_image) if r.init is not None]
    assert np.array_equal(*pixels)
    steps = {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "F": ("L", "F"), "I": ("L", "I")}
    for mode in ("CMYK", "HSV", "YCbCr", "LAB", "F", "La", "RGBa", "1", "P", "I"):
        image = photo
        for step in steps.get(mode, (mode,)):
            image = image.convert(step)
        assert Request(WORDS, init=image).resolve(tiny).size == (24, 16), mode


def test_an_enlargement_that_rounds_to_nothing_is_refused(tiny: Model) -> None:
    with pytest.raises(BadRequest, match="leaves 16x16 as it is") as caught:
        Request(WORDS, hires=1.01).resolve(tiny)
    least = float(str(caught.value).rpartition("take ")[2].partition(" ")[0])
    assert max(Request(WORDS, hires=least).resolve(tiny).enlarged(tiny.multiple)) > 16


def test_a_size_asked_for_is_covered_without_distortion(tiny: Model) -> None:
    given = np.zeros((20, 40, 3), np.uint8)
    given[:, 10:30] = 200  # the middle square
    request = Request(WORDS, init=encoded(given), width=16, height=16).resolve(tiny)  # type: ignore[arg-type]
    canvas = canvas_of(request, tiny)
    assert canvas is not None
    assert (canvas.pixels[:, 2:-2] > 190).all()
    assert canvas.told == ("40x20 brought to 16x16",)
    from PIL import Image

    odd = Image.fromarray(noise_picture(17, 19))
    assert np.array_equal(cover(odd, (18, 16), 2), np.asarray(odd)[:16, :18]), "cut, and no pixel changed"


def test_variations_go_along_the_arc_between_two_noises(tiny: Model) -> None:
    pipe = Pipeline(tiny)
    request = Request(WORDS, seed=5, n=2, variation_seed=100, variation_strength=0.25)
    noise = pipe.initial_noise(request)
    a, b = (torch.from_numpy(start([s, s], (3, 16, 16))) for s in (5, 100))
    b[1] = torch.from_numpy(start([101], (3, 16, 16)))[0]
    torch.testing.assert_close(noise, slerp(a, b, 0.25))
    made = [p for p in pipe.run(request) if isinstance(p, Picture)]
    assert [(p.request.seed, p.request.variation_seed) for p in made] == [(5, 100), (5, 101)]
    [alone] = [p for p in pipe.run(made[1].request) if isinstance(p, Picture)]
    assert np.array_equal(alone.pixels, made[1].pixels)
    assert grid(made).request.n == 2
    assert torch.equal(pipe.initial_noise(replace(request, variation_strength=0.0, variation_seed=None))[0], a[0])


def test_mixed_prompts_begin_and_end_at_their_own(tiny: Model) -> None:
    pipe = Pipeline(tiny)

    def last(prompt: str, **settings: Any) -> torch.Tensor:
        return events(pipe, prompt=prompt, **settings)[0][-1].x

    other = "a blue house in the rain"
    a, b = last(WORDS), last(other)
    torch.testing.assert_close(last(WORDS, prompt_to=other, mix=0.0), a, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last(WORDS, prompt_to=other, mix=1.0), b, atol=1e-4, rtol=1e-4)
    middle = last(WORDS, prompt_to=other)
    assert 0.2 * (a - b).norm() < (middle - a).norm() < 1.2 * (a - b).norm()


def test_hires_draws_on_an_enlarged_picture(tiny: Model) -> None:
    [small] = events(Pipeline(tiny), hires=None)[1]
    spy = Spy(tiny.network)
    steps, [large] = events(Pipeline(replace(tiny, network=spy)), hires=1.5, hires_strength=0.5, steps=4)
    assert large.pixels.shape == (24, 24, 3)
    assert [tuple(s.x.shape[-2:]) for s in steps] == [(16, 16)] * 4 + [(24, 24)] * 2
    from PIL import Image

    x0 = torch.from_numpy(np.array(cover(Image.fromarray(small.pixels), (24, 24)))).permute(2, 0, 1) / 127.5 - 1
    x, clock = spy.seen[4]
    noise = (x[0] - (1 - clock[0]) * x0) / clock[0]
    assert float(clock[0]) == 0.5
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 1) < 0.06
    seen_before = torch.from_numpy(start([5], (3, 24, 24)))[0]
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), seen_before.flatten()]))[0, 1])) < 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 3},
        {"width": 32, "height": 24},
        {"init": png(), "strength": 0.5, "n": 2},
        {"hires": 1.5, "hires_strength": 0.75, "n": 2},
        {"hires": 2, "best_of": 2},
    ],
)
def test_a_requests_work_is_what_the_network_is_given(tiny: Model, settings: dict[str, Any]) -> None:
    spy = Spy(tiny.network)
    brightest = replace(tiny, network=spy, critic=lambda pictures, prompt: pictures.float().mean(dim=(1, 2, 3)))
    events(Pipeline(brightest), sampler="ddim", steps=4, guidance=1.0, **settings)
    own = (tiny.defaults.width, tiny.defaults.height)
    request = Request(WORDS, seed=5, sampler="ddim", steps=4, guidance=1.0, **settings).resolve(brightest)
    drawn = sum(x.shape[0] * x.shape[-2] * x.shape[-1] for x, _ in spy.seen)
    assert request.work(own, tiny.multiple) == -(-drawn // (own[0] * own[1]))


def test_the_truth_is_found_from_any_start(tiny: Model) -> None:
    """A network that sees one picture leads there, whatever the strength."""
    target = torch.from_numpy(noise_picture(seed=1)).permute(2, 0, 1)[None] / 127.5 - 1
    pipe = Pipeline(replace(tiny, network=Truth(target)))
    for strength in (0.2, 0.77, 1.0):
        [picture] = events(pipe, init=encoded(noise_picture()), strength=strength, guidance=1.0)[1]
        assert np.abs(picture.pixels.astype(int) - noise_picture(seed=1)).max() <= 1


def test_a_saved_picture_names_what_it_was_made_from(tiny: Model) -> None:
    [picture] = events(Pipeline(tiny), init=png(), strength=0.5)[1]
    assert len(picture.encode()) < len(png()) + 3000
    assert "Denoising strength: 0.5" in picture.parameters()
