"""What sparse decoding costs: NLL, KL and top-1 agreement on documents, accuracy on the suite, recall, traffic."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.indexes import KV_BYTES
from vllm_lsa.evaluation.methods import resident_share
from vllm_lsa.evaluation.offline import SparseModel, Traffic, kl, needs_hidden
from vllm_lsa.evaluation.rule import SelectionRule
from vllm_lsa.evaluation.suite import WINDOW, Task

BLOCK = 64  # tokens of a block, the period of every rule here
_PAST_BYTES = 4 << 30  # of keys and values of the prompts that are held at once, on a CPU at most a quarter of it
_CHARACTERS = 12  # no tokenizer needs more for a token


@dataclass(frozen=True)
class Window:
    """The first T + 1 tokens of a document, int64."""

    name: str
    tokens: torch.Tensor

    @property
    def digest(self) -> str:
        """Of the tokens: tells records of one text from those of another."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()[:12]


def read_texts(folder: Path, seed: int = 0) -> list[tuple[str, str]]:
    """Names and texts of the documents in a folder, shuffled. Raises LsaError if there are none."""
    from indexer_training.documents import read_documents

    texts = [(document.name, document.text) for document in read_documents(folder)]
    random.Random(seed).shuffle(texts)
    return texts


def make_windows(texts: Sequence[tuple[str, str]], tokenizer: Any, context: int, count: int) -> list[Window]:
    """Windows of the first `count` documents that have more than `context` tokens. Raises LsaError if none has."""
    windows: list[Window] = []
    for name, text in texts:
        if len(windows) == count:
            break
        if len(text) <= context:
            continue  # no tokenizer makes more tokens of it than it has characters
        tokens = tokenizer(text[: _CHARACTERS * context], verbose=False)["input_ids"]
        if len(tokens) > context:
            windows.append(Window(name, torch.tensor(tokens[: context + 1])))
    if not windows:
        raise LsaError(f"--contexts {context}: no document has more than {context} tokens: use a shorter context")
    return windows


def block_starts(context: int, every: int, offset: int = 0) -> torch.Tensor:
    """Starts of the blocks in the second half of a window: every `every`th one."""
    half = context // 2 // BLOCK * BLOCK
    return torch.arange(half, context - BLOCK + 1, BLOCK)[offset % every :: every]


class DocumentQuality:
    """Measures rules on one window of a document; what the dense model says is computed once."""

    def __init__(self, model: SparseModel, window: Window, every: int, offset: int, hidden: bool) -> None:
        """every: blocks of the second half to take: every so manyth, from `offset` on. hidden: see `needs_hidden`."""
        self.model = model
        context = len(window.tokens) - 1
        self.starts = block_starts(context, every, offset)
        blocks = window.tokens.unfold(0, BLOCK, 1)
        self.tokens, self.labels = blocks[self.starts], blocks[self.starts + 1].to(model.device)
        first = int(self.starts[0]) - BLOCK
        self.past = model.prefill(window.tokens[:context], first, hidden)
        self.dense = model.decode_blocks(self.past, self.tokens, self.starts, None)
        self.dense_nll = self._nll(self.dense)

    def _nll(self, logits: torch.Tensor) -> float:
        return float(F.cross_entropy(logits.flatten(0, 1), self.labels.flatten()))

    def measure(self, rule: SelectionRule | None) -> dict[str, Any]:
        """nll, kl (both nats per token), top1 (share of tokens), and what `_costs` says; rule None: of dense itself."""
        if rule is None:
            return {"nll": self.dense_nll, "dense_nll": self.dense_nll, "kl": 0.0, "top1": 1.0, **_costs(None)}
        traffic = Traffic()
        logits = self.model.decode_blocks(self.past, self.tokens, self.starts, rule, traffic=traffic)
        same = (logits.argmax(-1) == self.dense.argmax(-1)).float().mean()
        return {
            "nll": self._nll(logits),
            "dense_nll": self.dense_nll,
            "kl": float(kl(self.dense, logits).mean()),
            "top1": float(same),
            **_costs(rule, self.model, self.starts, traffic),
        }

    def recall(self, rules: Mapping[str, SelectionRule]) -> dict[str, Any]:
        """See `SparseModel.recall`."""
        return self.model.recall(self.past, self.starts, rules)


