"""Windows of text: documents, and synthetic retrieval. ``python -m indexer_training.data --out DIR --model M --text T``

Makes data/window_*.safetensors and data/heldout_*.safetensors: `tokens`, int32 [context], and for synthetic text
`answers`, int32 [n, 2], the ranges of tokens whose prediction takes retrieval.
"""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from indexer_training.distributed import Group
from indexer_training.documents import Document, read_documents
from indexer_training.retrieval import make
from indexer_training.workspace import Workspace, progress, write_tensors
from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.haystack import Encoder

_LONGEST_TOKEN = 12  # characters; a text of so many per token is long enough with any tokenizer


def sample(documents: Iterable[Document], count: int, rng: random.Random) -> list[Document]:
    """`count` of the documents (all, if there are fewer), each as likely, in random order; holds no more at a time."""
    chosen: list[Document] = []
    for seen, document in enumerate(documents):
        if len(chosen) < count:
            chosen.append(document)
        elif (place := rng.randrange(seen + 1)) < count:
            chosen[place] = document
    rng.shuffle(chosen)
    return chosen


def excerpt(documents: Sequence[Document], first: int, length: int, encoder: Encoder, rng: random.Random) -> list[int]:
    """`length` tokens from a random paragraph of document `first` on, then from the documents after it.

    Raises LsaError if all of them together are too short.
    """
    tokens = list(encoder.prefix)
    for i in range(len(documents)):
        text = documents[(first + i) % len(documents)].text
        longest = _LONGEST_TOKEN * (length - len(tokens))
        if i == 0 and len(text) > longest // 2:
            start = rng.randrange(max(1, len(text) - longest // 2))
            start = text.rfind("\n\n", 0, start) + 2 if start else 0
            text = text[max(start, 0) :] if "\n\n" in text[:start] else text
        tokens += encoder.encode(("\n\n" if i else "") + text[:longest])
        if len(tokens) >= length:
            return tokens[:length]
    raise LsaError(f"--text: all its documents have fewer than {length} tokens: add some, or lower --context")


def is_synthetic(window: int, share: float) -> bool:
    """Whether a window is retrieval text: evenly spread, so that any first windows have their share."""
    return int((window + 1) * share + 0.5) > int(window * share + 0.5)


def run(work: Workspace, group: Group) -> dict[str, Any]:
    """Make all windows that are not there yet. Raises LsaError if there is too little text."""
    if not group.leads:
        return {}
    from transformers import AutoTokenizer

    s = work.settings
    try:
        tokenizer = AutoTokenizer.from_pretrained(s.model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise LsaError(f"--model {s.model} has no tokenizer: {str(error).splitlines()[0]}") from None
    encoder = Encoder(tokenizer)
    rng = random.Random(f"{s.seed} documents")
    count = 2 * s.documents + (0 if s.heldout else s.heldout_documents)
    documents = sample(read_documents(Path(s.text)), count, rng)
    if s.heldout:
        heldout = sample(read_documents(Path(s.heldout)), s.heldout_documents, rng)
    else:
        # Of one document there is nothing to hold out.
        aside = min(s.heldout_documents, len(documents) // 2)
        heldout, documents = documents[:aside] or documents, documents[aside:]
    windows = [(work.shard("data", i), i) for i in range(s.documents)]
    windows += [(work.folder("data") / f"heldout_{i:05d}.safetensors", -1 - i) for i in range(s.heldout_documents)]
    left = [window for window in windows if not window[0].exists()]
    for path, i in progress(left, "data", group, " windows", len(windows) - len(left)):
        rng = random.Random(f"{s.seed} window {i}")
        answers: list[tuple[int, int]] = []
        if i < 0:
            # One token more, whose prediction is judged.
            tokens = excerpt(heldout, -1 - i, s.context + 1, encoder, rng)
        else:
            tokens = excerpt(documents, i, s.context, encoder, rng)
            if is_synthetic(i, s.retrieval_share):
                made = make(rng.randrange(1 << 30), "mixed", encoder, tokens, s.context)
                tokens, answers = made.tokens, made.answers
        content = {"tokens": torch.tensor(tokens, dtype=torch.int32)}
        if answers:
            content["answers"] = torch.tensor(answers, dtype=torch.int32)
        write_tensors(path, content)
    synthetic = sum(is_synthetic(i, s.retrieval_share) for i in range(s.documents))
    return {"windows": s.documents, "synthetic": synthetic, "tokens": s.documents * s.context}


if __name__ == "__main__":
    from indexer_training.cli import step_main

    step_main("data")
