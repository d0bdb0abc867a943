"""Words and the columns that hold them, for each kind of tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from sfumato.families.model import Model
from sfumato.text.prompt import grid, spell_prompt
from sfumato.text.spelling import spell
from sfumato.text.tokenizer import clip_words


@pytest.mark.parametrize("pad", [None, 0])
def test_clip_words_have_their_columns(pad: int | None) -> None:
    words = clip_words({}, 77, pad)
    prompt = "a (red:1.3) astronautical fox, running"
    spelled = spell_prompt(prompt, words)
    assert [w.text for w in spelled] == ["a", "red", "astronautical", "fox", ",", "running"]
    columns = [c for w in spelled for c in w.columns]
    assert columns == list(range(1, len(columns) + 1)), "after the start token, none left out"
    ids = grid([prompt], words)[0][0, 0]
    assert ids[len(columns) + 1] == words.end
    assert len(spelled[2].columns) > 1, "a rare word is several pieces"
    for w in spelled:
        assert words.tokenizer.decode([int(ids[c]) for c in w.columns]).strip().removesuffix("</w>") == w.text


def test_words_of_a_second_chunk_stand_after_the_first() -> None:
    words = clip_words({}, 77)
    spelled = spell_prompt("a fox BREAK a hill", words)
    assert [(w.text, w.columns) for w in spelled] == [("a", (1,)), ("fox", (2,)), ("a", (78,)), ("hill", (79,))]
    assert spell_prompt("", words) == []


def test_byte_level_words(tiny: Model) -> None:
    spelled = tiny.words("A red äpple, or two")
    assert [w.text for w in spelled] == ["a", "red", "äpple", ",", "or", "two"]
    assert [c for w in spelled for c in w.columns] == list(range(sum(len(w.columns) for w in spelled)))
    cut = tiny.words("apple " * 100)
    assert max(c for w in cut for c in w.columns) < 23, "what was cut has no column"


def test_sentencepiece_words() -> None:
    vocabulary = [("<unk>", 0.0), *((p, -1.0) for p in ("▁a", "▁ast", "ro", "naut", "▁", ",", "f"))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    ids = tokenizer.encode("a astronaut, a").ids
    assert [len(w.columns) for w in spell(tokenizer, ids, 5)] == [1, 3, 1, 1]
    assert spell(tokenizer, ids, 5)[1].columns == (6, 7, 8)
    assert [w.text for w in spell(tokenizer, [9999])] == ["#9999"], "a word learned later, unknown to the tokenizer"
