"""``vllm-lsa eval`` of a DeepSeek-V4: how much of what its own indexer chooses lies on the pages that are kept.

vLLM runs windows of the text once, as for training (`v4_capture`), and pages are chosen and judged as in training's
evaluation (`v4_evaluate`), here at any budgets, for an indexer that came from anywhere and for the native one. OUT/N is
the capture with windows of N tokens ("default" without --contexts), which further calls use again; OUT/v4.json and
v4.csv are the results.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import torch

from indexer_training import v4_model
from indexer_training.distributed import Group
from indexer_training.settings import resolve, write_settings
from indexer_training.train import Batch, Windows
from indexer_training.v4_evaluate import kept_shares
from indexer_training.workspace import Workspace, run_step, write_json
from vllm_lsa.errors import LsaError
from vllm_lsa.indexer import MemoryIndexer
from vllm_lsa.indexer.checkpoint import fingerprint_of
from vllm_lsa.models.deepseek_v4.memory_indexer import checkpoint_path

_WITHOUT_MEANING = ("methods", "served", "steps", "quick", "seconds", "sets", "chunk_tokens", "demand_chunks",
                    "demand_threshold")  # fmt: skip
_NATIVE = "native"


def load(named: Path | None, model: Path) -> MemoryIndexer | None:
    """The memory indexer that --indexer names, with this model's RoPE as in serving; None for the native one.

    Raises LsaError in one line if it does not fit the model.
    """
    if named is None or str(named) == _NATIVE:
        return None
    shape, path = v4_model.V4Shape.read(model), checkpoint_path(str(named))
    if path is None:
        raise LsaError(f"--indexer {named} is no memory indexer's .pt, .safetensors or folder, nor {_NATIVE}: give one")
    indexer = MemoryIndexer.load(path)
    if path.is_file():
        for layer in indexer.layers:
            indexer.layer(layer).inv_freq = shape.inverse_frequencies()
    if max(indexer.layers) >= shape.layers or indexer.config.hidden_size != shape.hidden_size:
        raise LsaError(
            f"--indexer {named} scores c4 layers {', '.join(map(str, indexer.layers))} of width "
            f"{indexer.config.hidden_size}, and {model} has {shape.layers} of {shape.hidden_size}: give another"
        )
    indexer.require_backbone(fingerprint_of(model))
    return indexer


def captured(args: argparse.Namespace, context: int | None) -> Workspace:
    """The windows of the text, run through the model, with every c4 layer as a candidate."""
    shape = v4_model.V4Shape.read(args.model)
    given = {
        "model": str(args.model), "text": str(args.text), "device": args.device, "seed": args.seed,
        # All are measured on; training's settings want both kinds.
        "documents": max(1, args.documents - 1), "heldout_documents": 1, "retrieval_share": 0.0,
        "candidates": tuple(range(shape.layers)), "rank": shape.q_rank, "heads": shape.heads,
    }  # fmt: skip
    for name in ("engine", "native_top_p", "sink_tokens", "recency_tokens"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    if context is not None:
        given["context"] = context
    out = args.out / (str(context) if context else "default")
    settings = resolve(out, given)
    work = Workspace(out, settings)
    with work.lock():
        write_settings(out, settings)
        for step in ("data", "capture", "label"):
            run_step(step, out, settings)
    return work


def scores_of(batch: Batch, native: MemoryIndexer, indexer: MemoryIndexer | None) -> dict[str, torch.Tensor]:
    """What is compared, by column: scores fp32 [S, N], 0 or above."""
    mass = batch.mass(0).squeeze(1)
    past = torch.arange(mass.shape[1], device=mass.device) < batch.counts.unsqueeze(1)

    def logits(of: MemoryIndexer, layer: int) -> torch.Tensor:
        return batch.logits(of.layer(layer), layer).squeeze(1)

    # As serving does it: layers are compared by the shares of a softmax.
    shares = [logits(native, layer).masked_fill(~past, -torch.inf).softmax(-1) for layer in native.layers]
    found = {
        "newest": torch.arange(mass.shape[1], device=mass.device).float().expand_as(mass),
        "usage": batch.usage(0).squeeze(1),
        _NATIVE: torch.stack(shares).amax(0),
    }
    if indexer is not None:
        found["indexer"] = indexer.ensemble({layer: logits(indexer, layer) for layer in indexer.layers})
    return {**found, "oracle": mass}


@torch.no_grad()
def measure(work: Workspace, indexer: MemoryIndexer | None, budgets: list[float]) -> list[dict[str, Any]]:
    """A row for each budget: the share of golden entries on the pages that are kept, by column."""
    s = work.settings
    device = s.torch_device()
    windows = Windows(work, device)
    native = v4_model.untrained(work)
    v4_model.initialise(native, work)
    native = native.requires_grad_(False).to(device)
    given = None if indexer is None else indexer.to(device)
    shares = kept_shares(
        windows, range(s.captured), Group("evaluate", "cpu"), s, budgets, lambda batch: scores_of(batch, native, given)
    )
    about = {"windows": s.captured, "cycles": s.captured * len(s.starts)}
    return [{"context": s.context, "budget": budget, **about, **found} for budget, found in shares.items()]


def run(args: argparse.Namespace) -> int:
    """The command."""
    for name in _WITHOUT_MEANING:
        value = getattr(args, name)
        if value not in (None, False):
            raise LsaError(f"--{name.replace('_', '-')} has no meaning for DeepSeek-V4: leave it out")
    if args.documents < 1:
        raise LsaError(f"--documents {args.documents} leaves nothing to measure: retrieval tasks are not for V4")
    shape = v4_model.V4Shape.read(args.model)
    for context in args.contexts or ():
        if context % 64 or not 4 * shape.top_k + 128 <= context <= shape.max_context:
            raise LsaError(
                f"--contexts {context} is no multiple of 64 tokens from {4 * shape.top_k + 128} on, since up to "
                f"{4 * shape.top_k} everything is chosen, to {shape.max_context}"
            )
    indexer = load(args.indexer, args.model)
    rows: list[dict[str, Any]] = []
    for context in args.contexts or [None]:
        work = captured(args, context)
        rows += measure(work, indexer, args.budgets)
    about = {"model": str(args.model), "text": str(args.text), "indexer": str(args.indexer or _NATIVE)}
    s = work.settings
    about |= {name: getattr(s, name) for name in ("native_top_p", "sink_tokens", "recency_tokens", "seed")}
    write_json(args.out / "v4.json", {**about, "rows": rows})
    with (args.out / "v4.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print("golden entries on kept pages")
    print("  ".join(f"{name:>8}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>8}" for value in row.values()))
    return 0
