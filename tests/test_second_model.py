"""The second model's training data and loop, at sizes that take seconds."""

import random
from itertools import groupby

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import second_model
from benchmarks.second_model import ANSWER_WEIGHT, FILLER_WEIGHT, Batches, Trainer
from tests.paths import DOCUMENT, MODEL
from vllm_lsa.evaluation.haystack import Encoder

SIZES = "--context 256 --hidden 32 --layers 2 --heads 2 --kv-heads 1 --head-dim 16 --no-compile --device cpu".split()


@pytest.fixture(scope="module")
def encoder():
    return Encoder(AutoTokenizer.from_pretrained(str(MODEL)))


@pytest.fixture(scope="module")
def stream(encoder):
    return torch.tensor(encoder.encode(DOCUMENT.read_text()), dtype=torch.int32)


@pytest.fixture(scope="module")
def dataset(encoder, stream):
    return Batches(stream, encoder, seed=0, batch_tokens=512)


@pytest.fixture
def trainer(encoder):
    args = second_model.parse(["--tokenizer", "-", "--text", "-", "--out", "-", *SIZES, "--dropout", "0"])
    return Trainer(second_model.build(args, encoder.tokenizer), args)


def test_batches_depend_on_seed_index_and_length_alone(dataset, encoder, stream):
    for key in ((0, 256), (7, 256), (7, 512)):
        batch, again = dataset[key], Batches(stream, encoder, 0, 512)[key]
        assert torch.equal(batch.tokens, again.tokens) and torch.equal(batch.weights, again.weights)
        assert batch.tokens.shape == (2, key[1] + 1) and batch.weights.shape == (2, key[1])
    firsts = [dataset[0, 256], dataset[1, 256], Batches(stream, encoder, 1, 512)[0, 256]]
    assert not any(torch.equal(a.tokens[1], b.tokens[1]) for a, b in zip(firsts, firsts[1:] + firsts[:1], strict=True))


def test_the_tokens_after_heavy_places_are_answers(encoder, stream):
    tokens, weights = second_model.sequence(random.Random(3), stream, encoder, 512, "needles")
    assert set(weights.tolist()) == {torch.tensor(FILLER_WEIGHT).item(), ANSWER_WEIGHT}
    heavy = [i for i, weight in enumerate(weights.tolist()) if weight == ANSWER_WEIGHT]
    for _, group in groupby(enumerate(heavy), lambda pair: pair[1] - pair[0]):  # of neighbours
        run = [i for _, i in group]
        answer, before = encoder.decode([tokens[i + 1] for i in run]).strip(), encoder.decode(tokens[: run[0] + 1])
        assert answer and answer in before and not before.endswith(answer)


def test_even_rows_are_text_that_weighs_one(dataset, encoder, stream):
    batch = dataset[2, 256]
    assert (batch.weights[::2] == 1).all() and (batch.weights[1::2] != 1).all()
    assert (batch.weights[1::2] == ANSWER_WEIGHT).any(-1).all()
    assert encoder.decode(batch.tokens[0].tolist()) in encoder.decode(stream.tolist())


def test_loss_and_gradients_in_pieces_are_those_of_the_whole(trainer, dataset):
    batch = trainer.move(dataset[0, 256])
    trainer.chunk = 300  # several, of which the last is shorter
    hidden, losses = trainer.backward(batch)
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.clear()
    logits = trainer.model(input_ids=batch.tokens[:, :-1]).logits
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    (whole * batch.weights.flatten() / batch.weights.sum()).sum().backward()
    torch.testing.assert_close(losses.flatten(), whole.detach(), rtol=1e-4, atol=1e-4)
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5)
    answers = batch.weights > 1
    assert torch.equal(trainer.right(hidden, batch), (logits.argmax(-1) == batch.tokens[:, 1:])[answers])


def test_training_lowers_the_loss(trainer, dataset):
    batch = trainer.move(dataset[0, 256])
    means = []
    for _ in range(4):
        means.append(float(trainer.backward(batch)[1].mean()))
        trainer.update(0.5)
    assert means == sorted(means, reverse=True)


def test_lengths_and_rates_follow_the_time():
    lengths = second_model.lengths_until(4096)
    assert lengths == [512, 1024, 2048, 4096] and second_model.lengths_until(256) == [256]
    shares = [i / 100 for i in range(101)]
    assert sorted({second_model.length_at(share, lengths) for share in shares}) == lengths
    assert [second_model.length_at(share, lengths) for share in (0.0, 0.5, 1.0)] == [512, 4096, 4096]
    rates = [second_model.rate_at(share) for share in shares]
    assert 0 < rates[0] < 0.1 and rates[10] == rates[75] == 1 and 0.4 < rates[87] < 0.6 and rates[100] == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (["--text", "/nowhere"], "--text /nowhere is not a folder"),
        (["--tokenizer", "/nowhere"], "--tokenizer /nowhere is not a folder"),
        (["--context", "64"], "--context 64 is too short"),
        (["--kv-heads", "3"], "no multiple of --kv-heads 3"),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, change, message):
    base = ["--tokenizer", str(MODEL), "--text", str(tmp_path), "--out", str(tmp_path / "out"), *SIZES]
    assert second_model.main([*base, *change]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "note").write_text("mine")
    base = ["--tokenizer", str(MODEL), "--text", str(tmp_path), "--out", str(tmp_path), *SIZES]
    assert second_model.main(base) == 2
    assert f"--out {tmp_path} is not empty" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


def test_what_is_saved_loads(trainer, tmp_path):
    out = tmp_path / "out"
    second_model.save(trainer.model, MODEL, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == "qwen3" and model.config.head_dim == 16 and model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size
