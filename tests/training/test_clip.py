"""The contrastive task: its loss in closed form, the pairs it leaves out, bounds of its scale, runs to the byte."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sfumato.checkpoints.packaged import LITE0
from sfumato.errors import BadCheckpoint, BadData, NoResources
from sfumato.families.clip import MAX_SCALE, TwoTowers, TwoTowersConfig, load_clip
from sfumato.networks.towers import PictureHeadConfig
from sfumato.text.tokenizer import VOCABULARY, packaged_clip
from sfumato.text.tower import TextTowerConfig
from sfumato.training.clip import changed, info_nce, true_elsewhere
from sfumato.training.word_table import principal

SMALL = TwoTowersConfig(
    dim=16,
    text=TextTowerConfig(vocabulary=VOCABULARY, tokenizer="clip", token_dim=4, dim=16, layers=1, heads=2),
    picture=PictureHeadConfig(features=1432, hidden=16, dropout=0.1),
)
NONE = torch.zeros(5, 5, dtype=torch.bool)


def similarities(n: int = 5) -> torch.Tensor:
    return 3 * torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_info_nce_of_equal_similarities_is_the_log_of_how_many_there_are():
    loss = info_nce(torch.full((5, 5), 0.7), NONE)
    torch.testing.assert_close(loss, torch.full((5,), math.log(5)))


def test_info_nce_is_its_formula():
    s = similarities()
    expected = [
        -0.5 * (math.log(s[i, i].exp() / s[i].exp().sum()) + math.log(s[i, i].exp() / s[:, i].exp().sum()))
        for i in range(5)
    ]
    torch.testing.assert_close(info_nce(s, NONE), torch.tensor(expected, dtype=torch.float64))


def test_info_nce_is_symmetric_in_words_and_pictures_and_in_the_order_of_pairs():
    s, order = similarities(), torch.tensor([3, 0, 4, 1, 2])
    excluded = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) < 0.3
    excluded.fill_diagonal_(False)
    torch.testing.assert_close(info_nce(s, excluded), info_nce(s.T, excluded.T))
    moved = info_nce(s[order][:, order], excluded[order][:, order])
    torch.testing.assert_close(moved, info_nce(s, excluded)[order])


def test_an_excluded_pair_counts_as_if_it_were_not_there():
    s = similarities()
    excluded = NONE.clone()
    excluded[0, 1] = excluded[1, 0] = True
    before = s.clone().requires_grad_()
    loss = info_nce(before, excluded)
    loss.sum().backward()
    assert before.grad is not None
    assert before.grad[0, 1] == before.grad[1, 0] == 0
    assert (before.grad[~excluded] != 0).all()
    without = torch.tensor([0, 2, 3, 4])  # row 0 without caption 1
    row = -F.log_softmax(s[0, without], 0)[0]
    column = -F.log_softmax(s[without, 0], 0)[0]
    torch.testing.assert_close(loss[0].detach(), (row + column) / 2)


def test_pairs_are_left_out_where_the_caption_is_true_of_the_picture():
    def row(concept: str, style: str) -> dict[str, str]:
        return {"concept": concept, "name": concept, "style_phrase": style}

    rows = [row("fox", "noto style"), row("fox", "blob style"), row("owl", "noto style"), row("fox", "noto style")]
    captions = ["fox, noto style", "fox", "noto style", "a picture of vixen, noto style"]
    expected = torch.tensor(
        [  # caption: the first       "fox"   "noto style"  the last
            [0, 1, 1, 1],  # fox, noto
            [0, 0, 0, 0],  # fox, blob: "fox" is its own
            [0, 0, 0, 0],  # owl, noto
            [1, 1, 1, 0],  # fox, noto
        ],
        dtype=torch.bool,
    )
    assert torch.equal(true_elsewhere(rows, captions), expected)


def test_an_empty_caption_is_true_of_everything_and_teaches_nothing():
    rows = [{"name": "fox", "style_phrase": "noto style"}, {"name": "owl", "style_phrase": "noto style"}]
    excluded = true_elsewhere(rows, ["", ""])
    assert torch.equal(info_nce(similarities(2), excluded), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(("log_scale", "scale"), [(-3.0, 1.0), (math.log(20), 20.0), (50.0, MAX_SCALE)])
def test_the_scale_stays_between_one_and_a_hundred(log_scale: float, scale: float):
    towers = TwoTowers(SMALL, packaged_clip())
    with torch.no_grad():
        towers.log_scale.fill_(log_scale)
    assert float(towers.scale.detach()) == pytest.approx(scale)
    words = towers.words(*towers.text.tokenize(["a fox", "an owl"]))
    torch.testing.assert_close(words.norm(dim=1), torch.ones(2))


def test_captions_in_parts_are_captions_in_one():
    torch.manual_seed(0)
    towers = TwoTowers(SMALL, packaged_clip()).eval()
    for p in towers.parameters():
        torch.nn.init.normal_(p, std=0.3)
    prompts, features = ["a fox", "an owl", "a picture of a red apple, noto style", "house"], torch.randn(4, 1432)
    parts = [towers.text.tokenize(prompts[:2]), towers.text.tokenize(prompts[2:])]
    torch.testing.assert_close(towers(features, parts), towers(features, [towers.text.tokenize(prompts)]))


def test_principal_directions_keep_the_angles_of_vectors_that_have_no_others():
    flat = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    axes = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double())[0]
    rows = principal(flat @ axes.T, 3).double()
    torch.testing.assert_close(rows.square().mean(1), torch.ones(50).double(), atol=1e-5, rtol=0)
    unit = F.normalize(flat - flat.mean(0), dim=1)
    torch.testing.assert_close(rows @ rows.T / 3, unit @ unit.T, atol=1e-4, rtol=0)


def test_a_table_of_tokens_puts_words_near_their_kin():
    from sfumato.checkpoints.packaged import MINILM
    from sfumato.text.tower import train_tokenizer
    from sfumato.training.word_table import token_texts, word_table

    try:
        MINILM.locate()
    except NoResources as e:
        pytest.skip(str(e))
    words = ("tiger", "lion", "rocket", "spaceship", "pizza", "bread")
    tokenizer = train_tokenizer([f"{w} {w}" for w in words] * 20, 420)
    place = {text: i for i, text in enumerate(token_texts(tokenizer))}
    rows = F.normalize(word_table(tokenizer, 32), dim=1)[[place[w] for w in words]]
    near = rows @ rows.T - 2 * torch.eye(6)
    assert near.argmax(1).tolist() == [1, 0, 3, 2, 5, 4]


def test_changed_views_are_white_around_and_differ():
    x = -torch.ones(3, 3, 64, 64)
    views = changed(x, torch.Generator().manual_seed(1))
    assert views.shape == (3, 3, 128, 128)
    assert views.min() >= -1
    assert views.max() <= 1
    assert (views[0] - views[1]).abs().max() > 0.1
    white = changed(torch.ones(3, 3, 64, 64), torch.Generator().manual_seed(1))
    assert (white >= 0.9 - 1e-6).all()  # but for the tint


SETTINGS = """
name: toy
task: clip
clip:
  words: random
  views: 2
  network: {size: 32, dim: 16, text: {vocabulary: 49408, tokenizer: clip, token_dim: 4, dim: 16, layers: 1, heads: 2},
            picture: {hidden: 16, dropout: 0.1}}
