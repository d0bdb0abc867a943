"""Tokenizers against transformers', and what may be written in a prompt."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import CLIPTokenizer, T5TokenizerFast

from sfumato.checkpoints.folder import read_tokenizer
from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.text.prompt import chunks, grid, parse, weigh, without_breaks
from sfumato.text.tokenizer import (
    ADDED_WORDS,
    T5_ROWS,
    clip_vocabulary,
    clip_words,
    packaged_clip,
    packaged_merges,
    packaged_pieces,
    packaged_t5,
    t5_words,
)

PROMPTS = [
    "an astronaut riding a horse, oil painting, golden hour",
    "A Cat's   BEST\tfriend isn't 123 dogs!!! (no)",
    "café, naïve, ÅNGSTRÖM, 北京, 🦊🦊 e\u0301",
    "",
    "x" * 300,
]


def their_vocabulary(folder: Path) -> CLIPTokenizer:
    merges = [tuple(line.split(" ")) for line in packaged_merges().splitlines()]
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary(merges)))
    (folder / "merges.txt").write_text("#version: 0.2\n" + packaged_merges())
    return CLIPTokenizer.from_pretrained(folder)


def test_the_packaged_vocabulary_is_clips() -> None:
    tokenizer = packaged_clip()
    assert tokenizer.get_vocab_size() == 49408
    ids = tokenizer.encode("a photo of a cat").ids
    assert ids == [320, 1125, 539, 320, 2368]  # as published with CLIP
    assert tokenizer.token_to_id("<|startoftext|>") == 49406
    assert tokenizer.token_to_id("<|endoftext|>") == 49407


def test_equals_transformers_from_either_kind_of_files(tmp_path: Path) -> None:
    theirs = their_vocabulary(tmp_path)
    saved = tmp_path / "saved"
    theirs.save_pretrained(saved)
    for words in (clip_words({}, 77), clip_words(read_tokenizer(tmp_path), 77), clip_words(read_tokenizer(saved), 77)):
        for prompt in PROMPTS:
            expected = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
            assert words.row(words(prompt)) == expected, prompt


def test_a_tokenizer_that_states_fewer_tokens_than_its_tower_takes_is_padded_to_those(tmp_path: Path) -> None:
    their_vocabulary(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path, model_max_length=32)
    theirs.save_pretrained(tmp_path / "saved")
    words = clip_words(read_tokenizer(tmp_path / "saved"), 77)
    for prompt in PROMPTS:
        assert words.row(words(prompt)) == theirs(prompt, padding="max_length", truncation=True).input_ids, prompt
    assert [len(c.ids) for c in chunks("fox " * 40, words)] == [32, 32]
    for stated in (2, 10**30, 128, "32"):  # what is no number of tokens, or more than the tower takes
        assert clip_words({"tokenizer_config.json": json.dumps({"model_max_length": stated})}, 77).length == 77


def test_the_packaged_t5_vocabulary_is_t5s() -> None:
    tokenizer = packaged_t5()
    assert tokenizer.get_vocab_size() == 32_000 + 100
    special = ("<pad>", "</s>", "<unk>", "<extra_id_99>", "<extra_id_0>")
    assert [tokenizer.token_to_id(token) for token in special] == [0, 1, 2, 32_000, 32_099]
    # What transformers' own tests say that t5-base's tokenizer gives.
    published = {
        "A long paragraph for summarization.": [71, 307, 8986, 21, 4505, 1635, 1707, 5, 1],
        "Hey how are you doing": [9459, 149, 33, 25, 692, 1],
        "<pad> Today is <unk> nice day": [0, 1960, 19, 2, 1245, 239, 1],
        "The quick brown fox jumps over the lazy dog.": [37, 1704, 4216, 3, 20400, 4418, 7, 147, 8, 19743, 1782, 5, 1],
        "BERT is designed to pre-train deep bidirectional representations from unlabeled text by jointly conditioning "
        "on both left and right context in all layers.": [
            272, 24203, 19, 876, 12, 554, 18, 9719, 1659, 2647, 26352, 6497, 7, 45, 73, 9339, 400, 26, 1499, 57, 22801,
            10760, 30, 321, 646, 11, 269, 2625, 16, 66, 7500, 5, 1,
        ],
    }  # fmt: skip
    for text, ids in published.items():
        assert tokenizer.encode(text).ids == ids, text


def test_t5_equals_transformers_on_hard_strings() -> None:
    packaged = json.loads(packaged_pieces())
    pieces = [(piece, score) for piece, score in packaged["model"]["vocab"]]
    table = base64.b64decode(packaged["normalizer"]["precompiled_charsmap"])
    theirs = T5TokenizerFast(vocab=pieces, _spm_precompiled_charsmap=table)
    words = t5_words({}, 512, T5_ROWS)
    r = random.Random(0)
    alphabet = [
        *"aeiou Éßñșŭ \t\n\u00a0\u3000\u200b▁½ﬁﬀ℃Ⅷ①ｱｶﾞＡｂ１",
        "e\u0301",
        "北京",
        "🦊",
        "👩\u200d🚀",
        "\ufeff",
        "</s>",
        "<extra_id_7>",
    ]
    drawn = ["".join(r.choice(alphabet) for _ in range(r.randint(1, 40))) for _ in range(300)]
    for text in [*PROMPTS, " ", "   a    b   ", "a red fox in the snow, " * 2000, *drawn]:
        assert words(text) == theirs(text, add_special_tokens=False).input_ids, text[:80]
        assert words.row(words(text)) == theirs(text, padding="max_length", max_length=512, truncation=True).input_ids
    assert words("ＡＢＣ  ½ ﬁne") == words("ABC 1⁄2 fine")  # the table's work
    assert 2 not in words("et ça coûte 5 euros, süß!"), "a piece is unknown"


def test_the_packaged_t5_vocabulary_is_for_its_own_rows_and_stands_back() -> None:
    for rows in (40, 32_100, 250_112):
        with pytest.raises(BadCheckpoint, match=f"for 32128 rows, this encoder has {rows}"):
            t5_words({}, 256, rows)
    with pytest.raises(BadCheckpoint, match=r"only vocab\.json"):
        t5_words({"vocab.json": "{}"}, 256, T5_ROWS)
    own = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("a", -1.0)], unk_id=2)).to_str()
    assert t5_words({"tokenizer.json": own}, 256, T5_ROWS)("a") == [3]


def panicking(table: str) -> str:
    """A tokenizer.json of which the library panics, which is no Exception."""
    tokenizer = json.loads(Tokenizer(models.Unigram([("a", -1.0)], unk_id=0)).to_str())
    return json.dumps({**tokenizer, "normalizer": {"type": "Precompiled", "precompiled_charsmap": table}})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "\x00"),
        ("tokenizer.json", panicking("")),  # at once
        ("tokenizer.json", panicking("AAAAAAAA")),  # in use
        ("vocab.json", "{}"),
        ("tokenizer_config.json", "{"),
        (ADDED_WORDS, '{"fox": 5}'),
        (ADDED_WORDS, '{"fox": ["a"]}'),
        (ADDED_WORDS, '{"fox": []}'),
    ],
)
def test_broken_tokenizer_files_are_refused(name: str, content: str) -> None:
    with pytest.raises(BadCheckpoint, match="tokenizer"):
        clip_words({name: content}, 77)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a fox", [("a fox", 1)]),
        ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
        ("a ((red)) fox", [("a ", 1), ("red", 1.21), (" fox", 1)]),
        ("a [red] fox", [("a ", 1), ("red", 1 / 1.1), (" fox", 1)]),
        ("a (red:1.5) fox", [("a ", 1), ("red", 1.5), (" fox", 1)]),
        ("a (very (red:2):0.5)", [("a ", 1), ("very ", 0.5), ("red", 1)]),
        (r"a \(red\) \\ fox", [("a (red) \\ fox", 1)]),
        ("a (red fox", [("a ", 1), ("red fox", 1.1)]),
        ("a red) fox]: 1", [("a red) fox]: 1", 1)]),
        ("ratio 16:9 (big: 1.2)", [("ratio 16:9 ", 1), ("big", 1.2)]),
        ("fox BREAK hill", [("fox ", 1), None, (" hill", 1)]),
        ("BREAKFAST at B", [("BREAKFAST at B", 1)]),
        ("", []),
    ],
)
def test_weights_are_read(prompt: str, expected: list[tuple[str, float] | None]) -> None:
    parsed = parse(prompt)
    assert [p and p[0] for p in parsed] == [e and e[0] for e in expected]
    for p, e in zip(parsed, expected, strict=True):
        assert (p is None) == (e is None)
        assert p is None or e is None or p[1] == pytest.approx(e[1])


def test_parsing_ends_on_any_text_and_loses_no_word() -> None:
    r = random.Random(0)
    for _ in range(500):
        text = "".join(r.choice([*"ab ()[]:\\\n🦊", ":1.2)", "BREAK"]) for _ in range(r.randint(0, 60)))
        assert sum(part[0].count("a") for part in parse(text) if part is not None) == text.count("a"), text
    (deep,) = parse("(" * 50 + "a" + ")" * 50)
    assert deep is not None
    assert deep == ("a", pytest.approx(1.1**50))
    for heavy in ("(" * 5000 + "a" + ")" * 5000, f"(a:{'9' * 400})"):
        with pytest.raises(BadRequest, match="'a' has weight"):
            parse(heavy)


def test_long_prompts_become_chunks_and_breaks_start_new_ones() -> None:
    words = clip_words({}, 77)
    long = chunks("fox " * 200, words)
    assert [len(c.ids) for c in long] == [77] * 3
    fox = words("fox")[0]
    assert sum(c.ids.count(fox) for c in long) == 200
    assert all(c.ids[0] == words.start and words.end in c.ids for c in long)
    assert len(chunks("a BREAK b", words)) == 2
    assert len(chunks("fox " * 100_000, words)) == 64
    ids, weights = grid(["(fox:2)", "a BREAK b"], words)
    assert ids.shape == weights.shape == (2, 2, 77)
    assert ids[0, 1].tolist() == words.row([])
    assert weights[0, 0, :3].tolist() == [1, 2, 1]


def test_an_encoder_of_one_chunk_reads_breaks_as_spaces_and_words_whole() -> None:
    assert without_breaks("BREAKFAST, a BREAK b").split() == ["BREAKFAST,", "a", "b"]


def test_weights_turn_states_and_keep_their_mean() -> None:
    states = torch.randn(2, 5, 8) + 1
    weights = torch.ones(2, 5)
    assert weigh(states, weights) is states
    weights[0, 2] = 1.5
    out = weigh(states, weights)
    torch.testing.assert_close(out[1], states[1])
    torch.testing.assert_close(out.mean(dim=(1, 2)), states.mean(dim=(1, 2)))
    torch.testing.assert_close(out[0, 2] / out[0, 1], 1.5 * states[0, 2] / states[0, 1])
