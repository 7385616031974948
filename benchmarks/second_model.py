"""Trains a small Qwen3-style model from scratch: a second architecture, with qk-norm, on which to show the indexer.

    python -m benchmarks.second_model --tokenizer MODEL --text DIR --out OUT --seconds 420

Half of what it reads is text, half is text with things hidden in it that are asked for later
(`indexer_training.retrieval`), so that it learns to look back. Sequences get longer as the time goes by. OUT is a
Hugging Face folder with training.json beside the model: what it cost and what came of it.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.report import machine
from indexer_training.documents import read_documents
from indexer_training.retrieval import KINDS, make
from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.haystack import Encoder

LENGTHS = (512, 1024, 2048)  # before --context: heads that look back form sooner in short sequences
LAST_PHASE = 0.5  # share of the time at --context; the shorter lengths share the rest
WARMUP, DECAY = 0.02, 0.25  # shares of the time
ANSWER_WEIGHT = 5.0  # of an answer's token in the loss: they are few
FILLER_WEIGHT = 0.2  # of the text around them, which was seen many times as text
DRAWN = (*KINDS, "mixed", "mixed")
HELD_OUT = 20  # one document of so many is not trained on
EVALUATED = 16  # sequences of each kind at the end
CHUNK = {"cuda": 8192, "cpu": 512}  # tokens whose logits exist at a time
LOG_SECONDS = 2.0
BAR = "{n:.0f}/{total:.0f} s {bar:20} {postfix}"
ROPE_THETA = 100_000.0  # a third of the dimensions hardly turn within 4096 tokens: content, not place
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


class Batch(NamedTuple):
    """Sequences of L + 1 tokens, int32 [B, L + 1]; loss weights of the last L of them, float32 [B, L].

    Even rows are text, with weights of 1; odd rows are retrieval, where only answers weigh more than 1.
    """

    tokens: Tensor
    weights: Tensor


def sequence(
    rng: random.Random, stream: Tensor, encoder: Encoder, length: int, kind: str | None
) -> tuple[list[int], Tensor]:
    """`length` + 1 tokens and the loss weights of all but the first: text, or retrieval of a kind hidden in it."""
    start = rng.randrange(len(stream) - length)
    window = [*encoder.prefix, *stream[start : start + length + 1].tolist()][: length + 1]
    if kind is None:
        return window, torch.ones(length)
    made = make(rng.getrandbits(62), kind, encoder, window, length + 1)
    weights = torch.full((length,), FILLER_WEIGHT)
    for first, end in made.answers:
        weights[first - 1 : end - 1] = ANSWER_WEIGHT  # position i predicts token i + 1
    return made.tokens, weights


class Batches(Dataset[Batch]):
    """Batch `index` of sequences of `length`, at [index, length]: the same for the same seed, whoever makes it."""

    def __init__(self, stream: Tensor, encoder: Encoder, seed: int, batch_tokens: int) -> None:
        self.stream = stream
        self.encoder = encoder
        self.seed = seed
        self.batch_tokens = batch_tokens

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        index, length = key
        rows = []
        for row in range(max(2, self.batch_tokens // length)):
            rng = random.Random(f"{self.seed} {index} {length} {row}")
            kind = rng.choice(DRAWN) if row % 2 else None
            rows.append(sequence(rng, self.stream, self.encoder, length, kind))
        return stack(rows)


def stack(rows: Sequence[tuple[list[int], Tensor]]) -> Batch:
    """Rows of `sequence`, of one length, as a batch."""
    return Batch(
        torch.tensor([tokens for tokens, _ in rows], dtype=torch.int32), torch.stack([weights for _, weights in rows])
    )


def lengths_until(context: int) -> list[int]:
    """The lengths of the phases."""
    return [length for length in LENGTHS if length < context] + [context]


def length_at(share: float, lengths: Sequence[int]) -> int:
    """The length of sequences after a share of the time."""
    if share >= 1 - LAST_PHASE or len(lengths) == 1:
        return lengths[-1]
    return lengths[int(share / (1 - LAST_PHASE) * (len(lengths) - 1))]


def rate_at(share: float) -> float:
    """The learning rate after a share of the time, over the highest: warm-up, stable, linear decay."""
    return min(1.0, (share + 1e-3) / WARMUP, max(0.0, 1 - share) / DECAY)


class Clock:
    """Seconds since the beginning, and what share of the time for training is over; 0 until that is started."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.training: tuple[float, float] | None = None

    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def train_until(self, end: float) -> None:
        """The time for training is from now to `end`, in seconds since the beginning."""
        now = self.seconds()
        if end <= now:
            raise LsaError(
                f"--seconds: {now:.0f} s went by before the first step; give at least {2 * now - end:.0f} more"
            )
        self.training = now, end

    def share(self) -> float:
        if self.training is None:
            return 0.0
        begin, end = self.training
        return min(1.0, (self.seconds() - begin) / (end - begin))


