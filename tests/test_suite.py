"""The retrieval suite: lengths, windows, and answers where they are said to be."""

import pytest
from transformers import AutoTokenizer

from tests.paths import DOCUMENT, MODEL
from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.haystack import Encoder, Item, weave
from vllm_lsa.evaluation.suite import TASKS, WINDOW, make_suite


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(MODEL))


@pytest.fixture(scope="module")
def suite(tokenizer):
    return make_suite(7, tokenizer, 1500, [DOCUMENT.read_text()], samples=4)


def test_the_suite_depends_on_its_arguments_alone(tokenizer, suite):
    documents = [DOCUMENT.read_text()]
    assert make_suite(7, tokenizer, 1500, documents, samples=4) == suite
    alone = make_suite(7, tokenizer, 1500, documents, samples=4, tasks=["multi_key"])
    assert alone == [task for task in suite if task.name == "multi_key"]
    assert make_suite(8, tokenizer, 1500, documents, samples=4) != suite


def test_prompt_and_answer_fill_the_context(suite):
    assert len(suite) == 2 * 4 * len(TASKS)
    assert all(len(task.tokens) == 1500 and task.answer_span[1] == 1500 for task in suite)


def test_windows_hold_the_question_or_its_last_word_only(tokenizer, suite):
    for before, inside in zip(suite[::2], suite[1::2], strict=True):
        assert (before.variant, inside.variant) == ("before", "inside") and before.tokens == inside.tokens
        end = inside.answer_span[1]
        assert inside.prompt_tokens[inside.window_start :] == inside.question_tokens
        assert end - inside.window_start <= WINDOW
        last_word = tokenizer.decode(before.prompt_tokens[before.window_start :])
        assert " " not in last_word.strip()
        assert inside.window_start < before.window_start < before.answer_span[0]


def test_answers_are_in_the_document_and_read_as_they_should(tokenizer, suite):
    for task in suite:
        text = tokenizer.decode(task.prompt_tokens)
        assert tokenizer.decode(task.answer_tokens) == task.answer_text
        asked = text.rpartition("\n\nQuestion: ")[0]
        for word in task.answer_text.replace(" and ", ", ").split(", "):
            assert word.strip() in asked, (task.name, word)


def test_depths_are_spread_and_true(tokenizer):
    tasks = make_suite(1, tokenizer, 4000, [DOCUMENT.read_text()], samples=5, tasks=["single_needle"])[::2]
    assert [round(task.depth, 1) for task in tasks] == [0.1, 0.3, 0.5, 0.7, 0.9]
    for task in tasks:
        place = tokenizer.decode(task.prompt_tokens).index(f"is{task.answer_text}.")
        assert place / len(tokenizer.decode(task.prompt_tokens)) == pytest.approx(task.depth, abs=0.06)


def test_scores(tokenizer, suite):
    task = next(task for task in suite if task.name == "single_needle")
    assert task.is_predicted(task.answer_tokens) and not task.is_predicted([*task.answer_tokens[:-1], 0])
    assert task.share_predicted([*task.answer_tokens[:-1], 0]) == pytest.approx(1 - 1 / len(task.answer_tokens))
    two = next(task for task in suite if task.name == "multi_query")
    wrong = [0 if tokenizer.decode([token]) == " and" else token for token in two.answer_tokens]
    assert wrong != two.answer_tokens and two.is_predicted(wrong)
    answer = task.answer_text.strip()
    assert task.is_answered(f" {answer}.") and task.is_answered(answer)
    assert not task.is_answered(f"{answer}7") and not task.is_answered(f"not {answer}")


def test_short_documents_are_joined(tokenizer):
    (task, _) = make_suite(0, tokenizer, 800, ["A bird.", "A worm.\n"], samples=1, tasks=["single_needle"])
    assert len(task.tokens) == 800


def test_what_cannot_be_made_is_refused(tokenizer):
    with pytest.raises(LsaError, match="no task riddle"):
        make_suite(0, tokenizer, 800, ["A bird."], tasks=["riddle"])
    with pytest.raises(LsaError, match="no documents"):
        make_suite(0, tokenizer, 800, [" "])
    with pytest.raises(LsaError, match="too few"):
        make_suite(0, tokenizer, 40, ["A bird."])


def test_items_keep_their_order_and_join_sentences(tokenizer):
    encoder = Encoder(tokenizer)
    filler = encoder.encode("Mr. Newton saw it. He wrote it down.\nThen he slept. " * 40)
    items = [Item(0.5, [("First.", False)]), Item(0.5, [("Second is", False), (" 123", True), (".", False)])]
    placed = weave(encoder, filler, 300, items, [("\n\nEnd", False)])
    text = encoder.decode(placed.tokens)
    assert len(placed.tokens) == 300 and text.endswith("\n\nEnd")
    assert ". First. Second is 123." in text and "Mr. First" not in text
    ((a, b),) = placed.answers
    assert encoder.decode(placed.tokens[a:b]) == "123"
