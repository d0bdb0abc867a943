"""Tokenizers of published text encoders, from the checkpoint's own files or from the package."""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from sfumato.errors import BadCheckpoint
from sfumato.text.spelling import Word, spell

ADDED_WORDS = "sfumato_words.json"  # learned words: how each is written, and its ids
SETTINGS = {ADDED_WORDS, "tokenizer_config.json", "special_tokens_map.json"}
START, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's
VOCABULARY = 49_408  # number of CLIP's tokens
T5_ROWS = 32_128  # of T5's table, which has some more than there are pieces


@dataclass(frozen=True, eq=False)
class Words:
    """A tokenizer, with the ids that a text encoder wants around the words.

    Args:
        start: id before the words, or None.
        end: id after them; ``pad`` fills the rest.
        length: number of ids the encoder takes at once, start and end included.
        added: words learned later, and the ids that each stands for.
    """

    tokenizer: Tokenizer
    start: int | None
    end: int
    pad: int
    length: int
    added: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """How many words' tokens fit between start and end."""
        return self.length - 1 - (self.start is not None)

    def __call__(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""
        if not self.added:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        longest_first = sorted(self.added, key=len, reverse=True)
        for part in re.split(f"({'|'.join(map(_by_itself, longest_first))})", text):
            ids += self.added.get(part) or self.tokenizer.encode(part, add_special_tokens=False).ids
        return ids

    def spell(self, row: Sequence[int], first: int = 0) -> list[Word]:
        """The words in a whole row for the encoder, whose first id stands in column ``first``."""
        before = 0 if self.start is None else 1
        ids = row[before:]
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        return spell(self.tokenizer, ids, first + before)

    def row(self, ids: list[int]) -> list[int]:
        """A whole row for the encoder: at most ``room`` ids between start and end, padded to ``length``."""
        row = [*([] if self.start is None else [self.start]), *ids[: self.room], self.end]
        return row + [self.pad] * (self.length - len(row))


def _by_itself(word: str) -> str:
    """A pattern of a word where it is not a part of a longer one."""
    before, after = (r"\b" if re.match(r"\w", c) else "" for c in (word[0], word[-1]))
    return f"{before}{re.escape(word)}{after}"


def clip_bpe(vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """CLIP's byte-pair tokenizer (2103.00020, section 2.4): lower case, words by a pattern, "</w>" at their ends."""
    bpe = models.BPE(vocab=dict(vocabulary), merges=merges, end_of_word_suffix="</w>", unk_token=END)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def packaged_merges() -> str:
    """The text of the packaged CLIP vocabulary: one merge a line, the most frequent first."""
    return (files("sfumato") / "text" / "clip_vocabulary" / "merges.txt").read_text(encoding="utf-8")


def clip_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Ids of all pieces, in CLIP's order: the bytes, the bytes that end a word, the merges, start and end."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + i) for i in range(256 - len(printable))]  # stand for the bytes that cannot be printed
    letters = [*map(chr, printable), *others]
    pieces = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), START, END]
    return {piece: i for i, piece in enumerate(pieces)}


def packaged_pairs() -> list[tuple[str, str]]:
    """The packaged CLIP vocabulary's merges."""
    return _merges(packaged_merges())


@cache
def packaged_clip() -> Tokenizer:
    """CLIP's tokenizer from the package's own vocabulary, shared: do not change it."""
    merges = packaged_pairs()
    return clip_bpe(clip_vocabulary(merges), merges)