def keys(clock: Clock, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """What the loader asks `Batches` for, without end; lengths are those of the moment."""
    index = 0
    while True:
        yield index, length_at(clock.share(), lengths)
        index += 1


def load_text(folder: Path, tokenizer: Any, context: int) -> tuple[Tensor, Tensor]:
    """Tokens of all documents one after the other, int32, and of those held out. Raises LsaError if too short."""
    texts = [document.text + "\n\n" for document in read_documents(folder)]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # at once: uses all cores
    parts: tuple[list[int], list[int]] = ([], [])
    for i, tokens in enumerate(encoded):
        parts[i % HELD_OUT == HELD_OUT // 2].extend(tokens)
    if min(map(len, parts)) < context + 2:
        raise LsaError(
            f"--text {folder}: {HELD_OUT // 2 + 1} documents and {context + 2} tokens held out are needed, there are "
            f"{len(texts)} and {len(parts[1])}: add documents, or lower --context"
        )
    stream, held_out = (torch.tensor(part, dtype=torch.int32) for part in parts)
    return stream.share_memory_(), held_out


def build(args: argparse.Namespace, tokenizer: Any) -> Any:
    """The model before training, with dropout where it writes to the residual."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(args.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.context,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config).to(args.device)
    if args.dropout:

        def drop(module: torch.nn.Module, _: Any, output: Tensor) -> Tensor:
            return F.dropout(output, args.dropout, module.training)

        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(drop)
            layer.mlp.down_proj.register_forward_hook(drop)
    return model


def make_optimizers(model: Any, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (unless --no-muon), AdamW for the rest; group["base"] is the highest rate."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2 and args.muon]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    groups = [
        {"params": [p for p in others if p.ndim == 2], "weight_decay": args.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, lr=args.rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def token_losses(hidden: Tensor, head: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The cross-entropy of each token; logits in `dtype`, their logarithms in 32 bits."""
    logits = F.linear(hidden.to(dtype), head.to(dtype))
    return F.cross_entropy(logits.float(), labels, reduction="none")


class Trainer:
    """Model, optimizers and how a pass over a batch is done."""

    def __init__(self, model: Any, args: argparse.Namespace) -> None:
        self.model = model
        self.optimizers = make_optimizers(model, args)
        self.rate = args.rate
        self.device = torch.device(args.device)
        # CPUs without instructions for 16 bits are far slower with them.
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.chunk = CHUNK[self.device.type]
        self.losses: Callable[..., Tensor] = token_losses
        if args.compile:
            # fullgraph: what cannot be compiled, or too often has to be, is an error and not quietly slow.
            for layer in model.model.layers:
                layer.compile(fullgraph=True)
            self.losses = torch.compile(token_losses, fullgraph=True)

    def hidden(self, batch: Batch) -> Tensor:
        """The last layer's output for all but the last tokens, [B, L, hidden]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            states = self.model.model(input_ids=batch.tokens[:, :-1], use_cache=False)
        return states.last_hidden_state

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Adds gradients of the weighted mean loss; returns what `hidden` gives and each token's loss, [B, L]."""
        hidden = self.hidden(batch)
        flat = hidden.flatten(0, 1)
        # Each piece's logits are gone before the next one's are made; the layers then get all gradients at once.
        pieces = [piece.detach().requires_grad_() for piece in flat.split(self.chunk)]
        shares = (batch.weights / batch.weights.sum()).flatten().split(self.chunk)
        labels = batch.tokens[:, 1:].flatten().split(self.chunk)
        losses = []
        for piece, label, share in zip(pieces, labels, shares, strict=True):
            loss = self.losses(piece, self.model.lm_head.weight, label, self.dtype)
            (loss * share).sum().backward()
            losses.append(loss.detach())
        flat.backward(torch.cat([piece.grad for piece in pieces if piece.grad is not None]))
        return hidden.detach(), torch.cat(losses).view_as(batch.weights)

    def update(self, share: float) -> None:
        """One step of the optimizers at the rate of this share of the time."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * rate_at(share)
            optimizer.step()
        self.clear()

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def right(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Whether each token of the answers is the likeliest one, given all before it."""
        asked = batch.weights > 1
        head = self.model.lm_head.weight.to(self.dtype)
        guessed = F.linear(hidden[asked].to(self.dtype), head).argmax(-1)
        return guessed == batch.tokens[:, 1:][asked]

    def move(self, batch: Batch) -> Batch:
        tokens = batch.tokens.to(self.device, non_blocking=True).long()
        return Batch(tokens, batch.weights.to(self.device, non_blocking=True))


class Evaluation:
    """Held-out text, and retrieval of each kind hidden in it; both of `length` tokens."""

    def __init__(self, stream: Tensor, encoder: Encoder, length: int, seed: int) -> None:
        self.rows: dict[str, list[tuple[list[int], Tensor]]] = {}
        for kind in ("text", *KINDS):
            rngs = [random.Random(f"{seed} evaluation {kind} {i}") for i in range(EVALUATED)]
            hidden = None if kind == "text" else kind
            self.rows[kind] = [sequence(rng, stream, encoder, length, hidden) for rng in rngs]

    @torch.no_grad()
    def text_loss(self, trainer: Trainer) -> float:
        """Mean loss of the text's tokens, in nats."""
        total, count = 0.0, 0
        for hidden, batch in self._passes(trainer, "text"):
            labels = batch.tokens[:, 1:].flatten().split(trainer.chunk)
            for piece, label in zip(hidden.flatten(0, 1).split(trainer.chunk), labels, strict=True):
                total += float(token_losses(piece, trainer.model.lm_head.weight, label, trainer.dtype).sum())
                count += len(label)
        return total / count

    def accuracies(self, trainer: Trainer) -> dict[str, float]:
        """Share of the answers' tokens that are the likeliest ones, by kind and over "all"."""
        right = {kind: torch.cat([trainer.right(*p) for p in self._passes(trainer, kind)]) for kind in KINDS}
        right["all"] = torch.cat(list(right.values()))
        return {kind: round(float(hits.float().mean()), 4) for kind, hits in right.items()}

    @torch.no_grad()
    def _passes(self, trainer: Trainer, kind: str) -> Iterator[tuple[Tensor, Batch]]:
        rows, at_once = self.rows[kind], 4
        trainer.model.eval()
        # Eager: without gradients the layers would be compiled again.
        with torch.compiler.set_stance("force_eager"):
            for i in range(0, len(rows), at_once):
                batch = trainer.move(stack(rows[i : i + at_once]))
                yield trainer.hidden(batch), batch
        trainer.model.train()


def train(
    trainer: Trainer, loader: Iterator[Batch], clock: Clock, evaluation: Evaluation, bar: Any
) -> list[dict[str, Any]]:
    """Steps until the time is over; what was noted every few seconds, and last what it came to."""
    history: list[dict[str, Any]] = []
    accuracies: dict[int, float] = {}
    steps, tokens, length, started, noted = 0, 0, 0, clock.seconds(), 0.0
    while (share := clock.share()) < 1:
        batch = trainer.move(next(loader))
        if length not in (0, batch.weights.shape[1]):
            loss = evaluation.text_loss(trainer)
            tqdm.write(f"after sequences of {length} tokens: loss on held-out text {loss:.3f}")
        length = batch.weights.shape[1]
        hidden, losses = trainer.backward(batch)
        trainer.update(share)
        steps, tokens = steps + 1, tokens + batch.weights.numel()
        if clock.seconds() - noted < LOG_SECONDS and clock.share() < 1:
            continue
        accuracies[length] = float(trainer.right(hidden, batch).float().mean())
        text_loss = float(losses[::2].mean())  # waits for the device, so that the rate is that of work done
        noted = clock.seconds()
        per_second = tokens / (noted - started)
        entry = {"seconds": noted, "steps": steps, "length": length, "tokens": tokens, "tokens_per_s": per_second}
        entry |= {"text_loss": text_loss, "answer_accuracy": accuracies[length]}
        history.append({name: round(value, 4) for name, value in entry.items()})
        bar.update(round(noted - bar.n, 1))
        found = ", ".join(f"{at}: {100 * value:.0f} %" for at, value in accuracies.items())
        bar.set_postfix_str(f"{per_second / 1e3:.1f}k tokens/s, text {text_loss:.2f}, answers {found}")
    return history


def start_loader(dataset: Batches, clock: Clock, lengths: Sequence[int], args: argparse.Namespace) -> Iterator[Batch]:
    """Batches made by other processes, which start now."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=keys(clock, lengths),
        num_workers=args.workers,
        prefetch_factor=2,  # as a phase ends, so many batches for each process still have its length
        pin_memory=args.device == "cuda",
        multiprocessing_context="spawn",  # neither CUDA nor the tokenizer's threads live through a fork
    )
    return iter(loader)


def save(model: Any, tokenizer: Path, out: Path) -> None:
    """The model in 16 bits and the tokenizer's files."""
    model.to(torch.bfloat16).save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, out / name)


def check(args: argparse.Namespace) -> None:
    """Fills in what is "auto". Raises LsaError for what cannot work."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise LsaError("--device cuda: there is none here; give --device cpu")
    if args.context < 256:
        raise LsaError(f"--context {args.context} is too short for retrieval; give at least 256")
    if args.heads % args.kv_heads:
        raise LsaError(f"--heads {args.heads} is no multiple of --kv-heads {args.kv_heads}")
    if not args.tokenizer.is_dir():
        raise LsaError(f"--tokenizer {args.tokenizer} is not a folder")
    if not args.text.is_dir():
        raise LsaError(f"--text {args.text} is not a folder")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise LsaError(f"--out {args.out} is not empty; delete it or name another folder")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises LsaError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise LsaError(f"--tokenizer {folder} has no tokenizer: {str(error).splitlines()[0]}") from None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything: text, training, evaluation, files. Returns what training.json says."""
    clock = Clock()
    check(args)
    tokenizer = load_tokenizer(args.tokenizer)
    stream, held_out = load_text(args.text, tokenizer, args.context)
    encoder, lengths = Encoder(tokenizer), lengths_until(args.context)
    dataset = Batches(stream, encoder, args.seed, args.batch_tokens)
    loader = start_loader(dataset, clock, lengths, args)
    evaluation = Evaluation(held_out, encoder, args.context, args.seed)
    trainer = Trainer(build(args, tokenizer), args)
    trainer.model.train()
    torch.set_float32_matmul_precision("high")
    for length in lengths if args.compile else ():
        trainer.backward(trainer.move(dataset[-1, length]))  # compiles, before the learning rate's time begins
        trainer.clear()
    prepared = clock.seconds()
    print(
        f"{clock.seconds():.0f} s: ready, loss of the untrained model {evaluation.text_loss(trainer):.2f}", flush=True
    )
    # The evaluation at the end is of so many kinds, with some room; then files are written and processes ended.
    reserve = 5 + 1.5 * (len(KINDS) + 1) * (clock.seconds() - prepared)
    clock.train_until(args.seconds - reserve)
    with tqdm(total=args.seconds, initial=round(clock.seconds(), 1), unit="s", bar_format=BAR) as bar:
        history = train(trainer, loader, clock, evaluation, bar)
    facts = summary(trainer, evaluation, history, args)
    save(trainer.model, args.tokenizer, args.out)
    facts = {"seconds": round(clock.seconds(), 1), "prepared_s": round(prepared, 1), **facts}
    facts["text_tokens"] = {"train": len(stream), "heldout": len(held_out)}
    (args.out / "training.json").write_text(json.dumps({**facts, "history": history}, indent=1) + "\n")
    return facts


def summary(
    trainer: Trainer, evaluation: Evaluation, history: Sequence[dict[str, Any]], args: argparse.Namespace
) -> dict[str, Any]:
    """What came of the training, and with what it was done."""
    return {
        **{name: history[-1][name] for name in ("steps", "tokens", "tokens_per_s")},
        "heldout_text_loss": round(evaluation.text_loss(trainer), 4),
        "answer_accuracy": evaluation.accuracies(trainer),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "device": machine(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        "command": "python -m benchmarks.second_model " + shlex.join(args.command),
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a tokenizer: a model's")
    parser.add_argument("--text", type=Path, required=True, help="folder of documents, as for vllm-lsa train")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--seconds", type=float, default=420, help="all is done after so many (420)")
    parser.add_argument("--context", type=int, default=4096, help="longest sequence (4096)")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=65536, help="tokens of a step (65536)")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (0.002)")
    parser.add_argument("--weight-decay", type=float, default=0.3, help="(0.3; the text is read many times over)")
    parser.add_argument("--dropout", type=float, default=0.1, help="of what a layer adds to the residual (0.1)")
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True, help="else AdamW alone")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    parser.add_argument("--workers", type=int, default=min(8, max(1, cores - 2)), help="processes that make batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    args.command = list(argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        facts = run(args)
    except LsaError as error:
        print(error, file=sys.stderr)
        return 2
    found = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in facts["answer_accuracy"].items())
    print(f"{args.out}: {facts['tokens'] / 1e6:.1f} M tokens in {facts['steps']} steps, {facts['seconds']} s in all")
    print(f"held-out text: loss {facts['heldout_text_loss']:.3f}")
    print(f"answers' tokens right at {args.context}: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
