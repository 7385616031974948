"""Sentences hidden in documents, as token ids with known places: what the suite and the training text are made of."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_lsa.errors import LsaError

SENTENCE_ENDS = (".", "!", "?", '."')  # how tokens end that close a sentence
ABBREVIATIONS = frozenset("Mr Mrs Ms Dr St Rev Prof No vs etc".split())
LINE_ENDS = ("\n", "Ċ", "<0x0A>")
SNAP = 128  # tokens that a place may be moved to find the end of a sentence or line

Part = tuple[str | list[int], bool]  # text or its tokens, and whether predicting it takes retrieval


class Encoder:
    """A Hugging Face tokenizer that encodes pieces of a text one by one.

    Pieces begin with a space or a newline, or follow one, so that joined pieces are tokens as a model knows them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        plain = self.encode("a")
        special = list(tokenizer("a")["input_ids"])
        self.prefix: list[int] = special[: special.index(plain[0])] if plain[0] in special else []  # as a rule, BOS
        self._endings: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def ending(self, token: int) -> str:
        """Whether a token closes a "sentence" or a "line"; else ""."""
        if token not in self._endings:
            text = str(self.tokenizer.convert_ids_to_tokens([token])[0])
            kind = "line" if text.endswith(LINE_ENDS) else "sentence" if text.endswith(SENTENCE_ENDS) else ""
            self._endings[token] = kind
        return self._endings[token]

    def is_abbreviation(self, token: int) -> bool:
        """Whether a period after `token` is no end of a sentence: titles, initials, digits."""
        word = str(self.tokenizer.convert_ids_to_tokens([token])[0]).lstrip("Ġ▁ ")
        return word in ABBREVIATIONS or (len(word) == 1 and word.isalnum() and word != "I")

    def is_blank(self, token: int) -> bool:
        return not self.decode([token]).strip()


@dataclass(frozen=True)
class Item:
    """Something to be put into a document: parts one after the other, at the share `depth` in [0, 1] of the filler.

    An item that begins with a newline is put there as it is, and should end with one. Others become part of a line or
    a line of their own, as the place demands.
    """

    depth: float
    parts: Sequence[Part]


@dataclass(frozen=True)
class Placed:
    """What `weave` made: all tokens; each item's first token; ranges [a, b) of tokens whose prediction takes retrieval.

    The blank token with which some tokenizers begin a number is not in the ranges.
    """

    tokens: list[int]
    starts: list[int]
    answers: list[tuple[int, int]]


def _add(encoder: Encoder, parts: Sequence[Part], tokens: list[int], answers: list[tuple[int, int]]) -> None:
    for part, retrieved in parts:
        added = encoder.encode(part) if isinstance(part, str) else part
        first = len(tokens) + (len(added) > 1 and encoder.is_blank(added[0]))
        tokens += added
        if retrieved:
            answers.append((first, len(tokens)))


def _place(encoder: Encoder, body: Sequence[int], wanted: int) -> tuple[int, str]:
    """The place in `body` nearest to `wanted` behind a sentence, else behind a line, within SNAP tokens; and which."""
    for kind in ("sentence", "line"):
        for distance in range(SNAP):
            for place in (wanted - distance, wanted + distance):
                if 0 < place <= len(body) and encoder.ending(body[place - 1]) == kind:
                    if kind == "line" or not encoder.is_abbreviation(body[max(0, place - 2)]):
                        return place, kind
    return wanted, ""


def weave(
    encoder: Encoder, filler: Sequence[int], length: int, items: Sequence[Item], tail: Sequence[Part] = ()
) -> Placed:
    """Exactly `length` tokens: the prefix, filler with the items at their depths in it, then `tail`.

    Filler is used from its beginning, and again if it is too short. Items are moved to an end of a sentence or line
    nearby; their order is that of their depths, or as given where those are equal.

    Raises
    ------
    LsaError
        Items and tail alone are longer than `length`, or there is no filler.
    """
    forms = {"sentence": (" ", ""), "line": ("", "\n"), "": ("\n", "\n")}
    end: list[int] = []
    _add(encoder, tail, end, [])
    longest: list[int] = []  # every item as a line of its own: no form takes more tokens
    for item in items:
        _add(encoder, [("\n", False), *item.parts, ("\n", False)], longest, [])
    room = length - len(encoder.prefix) - len(longest) - len(end)
    if room < 0 or not filler:
        raise LsaError(f"retrieval text: {length} tokens are too few for it, or there are no documents")
    tokens, starts, done = list(encoder.prefix), [0] * len(items), 0
    answers: list[tuple[int, int]] = []
    body = [filler[i % len(filler)] for i in range(length)]
    for index in sorted(range(len(items)), key=lambda i: items[i].depth):
        place, kind = _place(encoder, body[:room], round(items[index].depth * room))
        if place <= done:
            place, kind = done, kind if place == done else "line" if done else ""
        tokens += body[done:place]
        done = place
        starts[index] = len(tokens)
        _add(encoder, _framed(items[index].parts, *forms[kind]), tokens, answers)
    tokens += body[done : done + length - len(tokens) - len(end)]
    _add(encoder, tail, tokens, answers)
    assert len(tokens) == length
    return Placed(tokens, starts, answers)


def _framed(parts: Sequence[Part], before: str, after: str) -> list[Part]:
    """`parts` between two strings, unless they begin with a newline; the first is joined to the text it precedes."""
    first, retrieved = parts[0]
    if not isinstance(first, str) or first.startswith("\n"):
        return list(parts)
    return [(before + first, retrieved), *parts[1:], *([(after, False)] if after else [])]


def number(rng: random.Random, digits: int = 6) -> str:
    """A code of so many digits that does not begin with zero."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))
