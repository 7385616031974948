"""Prints the tables of README.md that come from the code: ``python docs/settings.py``; tests/test_docs.py compares."""

from typing import Literal, get_args, get_origin

from vllm_lsa.config import LsaConfig
from vllm_lsa.metrics import METRICS

UNITS = {
    "budget": "share of chunks", "period": "decode steps", "lead": "decode steps", "threshold": "score",
    "sink_tokens": "tokens", "recency_tokens": "tokens", "chunk_tokens": "tokens", "indexer": "name",
    "demand_chunks": "chunks", "demand_threshold": "share",
    "host_memory_gib": "GiB", "device_pool_gib": "GiB", "device_pool_fraction": "share",
}  # fmt: skip


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def settings_table() -> str:
    """A row for each field of LsaConfig, in its order."""
    rows = []
    for name, field in LsaConfig.model_fields.items():
        kind = field.annotation
        unit = ", ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else UNITS[name]
        default = "none" if field.default is None else str(field.default)
        rows.append([f"`{name}`", f"`{default}`", unit, field.description or ""])
    return _table(["setting", "default", "unit or values", "meaning"], rows)


def metrics_table() -> str:
    """A row for each of METRICS, under the name that /metrics shows."""
    rows = [[f"`vllm_lsa:{m.name}{'_total' if m.kind == 'counter' else ''}`", m.kind, m.unit, m.help] for m in METRICS]
    return _table(["metric", "kind", "unit", "meaning"], rows)


if __name__ == "__main__":
    print(settings_table(), metrics_table(), sep="\n\n")
