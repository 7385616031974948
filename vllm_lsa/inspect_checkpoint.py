"""``vllm-lsa inspect``: what a memory indexer's checkpoint is, or in one line why it is none."""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.checkpoint import Checkpoint, layer_shapes, read_checkpoint
from vllm_lsa.indexer.indexer_config import AGAIN
from vllm_lsa.indexer.model_card import aligned, evaluation_table
from vllm_lsa.indexer.product import ProductTables
from vllm_lsa.indexer.trained import find


def parameters(checkpoint: Checkpoint) -> int:
    """Trained numbers in it."""
    return sum(x.numel() for name, x in checkpoint.tensors.items() if not name.endswith(".inv_freq"))


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, short: "0-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """The report as JSON: the config, and what the files add to it."""
    return {
        "path": str(checkpoint.path),
        "layout": checkpoint.layout,
        "parameters": parameters(checkpoint),
        "dtypes": sorted({str(x.dtype).removeprefix("torch.") for x in _weights(checkpoint)}),
        "layer_shapes": layer_shapes(checkpoint.config),
        "config": checkpoint.config.model_dump(),
    }


def _weights(checkpoint: Checkpoint) -> Iterator[Any]:
    return (x for name, x in checkpoint.tensors.items() if not name.endswith(".inv_freq"))


def describe(checkpoint: Checkpoint) -> Iterator[str]:
    """The report's lines."""
    config, facts = checkpoint.config, summary(checkpoint)
    layout = {"folder": f"checkpoint folder, version {config.format_version}", "published": "published joint file"}
    sets = {"per_layer": "one resident set per layer", "shared": f"one resident set, {config.ensemble} over layers"}
    rope, end = config.rope, config.rope.first_dim + config.rope.dims
    turning = f"{rope.style} on dimensions {rope.first_dim}-{end - 1} of {config.head_dim}" if rope.dims else "none"
    fields = {
        "checkpoint": str(checkpoint.path),
        "format": layout[checkpoint.layout],
        "kind": f"{config.kind}: {sets[config.kind]}",
        "backbone": f"{config.backbone}, fingerprint {config.backbone_fingerprint or 'not known'}",
        "layers": f"{ranges(config.layers)} ({len(config.layers)})",
        "input": f"{config.input}, {config.hidden_size} values",
        "scorer": f"rank {config.rank}, {config.heads} heads of {config.head_dim}" + (", bias" if config.bias else ""),
        "keys": f"{config.keys}, {config.kv_heads} per chunk" + (", Hadamard-rotated" if config.rotated_keys else ""),
        "rope": turning,
        "chunks": f"{config.chunk_tokens} tokens, chosen for {config.period} steps",
        "shapes": ", ".join(f"{name} {list(shape)}" for name, shape in layer_shapes(config).items()),
        "parameters": f"{facts['parameters']:,} ({', '.join(facts['dtypes'])})",
        "logit offset": f"{config.logit_offset:g}",
        "usage": "weighs usage and age of chunks, per KV head" if config.usage else "no",
        "demand index": _demand_index(checkpoint),
    }
    for name, value in fields.items():
        yield f"{name:13} {value}"
    for name, values in (("layer gains", config.layer_gains), ("layer weights", config.layer_weights)):
        yield f"{name:13} {'none' if values is None else ' '.join(f'{value:.3g}' for value in values)}"
    for name, lists in (("thresholds", config.thresholds), ("budget shares", config.budget_shares)):
        yield f"{name:13} {'' if lists else 'none'}".rstrip()
        for budget, values in lists.items():
            yield f"  {budget:11} {' '.join(f'{value:.4g}' for value in values)}"
    table = evaluation_table(config.metrics)
    yield f"{'evaluation':13} {'' if table else 'none'}".rstrip()
    yield from (f"  {line}" for line in (aligned(table) if table else ()))


def _demand_index(checkpoint: Checkpoint) -> str:
    """Raises LsaError in one line if the file of its tables is missing or damaged."""
    index = checkpoint.config.demand_index
    if index is None:
        return "none"
    tables = ProductTables.load(checkpoint.path / index.file)
    if (tables.subspaces, tables.kv_heads) != (index.subspaces, checkpoint.config.kv_heads):
        raise LsaError(f"{tables.source} is not what {checkpoint.path}/config.json says of it: {AGAIN}")
    return f"{index.kind}, {index.subspaces} bytes per token and KV head, {tables.layers} layers"


def run(args: argparse.Namespace) -> int:
    checkpoint = read_checkpoint(find(args.checkpoint) or args.checkpoint)
    if args.json:
        print(json.dumps(summary(checkpoint), indent=1))
    else:
        print("\n".join(describe(checkpoint)))
    return 0


def add_command(subparsers: Any) -> None:
    """Adds ``inspect`` to the command line."""
    text = "what a memory indexer's checkpoint is (exit status 0, or 2 if it is damaged, foreign or too new)"
    parser = subparsers.add_parser("inspect", help=text)
    what = "a checkpoint folder, a shipped one's name, or a joint .pt or .safetensors file"
    parser.add_argument("checkpoint", metavar="CKPT", help=what)
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.set_defaults(run=run)
