"""Tokenizers of published text encoders, from the checkpoint's own files or, for CLIP, from the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from sfumato.errors import BadCheckpoint

START, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's
MAX_FILE = 64 << 20  # bytes


@dataclass(frozen=True, eq=False)
class Words:
    """A tokenizer, with the ids that a text encoder wants around the words.

    Args:
        start: id before the words, or None.
        end: id after them; ``pad`` fills the rest.
        length: number of ids the encoder takes at once, start and end included.
    """

    tokenizer: Tokenizer
    start: int | None
    end: int
    pad: int
    length: int

    @property
    def room(self) -> int:
        """How many words' tokens fit between start and end."""
        return self.length - 1 - (self.start is not None)

    def __call__(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def row(self, ids: list[int]) -> list[int]:
        """A whole row for the encoder: at most ``room`` ids between start and end, padded to ``length``."""
        row = [*([] if self.start is None else [self.start]), *ids[: self.room], self.end]
        return row + [self.pad] * (self.length - len(row))


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


@cache
def packaged_clip() -> Tokenizer:
    """CLIP's tokenizer from the package's own vocabulary, shared: do not change it."""
    merges = _merges(packaged_merges())
    return clip_bpe(clip_vocabulary(merges), merges)


def clip_words(folder: Path | None, length: int, pad: int | None = None) -> Words:
    """CLIP's tokenizer from a folder's files, or the packaged one; ``pad`` only where the folder does not say.

    Raises BadCheckpoint for files that cannot be read.
    """
    if folder is None or not folder.is_dir():
        tokenizer = packaged_clip()
        end = _id(tokenizer, END, "the packaged vocabulary")
        return Words(tokenizer, tokenizer.token_to_id(START), end, end if pad is None else pad, length)
    tokenizer = _from_folder(folder)
    settings = _json(folder / "tokenizer_config.json") | _json(folder / "special_tokens_map.json")
    end = _id(tokenizer, _token(settings.get("eos_token"), END), folder)
    start = _id(tokenizer, _token(settings.get("bos_token"), START), folder)
    padding = _id(tokenizer, _token(settings.get("pad_token"), END), folder)
    return Words(tokenizer, start, end, padding, length)


def t5_words(folder: Path, length: int) -> Words:
    """T5's tokenizer from a folder's ``tokenizer.json``; BadCheckpoint if it is not there or not readable."""
    if not (folder / "tokenizer.json").is_file():
        raise BadCheckpoint(f"{folder}: has no tokenizer.json, from which T5's words are read")
    tokenizer = _from_folder(folder)
    return Words(tokenizer, None, _id(tokenizer, "</s>", folder), _id(tokenizer, "<pad>", folder), length)


def _from_folder(folder: Path) -> Tokenizer:
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_str(_read(whole))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return tokenizer
        if not vocabulary.is_file() or not merges.is_file():
            raise BadCheckpoint(f"{folder}: has neither tokenizer.json nor vocab.json and merges.txt")
        return clip_bpe(json.loads(_read(vocabulary)), _merges(_read(merges)))
    except BadCheckpoint:
        raise
    except Exception as e:  # the tokenizer library raises bare Exceptions
        raise BadCheckpoint(f"{folder}: its tokenizer cannot be read ({str(e)[:200]})") from None


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_FILE:
        raise BadCheckpoint(f"{path}: larger than {MAX_FILE >> 20} MiB")
    return path.read_text(encoding="utf-8")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path)) if path.is_file() else {}
    except (ValueError, RecursionError, OSError):
        raise BadCheckpoint(f"{path}: not readable as JSON") from None
    return value if isinstance(value, dict) else {}


def _merges(text: str) -> list[tuple[str, str]]:
    pairs = [line.split(" ") for line in text.splitlines() if line and not line.startswith("#version")]
    return [(a, b) for a, b in pairs]


def _token(setting: Any, default: str) -> str:
    """A special token, given as text or as a record of it."""
    content = setting.get("content") if isinstance(setting, dict) else setting
    return content if isinstance(content, str) else default


def _id(tokenizer: Tokenizer, token: str, where: Path | str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise BadCheckpoint(f"{where}: the tokenizer has no token {token!r}")
    return found
