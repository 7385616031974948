"""A suite of retrieval tasks in the manner of RULER (arXiv 2404.06654), made from a seed and real documents.

Every prompt is plain text for completion, ending in "... Question: What is the secret code of apple? Answer: The
secret code of apple is", and has one right continuation. Prompt and answer together have exactly the context length.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.haystack import Encoder, Item, number, weave
from vllm_lsa.evaluation.words import FIRST_NAMES, LAST_NAMES, NOUNS, PROFESSIONS, TOWNS

WINDOW = 64  # tokens decoded sparsely at most: the question, if it is inside, and the answer
VARIANTS = ("before", "inside")


@dataclass(frozen=True)
class Task:
    """One prompt and its right continuation.

    Attributes
    ----------
    name, index
        Which task of the suite, which sample of it. The variants of a sample have the same tokens.
    variant
        "before": all of the question but its last word lies before the window that is decoded sparsely; "inside": the
        whole question lies in it, so that nothing computed before can know what will be asked.
    depth
        Where what is asked for stands (its first part, if it has several): share of the tokens before the question.
    question_tokens
        The end of the prompt.
    scored
        Places in `answer_tokens` that are judged: those of values, not the "and" between them.
    window_start
        Index of the first token that is decoded sparsely; at most WINDOW tokens from there to the end of the answer.
    """

    name: str
    index: int
    variant: str
    depth: float
    prompt_tokens: list[int]
    question_tokens: list[int]
    answer_tokens: list[int]
    answer_text: str
    scored: list[int]
    window_start: int

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer, for teacher forcing."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def answer_span(self) -> tuple[int, int]:
        """First token of the answer in `tokens`, and one past its last; token i is predicted at position i - 1."""
        return len(self.prompt_tokens), len(self.prompt_tokens) + len(self.answer_tokens)

    def is_predicted(self, predicted: Sequence[int]) -> bool:
        """Whether `predicted`, the most likely token for each place of the answer, teacher-forced, is right."""
        return self.share_predicted(predicted) == 1

    def share_predicted(self, predicted: Sequence[int]) -> float:
        """Share of the scored tokens that are right: partial credit where several values are asked for."""
        return sum(predicted[i] == self.answer_tokens[i] for i in self.scored) / len(self.scored)

    def is_answered(self, generated: str) -> bool:
        """Whether text generated after the prompt begins with the answer, as whole words."""
        answer = self.answer_text.strip()
        return re.match(re.escape(answer) + r"(?!\w)", generated.strip()) is not None


@dataclass(frozen=True)
class Plot:
    """What a task puts into a document. `asked`: the fact whose place is the depth. `facts`: (depth, text)."""

    facts: list[tuple[float, str]]
    question: str
    last_word: str
    answer: str
    asked: int = 0


def _and(words: Sequence[str]) -> str:
    return " and ".join(words)


def _code(noun: str, code: str) -> str:
    return f"The secret code of {noun} is {code}."


def _several(rng: random.Random, depth: float, count: int) -> tuple[list[str], list[str], list[tuple[float, str]]]:
    """Nouns, their codes and the facts that say so, the first at `depth`, the others anywhere."""
    nouns = rng.sample(NOUNS, count)
    codes = [number(rng) for _ in nouns]
    depths = [depth, *(rng.random() for _ in nouns[1:])]
    facts = [(d, _code(noun, code)) for d, noun, code in zip(depths, nouns, codes, strict=True)]
    return nouns, codes, facts


def single_needle(rng: random.Random, depth: float) -> Plot:
    """One code."""
    noun, code = rng.choice(NOUNS), number(rng)
    ask = f"What is the secret code of {noun}? Answer: The secret code of {noun}"
    return Plot([(depth, _code(noun, code))], ask, " is", f" {code}")


def multi_key(rng: random.Random, depth: float) -> Plot:
    """Eight codes, one asked for."""
    nouns, codes, facts = _several(rng, depth, 8)
    ask = f"What is the secret code of {nouns[0]}? Answer: The secret code of {nouns[0]}"
    return Plot(facts, ask, " is", f" {codes[0]}")


def multi_value(rng: random.Random, depth: float) -> Plot:
    """Two codes of one thing, both asked for in their order."""
    noun, codes = rng.choice(NOUNS), [number(rng, 5) for _ in range(2)]
    depths = [depth, rng.uniform(depth, 1.0)]
    facts = [
        (d, f"The {which} secret code of {noun} is {code}.")
        for d, which, code in zip(depths, ("first", "second"), codes, strict=True)
    ]
    ask = f"What are the secret codes of {noun}? Answer: The first and the second secret code of {noun}"
    return Plot(facts, ask, " are", f" {_and(codes)}")


def multi_query(rng: random.Random, depth: float) -> Plot:
    """Four codes, two asked for."""
    nouns, codes, facts = _several(rng, depth, 4)
    asked = f"the secret codes of {_and(nouns[:2])}"
    return Plot(facts, f"What are {asked}? Answer: T{asked[1:]}", " are", f" {_and(codes[:2])}")


def variable_tracking(rng: random.Random, depth: float) -> Plot:
    """A value handed from variable to variable, among another such chain; the value of the last one is asked for."""
    names = rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 6)
    facts: list[tuple[float, str]] = []
    values: list[str] = []
    for chain in (names[:3], names[3:]):
        values.append(number(rng, 5))
        depths = sorted(rng.random() for _ in chain) if facts else [depth, *sorted(rng.uniform(depth, 1) for _ in "ab")]
        texts = [f"The variable {chain[0]} has the value {values[-1]}."]
        texts += [f"The variable {name} is equal to {source}." for source, name in pairwise(chain)]
        facts += zip(depths, texts, strict=True)
    first, middle, last = names[:3]
    path = f"The variable {last} is equal to {middle}, {middle} is equal to {first}, and the variable {first} has the"
    return Plot(facts, f"What is the value of {last}? Answer: {path}", " value", f" {values[0]}")


def common_words(rng: random.Random, depth: float) -> Plot:
    """Lists of words scattered over the document; one word is in all of them, three others each are in one."""
    words = rng.sample(NOUNS, 25)
    common, others = words[0], words[1:]
    facts = []
    for i in range(8):
        entries = [*others[3 * i : 3 * i + 3], common, common, common]
        rng.shuffle(entries)
        facts.append((depth if i == 0 else rng.random(), f"\nList of common words: {', '.join(entries)}.\n"))
    ask = "Which word is most common in the lists? Answer: List of the most common"
    return Plot(facts, ask, " words:", f" {common}")


def document_qa(rng: random.Random, depth: float) -> Plot:
    """A fact about a person, said in passing; questions about other persons' facts of the same kind would differ."""
    persons = [f"{rng.choice(FIRST_NAMES)} {last}" for last in rng.sample(LAST_NAMES, 4)]
    towns, trades = rng.sample(TOWNS, 4), rng.sample(PROFESSIONS, 4)
    facts = []
    for i, (person, town, trade) in enumerate(zip(persons, towns, trades, strict=True)):
        article = "an" if trade[0] in "aeiou" else "a"
        text = f"In those years {person}, {article} {trade} by profession, was living in the city of {town}."
        facts.append((depth if i == 0 else rng.random(), text))
    if rng.random() < 0.5:
        ask = f"In which city was {persons[0]} living? Answer: {persons[0]} was living in the city"
        return Plot(facts, ask, " of", f" {towns[0]}")
    article = "an" if trades[0][0] in "aeiou" else "a"
    ask = f"What was the profession of {persons[0]}? Answer: By profession, {persons[0]} was"
    return Plot(facts, ask, f" {article}", f" {trades[0]}")


