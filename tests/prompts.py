"""The prompts of the exactness tests, as token ids."""

from functools import cache

from transformers import AutoTokenizer

from tests.paths import DOCUMENT, MODEL

LENGTHS = [1, 2, 15, 16, 17, 64, 127, 128, 129, 300, 1000, 7500]


@cache
def document() -> list[int]:
    """The demo's document, twice over, so that 7,500 tokens can be had."""
    tokens = AutoTokenizer.from_pretrained(str(MODEL))(DOCUMENT.read_text())["input_ids"]
    return tokens + tokens


def of_length(length: int) -> list[int]:
    """A prompt of so many tokens; different lengths start at different places and share no prefix."""
    start = 37 * LENGTHS.index(length) if length in LENGTHS else length
    return document()[start : start + length]