def _costs(
    rule: SelectionRule | None,
    model: SparseModel | None = None,
    starts: torch.Tensor | None = None,
    traffic: Traffic | None = None,
) -> dict[str, Any]:
    """resident, index: device bytes over KV bytes. demanded: chunks of a lane per step, for each layer. demanded_bytes:
    of K and V at 16 bits, per step over all layers and lanes."""
    if rule is None or model is None or starts is None or traffic is None:
        return {"resident": 1.0, "index": 0.0, "demanded": [], "demanded_bytes": 0.0}
    per_step = traffic.per_step()
    lanes = model.kv_heads if rule.sets == "per_head" else 1
    chunk = 2 * rule.chunk_tokens * model.head_dim * KV_BYTES * model.kv_heads // lanes
    return {
        "resident": resident_share(rule, starts, model.layers),
        "index": rule.index_share(model.head_dim),
        "demanded": [round(x, 4) for x in per_step] if rule.demand is not None else [],
        "demanded_bytes": sum(per_step) * lanes * chunk,
    }


# The suite


def pair_tasks(tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
    """The variants of each sample together: they have the same tokens, so one past serves them all."""
    samples: dict[tuple[str, int], list[Task]] = {}
    for task in tasks:
        samples.setdefault((task.name, task.index), []).append(task)
    return [tuple(variants) for variants in samples.values()]


def prompts_at_once(model: SparseModel, context: int) -> int:
    """Prompts whose pasts, and one index of them, are held together."""
    each = 3 * model.layers * model.kv_heads * model.head_dim * context * 4
    limit = _PAST_BYTES // 4
    if model.device.type == "cuda":
        limit = max(_PAST_BYTES, torch.cuda.mem_get_info(model.device)[0] // 6)
    return max(1, min(16, limit // each))


class SuiteQuality:
    """Measures rules on some samples of the suite, all of one context length."""

    def __init__(self, model: SparseModel, samples: Sequence[tuple[Task, ...]], hidden: bool) -> None:
        self.model, self.samples = model, samples
        tokens = torch.tensor([variants[0].tokens for variants in samples])
        self.starts = torch.tensor([[task.window_start for task in variants] for variants in samples])
        padded = F.pad(tokens, (0, WINDOW))
        self.tokens = padded.gather(1, (self.starts.unsqueeze(-1) + torch.arange(WINDOW)).flatten(1))
        first = max(0, int(self.starts.min()) - BLOCK)
        self.past = model.prefill(tokens, first, hidden)

    def measure(self, rule: SelectionRule | None) -> list[dict[str, Any]]:
        """For each sample: right (by variant, whether every scored token is), share (of them), and costs."""
        traffic = Traffic()
        blocks = self.tokens.view(-1, WINDOW)
        logits = self.model.decode_blocks(self.past, blocks, self.starts, rule, traffic=traffic)
        predicted = logits.argmax(-1).view(*self.starts.shape, WINDOW).tolist()
        costs = _costs(rule, self.model, self.starts, traffic)
        results = []
        for variants, rows in zip(self.samples, predicted, strict=True):
            right, share = {}, {}
            for task, row in zip(variants, rows, strict=True):
                begin, end = (place - 1 - task.window_start for place in task.answer_span)
                right[task.variant] = task.is_predicted(row[begin:end])
                share[task.variant] = task.share_predicted(row[begin:end])
            results.append({"right": right, "share": share, **costs})
        return results


# Statistics


def bootstrap(values: Sequence[float], samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values`, resampled over them; their one value twice if there is one."""
    data = np.asarray(values, float)
    draws = np.random.default_rng(seed).integers(0, len(data), (samples, len(data)))
    low, high = np.quantile(data[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def relative_nll(results: Sequence[Mapping[str, Any]]) -> list[float]:
    """NLL over the dense NLL, less 1, of each document."""
    return [result["nll"] / result["dense_nll"] - 1 for result in results]


def hidden_needed(rules: Iterator[SelectionRule] | Sequence[SelectionRule]) -> bool:
    """Whether any of the rules reads the inputs of attention modules."""
    return any(needs_hidden(rule) for rule in rules)