data: {path: sample, where: {style: noto}, captions: template, dropout: 0.05}
batch: 16
steps: 6
ema: [0.9]
precision: fp32
checkpoint_every: 3
log_every: 1
"""


def trained(folder: Path, recipe: Path, *overrides: str) -> bytes:
    from sfumato.training.cli import main

    assert main([str(recipe), "--run", str(folder), *overrides]) == 0
    return (folder / "final.safetensors").read_bytes()


def test_a_run_cut_short_ends_in_the_same_bytes_and_its_file_is_a_clip(tmp_path: Path):
    try:
        LITE0.locate()
    except NoResources as e:
        pytest.skip(str(e))
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(SETTINGS)
    whole = trained(tmp_path / "whole", recipe)
    trained(tmp_path / "cut", recipe, "steps=3")
    (tmp_path / "cut" / "cache").rename(tmp_path / "cut" / "elsewhere")  # features are made anew, or not
    assert trained(tmp_path / "cut", recipe, "workers=2") == whole

    clip = load_clip(tmp_path / "whole" / "final.safetensors")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    together = clip.embed_pictures(images)
    torch.testing.assert_close(clip.embed_pictures(images[1:2]), together[1:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    assert clip.embed_words([]).shape == (0, 16)


def test_unknown_words_and_foreign_files_are_refused(tmp_path: Path):
    from sfumato.training.recipe import ClipRecipe

    with pytest.raises(BadData, match="minilm or random"):
        ClipRecipe(words="glove")
    with pytest.raises(BadCheckpoint, match="no CLIP"):
        load_clip(Path(__file__).parents[2] / "src" / "sfumato" / "models" / "emoji-64.safetensors")
