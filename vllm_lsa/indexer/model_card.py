"""The evaluation table of a checkpoint, and the README.md that a checkpoint carries."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_lsa.indexer.indexer_config import IndexerConfig

Table = list[list[str]]
_COMBINED = {"or": "; the maximum of their scores counts", "mean": "; the mean of their scores counts"}


def evaluation_table(metrics: Mapping[str, Any]) -> Table:
    """Rows of text, the header first, of a config's `metrics`; empty if there are none."""
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for name, value in metrics.items():
        several = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
        entries = value if several and all(isinstance(entry, Mapping) for entry in value) else [value]
        rows += [(name, entry if isinstance(entry, Mapping) else {"value": entry}) for entry in entries]
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    if not rows:
        return []
    return [["", *columns], *([name, *(_text(row.get(column, "")) for column in columns)] for name, row in rows)]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value)


def aligned(table: Table) -> list[str]:
    """The lines of a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def model_card(config: IndexerConfig) -> str:
    """Markdown: what the checkpoint is, how it is used, how good it is."""
    per_layer = config.kind == "per_layer"
    lines = [
        "---",
        "library_name: vllm-lsa",
        f"base_model: {json.dumps(config.backbone)}",
        "---",
        "",
        f"# Memory indexer for {config.backbone}",
        "",
        f"Chooses the chunks of {config.chunk_tokens} tokens that the next {config.period} tokens will attend to "
        "(Lookahead Sparse Attention, arXiv 2606.09079), "
        + ("with one set for each layer." if per_layer else "with one set for all layers."),
        "",
        "    from vllm_lsa.indexer import MemoryIndexer",
        "    indexer = MemoryIndexer.load(FOLDER)",
        "",
        f"- Layers: {', '.join(map(str, config.layers))}{'' if per_layer else _COMBINED[config.ensemble]}",
        f"- Input: {config.input}, {config.hidden_size} values; rank {config.rank}; {config.heads} heads of "
        f"{config.head_dim}; keys: {config.keys}, {config.kv_heads} per chunk",
        f"- Fingerprint of the model: {config.backbone_fingerprint or 'not known'}",
        "",
        "## Evaluation",
        "",
    ]
    table = evaluation_table(config.metrics)
    if table:
        head, *rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
        lines += ["| " + " | ".join(row) + " |" for row in (head, ["-"] * len(head), *rows)]
    else:
        lines += ["Not evaluated."]
    return "\n".join(lines) + "\n"