TASKS: dict[str, Callable[[random.Random, float], Plot]] = {
    "single_needle": single_needle,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "multi_query": multi_query,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "document_qa": document_qa,
}


def excerpt(encoder: Encoder, rng: random.Random, documents: Sequence[str], count: int) -> list[int]:
    """`count` tokens from a random place of a random document, then from the following documents."""
    first = rng.randrange(len(documents))
    start = rng.randrange(max(1, len(documents[first]) - 4 * count))
    start = max(documents[first].rfind("\n\n", 0, start) + 2, 0) if start else 0
    tokens: list[int] = []
    for i in range(len(documents)):
        text = documents[(first + i) % len(documents)][start:]
        tokens += encoder.encode(text[: 12 * (count - len(tokens))])  # no tokenizer needs 12 characters a token
        start = 0
        if len(tokens) >= count:
            break
    return tokens[:count]


def make_task(
    name: str, index: int, depth: float, rng: random.Random, encoder: Encoder, context: int, documents: Sequence[str]
) -> list[Task]:
    """One sample in both variants."""
    plot = TASKS[name](rng, depth)
    answer: list[int] = []
    scored: list[int] = []
    for i, value in enumerate(plot.answer.split(" and ")):
        answer += encoder.encode(" and") if i else []
        tokens = encoder.encode(f" {value.strip()}")
        scored += range(len(answer), len(answer) + len(tokens))
        answer += tokens
    last_word = encoder.encode(plot.last_word)
    question = encoder.encode(f"\n\nQuestion: {plot.question}") + last_word
    items = [Item(d, [(text, False)]) for d, text in plot.facts]
    if len(question) + len(answer) > WINDOW:
        raise LsaError(f"suite: question and answer of {name} take more than {WINDOW} tokens with this tokenizer")
    filler = excerpt(encoder, rng, documents, context)
    placed = weave(encoder, filler, context, items, [(question + answer, False)])
    prompt = placed.tokens[: context - len(answer)]
    before_question = len(prompt) - len(question)
    at = placed.starts[plot.asked] / before_question
    window_starts = {"before": len(prompt) - len(last_word), "inside": before_question}
    return [
        Task(name, index, variant, at, prompt, question, answer, plot.answer, scored, window_starts[variant])
        for variant in VARIANTS
    ]


def make_suite(
    seed: int,
    tokenizer: Any,
    context: int,
    documents: Sequence[str],
    samples: int = 20,
    tasks: Sequence[str] = tuple(TASKS),
) -> list[Task]:
    """`samples` samples of each task in both variants; same arguments, same suite.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer.
    context
        Tokens of prompt and answer together.
    documents
        Texts to hide things in, best held out from training; parts of them are joined if they are short.
    samples
        Depths are spread evenly: sample i is asked about the depth (i + 1/2) / samples.

    Raises
    ------
    LsaError
        No such task, no documents, or a context too short for a task.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise LsaError(f"suite: no task {unknown[0]}; there are {', '.join(TASKS)}")
    if not any(text.strip() for text in documents):
        raise LsaError("suite: no documents to hide anything in")
    encoder = Encoder(tokenizer)
    made = []
    for name in tasks:
        for index in range(samples):
            rng = random.Random(f"{seed} {name} {index}")  # a string: the same with other tasks and numbers of samples
            made += make_task(name, index, (index + 0.5) / samples, rng, encoder, context, documents)
    return made
