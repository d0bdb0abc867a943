"""What can be trained: one row per task, each a function from a recipe to what the loop runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sfumato.data.pictures import Pictures, load_pictures
from sfumato.data.report import Report
from sfumato.diffusion import find_sampler, find_spacing
from sfumato.errors import BadData, BadRequest, nearest
from sfumato.files import sha256, write_atomically
from sfumato.training.loop import Task
from sfumato.training.progress import Progress
from sfumato.training.recipe import LatentRecipe, Recipe
from sfumato.training.world import World

if TYPE_CHECKING:
    from sfumato.data.latents import Latents
    from sfumato.networks.compact import CompactAutoencoder
    from sfumato.training.denoiser import DenoiserTask

# (side, channels, what sides must be multiples of, or 0: squares only) → the recipe's pictures
Load = Callable[[int, int, int], Pictures]


def _denoiser(recipe: Recipe, load: Load, root: Path, run: Path, world: World) -> Task:
    from sfumato.training.denoiser import DenoiserTask

    model = recipe.model
    try:
        find_sampler(model.defaults.sampler)
        find_spacing(model.defaults.spacing)
    except BadRequest as e:
        raise BadData(f"recipe: model.defaults: {e}") from None
    if recipe.latents.autoencoder:
        return _latent_denoiser(recipe, load, root, run, world)
    if recipe.latents != LatentRecipe():
        raise BadData("recipe: latents needs latents.autoencoder, a trained one; to denoise pixels leave latents out")
    if model.autoencoder is not None or model.preview is not None:
        raise BadData("recipe: model.autoencoder and model.preview go with latents.autoencoder: leave them out")
    return DenoiserTask(recipe, load(model.size, model.denoiser.in_channels, model.multiple), run, world)


def _latent_denoiser(recipe: Recipe, load: Load, root: Path, run: Path, world: World) -> Task:
    from sfumato.families.autoencoder import load_autoencoder
    from sfumato.families.native import read_native
    from sfumato.training.denoiser import DenoiserTask
    from sfumato.training.start import align_features, start_denoiser, start_preview, start_text

    if recipe.latents.align and recipe.data.max_aspect > 1:
        raise BadData("recipe: latents.align goes with squares alone: set data.max_aspect to 1, or latents.align to 0")
    _check_perceptual("latents.perceptual", recipe.latents.perceptual, recipe.latents.perceptual_net, recipe.model.size)
    _check_starts(recipe.latents, root)
    path = root / recipe.latents.autoencoder
    network, hash = load_autoencoder(path), sha256(path)
    if recipe.model.autoencoder != network.config:
        raise BadData(f"recipe: model.autoencoder is {recipe.model.autoencoder}, but {path} holds {network.config}")
    latents = _latents(load(recipe.model.size, 3, recipe.model.multiple), network, hash, run)
    preview = start_preview(recipe, root)
    features = align_features(recipe, latents.pictures, run / "cache") if recipe.latents.align else None
    tokenizer = None  # a tower that comes trained reads by the vocabulary that it learned
    if recipe.latents.text and recipe.model.text.tokenizer == "learned":
        tokenizer = read_native(root / recipe.latents.text).text.tokenizer
    task = DenoiserTask(recipe, latents, run, world, network, preview, features, tokenizer)
    if recipe.latents.perceptual:  # its decoder is a part of the loss
        task.origin = hash
    start_text(recipe, task.module, root)
    start_denoiser(recipe, task.module, root)
    if recipe.latents.text and recipe.latents.freeze_text and recipe.data.variants:
        _read_captions(task, latents.pictures, sha256(root / recipe.latents.text), run)
    return task


def _read_captions(task: DenoiserTask, pictures: Pictures, hash: str, run: Path) -> None:
    """Have a frozen text tower, which came from the file of this hash, read every caption once."""
    from sfumato.data.encoded_captions import captions_of, encoded_captions

    text = task.module.text.eval()
    key = f"{hash}/{task.recipe.model.text}/{text.tokenizer.to_str()}"
    task.words = encoded_captions(captions_of(pictures), text.encode, key, run / "cache")


def _distill(recipe: Recipe, load: Load, root: Path, run: Path, world: World) -> Task:
    from sfumato.families.native import read_native
    from sfumato.training.distillation import DistillTask

    if not recipe.distill.teacher:
        raise BadData("recipe: task: distill needs distill.teacher, a trained model")
    path = root / recipe.distill.teacher
    teacher, hash = read_native(path), sha256(path)
    model, vae = teacher.config, teacher.autoencoder
    pictures = load(model.size, model.denoiser.in_channels if vae is None else 3, model.multiple)
    source = pictures if vae is None else _latents(pictures, vae, hash, run)
    task = DistillTask(recipe, source, run, teacher, world)
    task.origin = hash
    if recipe.data.variants:
        _read_captions(task, pictures, hash, run)
    return task


def _check_starts(config: LatentRecipe, root: Path) -> None:
    """Raise BadData for a file to start from that is not there, before minutes of encoding."""
    for name in ("autoencoder", "text", "denoiser", "preview"):
        file: str = getattr(config, name)
        if file and not (root / file).is_file():
            raise BadData(f"recipe: latents.{name}: no such file: {root / file}")


def _check_perceptual(key: str, weight: float, net: str, size: int) -> None:
    """Raise BadData where pictures are too small for the network that compares them."""
    from sfumato.networks.lpips import SMALLEST

    if weight and size < SMALLEST[net]:
        raise BadData(
            f"recipe: {key}: {net} compares pictures of at least {SMALLEST[net]} pixels, not {size}: set it to 0"
        )


def _latents(pictures: Pictures, network: CompactAutoencoder, hash: str, run: Path) -> Latents:
    """Pictures encoded by the autoencoder that came from the file of this hash."""
    from sfumato.data.latents import Latents, encoded_in_shapes

    return Latents(pictures, encoded_in_shapes(pictures, network.encode, hash, run / "cache"))


def _decoder(recipe: Recipe, load: Load, root: Path, run: Path, world: World) -> Task:
    from sfumato.families.autoencoder import load_autoencoder
    from sfumato.networks.compact import deepened
    from sfumato.training.decoder import DecoderTask
    from sfumato.training.redrawn import load_latent_model, redrawn

    if not recipe.latents.autoencoder:
        raise BadData("recipe: a decoder needs latents.autoencoder, a trained autoencoder")
    if recipe.latents != LatentRecipe(autoencoder=recipe.latents.autoencoder):
        raise BadData("recipe: of latents, task: decoder reads latents.autoencoder alone: leave the others out")
    _check_perceptual("decoder.perceptual", recipe.decoder.perceptual, "alex", recipe.decoder.size)
    path = root / recipe.latents.autoencoder
    network = load_autoencoder(path)
    ours, theirs = recipe.decoder.network, network.config
    if recipe.decoder.size % theirs.factor:
        size, factor = recipe.decoder.size, theirs.factor
        raise BadData(f"recipe: decoder.size {size} is not a multiple of the latents' factor {factor}")
    if ours is not None and (ours.latent_channels, ours.factor) != (theirs.latent_channels, theirs.factor):
        raise BadData(
            f"recipe: decoder.network has {ours.latent_channels} latent channels and factor {ours.factor}, but "
            f"{path} has {theirs.latent_channels} and {theirs.factor}"
        )
    latents = _latents(load(recipe.decoder.size, 3, 0), network, sha256(path), run)
    if recipe.decoder.blocks is not None:
        try:
            network = deepened(network, recipe.decoder.blocks)
        except ValueError as e:
            raise BadData(f"recipe: decoder.blocks: {e}") from None
    again = None
    if recipe.decoder.model:
        model = root / recipe.decoder.model
        again = redrawn(recipe, latents, load_latent_model(model, network), sha256(model), run / "cache")
    return DecoderTask(recipe, latents, network, again)


def _autoencoder(recipe: Recipe, load: Load, root: Path, run: Path, world: World) -> Task:
    from sfumato.training.autoencoder import AutoencoderTask
    from sfumato.training.start import start_autoencoder

    config = recipe.autoencoder
    _check_perceptual("autoencoder.loss.perceptual", config.loss.perceptual, "alex", config.size)
    task = AutoencoderTask(recipe, load(recipe.autoencoder.size, 3, 0))
    start_autoencoder(recipe, task.module.autoencoder, root)
    return task


def _clip(recipe: Recipe, load: Load, root: Path, run: Path, world: World) -> Task:
    from sfumato.training.clip import ClipTask

    if recipe.parallel == "fsdp":
        raise BadData("recipe: task: clip is small enough for any one rank: set parallel to ddp")
    return ClipTask(recipe, load(recipe.clip.network.size, 3, 0), root, run / "cache")


class _Row(NamedTuple):
    """How a task is built, and the groups of settings that it reads beside those of the data and of the run."""

    build: Callable[[Recipe, Load, Path, Path, World], Task]
    reads: set[str]


TASKS: dict[str, _Row] = {
    "denoiser": _Row(_denoiser, {"model", "latents", "objective"}),
    "autoencoder": _Row(_autoencoder, {"autoencoder"}),
    "clip": _Row(_clip, {"clip"}),
    "decoder": _Row(_decoder, {"decoder", "latents"}),
    "distill": _Row(_distill, {"distill", "model", "latents"}),  # the last two as its teacher has them
}


def build_task(recipe: Recipe, root: Path, run: Path, world: World, progress: Progress) -> Task:
    """Read a recipe's data and build what it trains.

    Args:
        root: the recipe's folder, from which its paths are read; ``run``: where the run lives.

    Raises BadData for an unknown task or unusable data; the bad records are listed in the run's ``bad.jsonl``.
    """
    if recipe.task not in TASKS:
        raise BadData(
            f"recipe: no task named {recipe.task!r}{nearest(recipe.task, list(TASKS))}; there are {list(TASKS)}"
        )
    build, reads = TASKS[recipe.task]
    for section in sorted(set().union(*(row.reads for row in TASKS.values())) - reads):  # others would be ignored
        if getattr(recipe, section) != getattr(Recipe(), section):
            raise BadData(f"recipe: task: {recipe.task} does not read {section}: leave it out")

    def report(found: Report) -> None:
        listing = run / "bad.jsonl"
        if found.bad and world.main:
            run.mkdir(parents=True, exist_ok=True)
            write_atomically(listing, found.to_jsonl())
        elif world.main:  # of an earlier start
            listing.unlink(missing_ok=True)
        progress.note(found.summary(listing))

    def load(side: int, channels: int, multiple: int) -> Pictures:
        if recipe.data.max_aspect > 1 and not multiple:
            raise BadData(f"data.max_aspect goes with denoisers alone: set it to 1 for {recipe.name}")
        pictures = world.together(
            lambda: load_pictures(
                recipe.data, side, root, channels=channels, multiple=multiple, step_size=recipe.batch, on_report=report
            )
        )
        if pictures.shapes is not None:
            counts = Counter(pictures.shapes)
            progress.note("shapes: " + ", ".join(f"{w}×{h} {n}" for (h, w), n in sorted(counts.items())))
        progress.note(f"{pictures.epoch_length} drawn per epoch")
        return pictures

    return build(recipe, load, root, run, world)
