"""The text tower: what it keeps of a prompt."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.text.tower import END, TextTower, TextTowerConfig, train_tokenizer

CAPTIONS = ["a red apple, noto style", "tiger in twemoji style", "a rocket", "smiling face with open mouth"] * 4
CONFIG = TextTowerConfig(vocabulary=300, dim=16, layers=2, heads=2, max_tokens=12)


def tower() -> TextTower:
    torch.manual_seed(0)
    net = TextTower(CONFIG, train_tokenizer(CAPTIONS, CONFIG.vocabulary)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


TOWER = tower()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_any_text_has_ids_in_the_vocabulary_and_one_end(prompts):
    ids, mask = TOWER.tokenize(prompts)
    end = TOWER.tokenizer.token_to_id(END)
    assert ids.shape == mask.shape
    assert ids.shape[1] <= CONFIG.max_tokens
    assert ids.max() < CONFIG.vocabulary
    assert ((ids == end).sum(1) == 1).all()
    last = mask.sum(1) - 1
    assert (ids[torch.arange(len(ids)), last] == end).all()


def test_tokens_spell_the_prompt_again():
    for text in ("a red apple", "smiling tiger — éclair 🦊"):
        ids, _ = TOWER.tokenize([text])
        if not TOWER.truncated(text):
            assert TOWER.tokenizer.decode(ids[0].tolist()).strip() == text


def test_a_prompt_is_encoded_the_same_whatever_it_stands_beside():
    alone = TOWER.encode(["a red apple"])
    beside = TOWER.encode(["a red apple", "smiling face with open mouth and tiger"])
    n = int(alone["mask"].sum())
    torch.testing.assert_close(beside["context"][:1, :n], alone["context"][:, :n], rtol=0, atol=1e-5)
    torch.testing.assert_close(beside["pooled"][:1], alone["pooled"], rtol=0, atol=1e-5)


def test_truncation_is_told():
    assert TOWER.truncated("apple") == 0
    long = "apple " * 50
    full = len(TOWER.tokenizer.encode(long).ids)
    assert TOWER.truncated(long) == full - (CONFIG.max_tokens - 1)


def test_word_order_matters():
    a, b = TOWER.encode(["red apple"])["pooled"], TOWER.encode(["apple red"])["pooled"]
    assert (a - b).abs().max() > 1e-3


def test_the_vocabulary_is_a_function_of_its_captions():
    assert train_tokenizer(CAPTIONS, 300).to_str() == train_tokenizer(CAPTIONS, 300).to_str()
