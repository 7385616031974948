"""What training made for one backbone: the memory indexer, the demand index, the budget's shares over layers."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.checkpoint import CONFIG, IndexerConfig
from vllm_lsa.indexer.memory_indexer import MemoryIndexer
from vllm_lsa.indexer.product import ProductTables

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"
"""Checkpoints that come with the package, by name."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A checkpoint folder. tables: of its demand index, None where it has none."""

    path: Path
    config: IndexerConfig
    indexer: MemoryIndexer
    tables: ProductTables | None


def find(name: str) -> Path | None:
    """The checkpoint folder that `name` says: a path, or the name of a shipped one; None if there is none."""
    for folder in (Path(name), SHIPPED / name):
        if (folder / CONFIG).is_file():
            return folder.resolve()
    return None


def shipped() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


@cache
def load(folder: Path, device: str) -> Trained:
    """Read a checkpoint onto a device, once per process, so that its indexes are equal. Raises LsaError in one line."""
    config = IndexerConfig.read(folder / CONFIG)
    tables = None
    if config.demand_index is not None:
        tables = ProductTables.load(folder / config.demand_index.file).to(device)
        weights = config.layer_weights
        if tables.kv_heads != config.kv_heads or (weights is not None and len(weights) != tables.layers):
            raise LsaError(
                f"{tables.source} ({tables.layers} layers, {tables.kv_heads} KV heads) does not fit its config.json: "
                "export the checkpoint again"
            )
    return Trained(folder, config, MemoryIndexer.load(folder, device), tables)
