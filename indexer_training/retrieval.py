"""Synthetic documents for training that cannot be predicted without looking back: real text with things hidden in it.

Each kind hides facts in filler and asks for them later, in several phrasings, between more filler and at the end. The
words and the numbers are not those of the evaluation's suite.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from indexer_training.words import NAMES, NOUNS, PLACES
from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.haystack import Encoder, Item, Part, number, weave

NEAR = 0.1  # share of a document that lies between a fact and its question at least


@dataclass(frozen=True)
class Sample:
    """A document: its tokens, and ranges [first, one past the last) of those whose right prediction takes retrieval."""

    tokens: list[int]
    answers: list[tuple[int, int]]


# (fact, ways to ask for it): formatted with `key` and, in facts, `value`; the answer follows the question.
TEMPLATES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "The secret code of {key} is {value}.",
        (
            "Question: What is the secret code of {key}? Answer: The secret code of {key} is",
            "As was said before, the secret code of {key} is",
            "The secret code of {key} is",
            "Q: Do you remember the code of {key}?\nA: Yes, the secret code of {key} is",
        ),
    ),
    (
        "One of the special magic numbers for {key} is: {value}.",
        (
            "What is the special magic number for {key} mentioned in the text? The special magic number for {key} is:",
            "Question: Which magic number belongs to {key}? Answer:",
        ),
    ),
    (
        "Please note that the {key} has the serial number {value}.",
        (
            "User: What was the serial number of the {key}?\nAssistant: The {key} has the serial number",
            "The label says that the {key} has the serial number",
        ),
    ),
    (
        "The password for the {key} account is {value}.",
        (
            "To open the {key} account, enter the password",
            "Question: What is the password for the {key} account? Answer: The password for the {key} account is",
        ),
    ),
    (
        "The best thing to do with a {key} is to take it to {value}.",
        (
            "Question: What is the best thing to do with a {key}? Answer: Take it to",
            "And again: the best thing to do with a {key} is to take it to",
        ),
    ),
)


def _value(rng: random.Random) -> str:
    """What is asked for: mostly numbers of 4 to 8 digits, else names, letters or words."""
    roll = rng.random()
    if roll < 0.6:
        return number(rng, rng.choice((4, 5, 6, 6, 6, 7, 8)))
    if roll < 0.75:
        return rng.choice(PLACES)
    if roll < 0.9:
        return f"{rng.choice(NOUNS)}-{rng.choice(NOUNS)}"
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(6))


def _asking(rng: random.Random, after: float, question: str, answer: str, end: str = ".") -> Item:
    """A question with its answer at a random depth behind `after`, often at the end of the document."""
    earliest = min(after + NEAR, 1.0)
    depth = rng.uniform(max(earliest, 0.95), 1.0) if rng.random() < 0.4 else rng.uniform(earliest, 1.0)
    return Item(depth, [(question, False), (f" {answer}", True), (end, False)])


def needles(rng: random.Random, encoder: Encoder, filler: Sequence[int], length: int) -> list[Item]:
    """Single facts, each asked for once or twice."""
    items = []
    for key in rng.sample(NOUNS, rng.randint(1, 2 + length // 400)):
        fact, questions = rng.choice(TEMPLATES)
        value, depth = _value(rng), rng.uniform(0, 0.85)
        items.append(Item(depth, [(fact.format(key=key, value=value), False)]))
        for question in rng.sample(questions, rng.randint(1, 2)):
            items.append(_asking(rng, depth, question.format(key=key), value))
    return items


def key_values(rng: random.Random, encoder: Encoder, filler: Sequence[int], length: int) -> list[Item]:
    """A list of keys with values, as lines, JSON or prose, and look-ups of some of them."""
    keys = rng.sample(NOUNS, min(200, rng.randint(4, max(5, length // 48))))
    values = [number(rng, 5) if rng.random() < 0.7 else rng.choice(NAMES) for _ in keys]
    line, ask = rng.choice(
        (
            ("{key}: {value}", "{key}:"),
            ('  "{key}": "{value}",', '  "{key}": "'),
            ("{key} = {value}", "print({key})  # prints"),
            ("The {key} belongs to shelf {value}.", "Where is the {key}? The {key} belongs to shelf"),
        )
    )
    depth = rng.uniform(0, 0.7)
    head = rng.choice(("Table", "Record", "Inventory", "Settings"))
    lines = "\n".join(line.format(key=key, value=value) for key, value in zip(keys, values, strict=True))
    items = [Item(depth, [(f"\n\n{head}:\n{lines}\n\n", False)])]
    for i in rng.sample(range(len(keys)), min(len(keys), rng.randint(2, 8))):
        if ask.endswith('"'):  # the quote belongs to the question, so no blank before the answer
            parts: list[Part] = [(f"\nFrom the {head.lower()}:\n{ask.format(key=keys[i])}", False), (values[i], True)]
            items.append(Item(rng.uniform(depth + NEAR, 1.0), [*parts, ('",\n', False)]))
        else:
            asking = _asking(rng, depth, f"\nFrom the {head.lower()}: {ask.format(key=keys[i])}", values[i], "\n")
            items.append(asking)
    return items


def multi_hop(rng: random.Random, encoder: Encoder, filler: Sequence[int], length: int) -> list[Item]:
    """Chains of facts in any order; the answer walks along them, so that each step needs another fact."""
    items = []
    for _ in range(rng.randint(1, 1 + length // 1500)):
        person, place, (box, thing) = rng.choice(NAMES), rng.choice(PLACES), rng.sample(NOUNS, 2)
        code = number(rng, 5)
        facts = [
            f"{person} went to {place} with the {box}.",
            f"Inside the {box} there was a {thing}.",
            f"On the {thing} somebody had written {code}.",
        ]
        depths = [rng.uniform(0, 0.8) for _ in facts]
        items += [Item(depth, [(fact, False)]) for depth, fact in zip(depths, facts, strict=True)]
        parts: list[Part] = [(f"Question: Which number did {person} carry? Answer: {person} went to", False)]
        parts += [(f" {place}", True), (" with the", False), (f" {box}", True), (". Inside it there was a", False)]
        parts += [(f" {thing}", True), (", on which somebody had written", False), (f" {code}", True), (".", False)]
        items.append(Item(rng.uniform(max(depths) + NEAR, 1.0), parts))
    return items


def variables(rng: random.Random, encoder: Encoder, filler: Sequence[int], length: int) -> list[Item]:
    """Assignments, some of them from other variables; values are asked for directly and along the chain."""
    items: list[Item] = []
    names = [f"{noun}_{rng.randint(1, 99)}" for noun in rng.sample(NOUNS, 3 * rng.randint(1, 2 + length // 1500))]
    for first, second, third in zip(names[::3], names[1::3], names[2::3], strict=True):
        value = number(rng, 5)
        depths = sorted(rng.uniform(0, 0.8) for _ in range(3))
        lines = (f"{first} = {value}", f"{second} = {first}", f"{third} = {second}")
        for depth, line in zip(depths, lines, strict=True):
            items.append(Item(depth, [(f"\n{line}\n", False)]))
        parts: list[Part] = [(f"\n# trace of {third}: {third} ->", False), (f" {second}", True), (" ->", False)]
        parts += [(f" {first}", True), (" ->", False), (f" {value}", True), ("\n", False)]
        items.append(Item(rng.uniform(depths[2] + NEAR, 1.0), parts))
        if rng.random() < 0.5:
            items.append(_asking(rng, depths[0], f"\n# the value of {first} is", value, "\n"))
    return items


def copying(rng: random.Random, encoder: Encoder, filler: Sequence[int], length: int) -> list[Item]:
    """Passages that come again word for word; their first tokens say which passage it is, the rest is asked for."""
    items: list[Item] = []
    for _ in range(rng.randint(1, 1 + length // 2000)):
        count = max(8, min(rng.randint(32, 128), length // 16))
        cue = min(12, count // 2)
        first = rng.randrange(max(1, len(filler) - count))
        passage = list(filler[first : first + count])
        depth = rng.uniform(0, 0.85)
        introduction = rng.choice(("As we read above:", "To quote from the text:", "Again, word for word:"))
        items.append(Item(depth, [("\n\n", False), (passage, False), ("\n\n", False)]))
        parts: list[Part] = [(f"\n{introduction}\n", False), (passage[:cue], False), (passage[cue:], True)]
        items.append(Item(rng.uniform(min(depth + NEAR, 1.0), 1.0), [*parts, ("\n\n", False)]))
    return items


KINDS: dict[str, Callable[[random.Random, Encoder, Sequence[int], int], list[Item]]] = {
    "needles": needles,
    "key_values": key_values,
    "multi_hop": multi_hop,
    "variables": variables,
    "copying": copying,
}


def make(seed: int, kind: str, tokenizer: Any, filler_tokens: Sequence[int], length: int) -> Sample:
    """One document of exactly `length` tokens; the same arguments make the same one.

    Parameters
    ----------
    kind
        One of KINDS, or "mixed": all of them in one document, some if it is short.
    tokenizer
        A Hugging Face tokenizer, or an `Encoder` of one (quicker when many samples are made).
    filler_tokens
        Tokens of real text, used from their beginning; `length` of them are enough, fewer are repeated.

    Raises
    ------
    LsaError
        No such kind, no filler, or so short a `length` that nothing fits (256 is always enough).
    """
    if kind != "mixed" and kind not in KINDS:
        raise LsaError(f"retrieval text: no kind {kind}; there are {', '.join(KINDS)} and mixed")
    encoder = tokenizer if isinstance(tokenizer, Encoder) else Encoder(tokenizer)
    rng = random.Random(f"{seed} {kind}")
    for share in (1, 2, 4, 8, 16, 32):  # fewer things where they would leave less than half of the room to filler
        kinds = rng.sample(list(KINDS), max(1, len(KINDS) // share)) if kind == "mixed" else [kind]
        items = [item for name in kinds for item in KINDS[name](rng, encoder, filler_tokens, length // share)]
        taken = sum(len(encoder.encode(p) if isinstance(p, str) else p) + 2 for item in items for p, _ in item.parts)
        if taken <= length // 2 or share == 32:
            break
    placed = weave(encoder, filler_tokens, length, items)
    return Sample(placed.tokens, sorted(placed.answers))
