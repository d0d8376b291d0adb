"""Learns a SentencePiece-style vocabulary by byte-pair merging, and encodes as llama.cpp does.

Pure. llama.cpp's "llama" tokenizer joins, again and again, the neighbours whose joint text is the
token with the highest score, and spells what is left in byte tokens. ``Vocabulary.encode`` does the
same, so the model is trained on just the tokens it will be asked with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

SPACE = "\u2581"
"""SentencePiece's visible space; a word carries the space before it."""

UNKNOWN, BEGIN, END, USER, ASSISTANT = range(5)
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>")
FIRST_BYTE = len(SPECIAL)
FIRST_PIECE = FIRST_BYTE + 256


@dataclass
class Vocabulary:
    """Special tokens, then the 256 bytes, then pieces in the order they were learnt."""

    pieces: list[str]
    _known: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._rank = {piece: rank for rank, piece in enumerate(self.pieces)}

    def __len__(self) -> int:
        return FIRST_PIECE + len(self.pieces)

    def scores(self) -> list[float]:
        """One for each token; among pieces an earlier one is the better one."""
        return [0.0] * FIRST_PIECE + [-float(rank) for rank in range(len(self.pieces))]

    def tokens(self) -> list[str]:
        """The text of each token, by id."""
        return [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *self.pieces]

    def encode(self, text: str) -> list[int]:
        """``text`` as token ids: no BOS, no space put before it, no special tokens in it."""
        ids: list[int] = []
        for word in split_words(text):
            if word not in self._known:
                self._known[word] = tuple(self._encode_word(word))
            ids.extend(self._known[word])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without special tokens. Bytes are not joined: for the eye only."""
        texts = self.tokens()
        return "".join(texts[i] for i in ids if i >= FIRST_BYTE).replace(SPACE, " ")

    def _encode_word(self, word: str) -> Iterable[int]:
        parts = list(word)
        while len(parts) > 1:
            ranked = [
                (self._rank[left + right], at)
                for at, (left, right) in enumerate(pairwise(parts))
                if left + right in self._rank
            ]
            if not ranked:
                break
            _, at = min(ranked)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        for part in parts:
            if part in self._rank:
                yield FIRST_PIECE + self._rank[part]
            else:
                yield from (FIRST_BYTE + byte for byte in part.encode())


def split_words(text: str) -> list[str]:
    """``text`` cut before each space. No piece reaches over a cut: words can be encoded alone."""
    return [(SPACE if at else "") + word for at, word in enumerate(text.split(" ")) if word or at]


def learn(texts: Iterable[str], size: int) -> Vocabulary:
    """A vocabulary of at most ``size`` tokens, special and byte tokens included.

    Only letters join: a number is spelt digit by digit, which is how sums are learnt, and a word
    is the same token whatever mark follows it.
    """
    words = Counter(word for text in texts for word in split_words(text))
    pieces = sorted({letter for word in words for letter in word} | {SPACE})
    split = {word: list(word) for word in words}
    while FIRST_PIECE + len(pieces) < size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                if (pair[0] + pair[1]).removeprefix(SPACE).isalpha():
                    pairs[pair] += words[word]
        if not pairs:
            break
        # Ties go to the pair that sorts first: the same text gives the same vocabulary everywhere.
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        pieces.append(best[0] + best[1])
        for word, parts in split.items():
            if len(parts) > 1 and best[0] in parts:
                split[word] = _merge(parts, best)
    return Vocabulary(pieces)


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    at = 0
    while at < len(parts):
        if at + 1 < len(parts) and (parts[at], parts[at + 1]) == pair:
            merged.append(parts[at] + parts[at + 1])
            at += 2
        else:
            merged.append(parts[at])
            at += 1
    return merged