def clip_words(texts: Mapping[str, str], length: int, pad: int | None = None) -> Words:
    """CLIP's tokenizer from its files' texts by name, or the packaged one if there is no vocabulary among them.

    Args:
        length: how many ids the encoder takes at once, if the texts do not state fewer.
        pad: of the packaged one, whose users pad in different ways, where the texts do not say.

    Raises BadCheckpoint for texts that cannot be read.
    """
    added = _json(texts, ADDED_WORDS)
    for word, ids in added.items():
        if not word or not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise BadCheckpoint(f"the tokenizer's {ADDED_WORDS} is damaged: {word[:40]!r} stands for no list of ids")
    settings = _json(texts, "special_tokens_map.json") | _json(texts, "tokenizer_config.json")
    packaged = not texts.keys() - SETTINGS
    tokenizer = packaged_clip() if packaged else _from_texts(texts)
    start, end, padding = (
        _id(tokenizer, _token(settings.get(f"{name}_token"), default))
        for name, default in (("bos", START), ("eos", END), ("pad", END))
    )
    if packaged and pad is not None and "pad_token" not in settings:
        padding = pad
    stated = settings.get("model_max_length")
    if isinstance(stated, int) and 2 < stated < length:
        length = stated
    return Words(tokenizer, start, end, padding, length, added)


def packaged_pieces() -> str:
    """The packaged T5 vocabulary, as the text of a ``tokenizer.json``."""
    return lzma.decompress((files("sfumato") / "text" / "t5_vocabulary" / "tokenizer.json.xz").read_bytes()).decode()


@cache
def packaged_t5() -> Tokenizer:
    """T5's tokenizer from the package's own vocabulary, shared: do not change it."""
    return Tokenizer.from_str(packaged_pieces())


def t5_words(texts: Mapping[str, str], length: int, rows: int) -> Words:
    """T5's tokenizer from its ``tokenizer.json``, or the packaged one if there is no vocabulary among the texts.

    Args:
        rows: of the encoder's table: the packaged vocabulary is for T5's own number of them alone.

    Raises BadCheckpoint for texts that cannot be read, or without a vocabulary where the packaged one does not fit.
    """
    if "tokenizer.json" in texts:
        tokenizer = _from_texts(texts)
    elif texts.keys() - SETTINGS:
        raise BadCheckpoint(
            f"T5's tokenizer is read from a tokenizer.json, and there is only {', '.join(sorted(texts))}"
        )
    elif rows == T5_ROWS:
        tokenizer = packaged_t5()
    else:
        raise BadCheckpoint(
            f"there is no tokenizer.json, and the packaged T5 vocabulary is for {T5_ROWS} rows, this encoder has {rows}"
        )
    return Words(tokenizer, None, _id(tokenizer, "</s>"), _id(tokenizer, "<pad>"), length)


def _from_texts(texts: Mapping[str, str]) -> Tokenizer:
    try:
        if "tokenizer.json" in texts:
            tokenizer = Tokenizer.from_str(texts["tokenizer.json"])
            tokenizer.no_padding()
            tokenizer.no_truncation()
            tokenizer.encode("a é", add_special_tokens=False)  # what is damaged may show only in use
            return tokenizer
        if "vocab.json" not in texts or "merges.txt" not in texts:
            raise BadCheckpoint("a tokenizer needs tokenizer.json, or vocab.json and merges.txt")
        return clip_bpe(json.loads(texts["vocab.json"]), _merges(texts["merges.txt"]))
    except BadCheckpoint:
        raise
    except BaseException as e:  # the tokenizer library raises bare Exceptions, and panics that are none
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise BadCheckpoint(f"the tokenizer cannot be read ({str(e)[:200]})") from None


def _json(texts: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        value = json.loads(texts.get(name, "{}"))
    except (ValueError, RecursionError):
        raise BadCheckpoint(f"the tokenizer's {name} is not valid JSON") from None
    return value if isinstance(value, dict) else {}


def _merges(text: str) -> list[tuple[str, str]]:
    pairs = [line.split(" ") for line in text.splitlines() if line and not line.startswith("#version")]
    return [(a, b) for a, b in pairs]


def _token(setting: Any, default: str) -> str:
    """A special token, given as text or as a record of it."""
    content = setting.get("content") if isinstance(setting, dict) else setting
    return content if isinstance(content, str) else default


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise BadCheckpoint(f"the tokenizer has no token {token!r}")
    return found
