"""What training made for one backbone: the memory indexer, the demand index, the budget's shares over layers."""

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.checkpoint import CONFIG, WEIGHTS, IndexerConfig
from vllm_lsa.indexer.memory_indexer import MemoryIndexer
from vllm_lsa.indexer.product import ProductTables

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"
"""Checkpoints that come with the package, by name."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A checkpoint. tables: of its demand index, None where it has none. indexer_is_divided: over ranks, see `part`."""

    path: Path
    indexer: MemoryIndexer
    tables: ProductTables | None
    indexer_is_divided: bool = False

    @property
    def config(self) -> IndexerConfig:
        return self.indexer.config

    def part(self, rank: int, ranks: int) -> "Trained":
        """What one of `ranks` tensor-parallel ranks needs, by its KV heads; see `indexer_is_divided`.

        Where there are more ranks than KV heads, several hold the same one, as in vLLM. A scorer sums over the queries
        that share a KV head, so then the indexer stays whole.
        """
        heads = self.config.kv_heads
        indexer = self.indexer if heads % ranks else self.indexer.part(rank, ranks)
        first = rank * heads // ranks
        tables = None if self.tables is None else self.tables.part(first, max(1, heads // ranks))
        return Trained(self.path, indexer, tables, indexer is not self.indexer)

    @cached_property
    def digest(self) -> str:
        """Of its files: tells results with one checkpoint from those with another."""
        files = [self.path / CONFIG, self.path / WEIGHTS] if self.path.is_dir() else [self.path]
        if self.config.demand_index is not None:
            files.append(self.path / self.config.demand_index.file)
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        return digest.hexdigest()[:12]


def find(name: str) -> Path | None:
    """The checkpoint folder that `name` says: a path, or the name of a shipped one; None if there is none."""
    for folder in (Path(name), SHIPPED / name):
        if (folder / CONFIG).is_file():
            return folder.resolve()
    return None


def shipped() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def read(path: Path, device: str | torch.device) -> Trained:
    """Read a checkpoint folder, or a published file, onto a device. Raises LsaError in one line."""
    indexer = MemoryIndexer.load(path, device)
    config, tables = indexer.config, None
    if config.demand_index is not None:
        tables = ProductTables.load(path / config.demand_index.file).to(device)
        weights = config.layer_weights
        if tables.kv_heads != config.kv_heads or (weights is not None and len(weights) != tables.layers):
            raise LsaError(
                f"{tables.source} ({tables.layers} layers, {tables.kv_heads} KV heads) does not fit its config.json: "
                "export the checkpoint again"
            )
    return Trained(path, indexer, tables)


def load(folder: Path, device: str, rank: int = 0, ranks: int = 1) -> Trained:
    """`read` and the `part` of a rank, once per process, so that the indexes of a checkpoint are equal."""
    return _load(folder, device, rank, ranks)


@cache
def _load(folder: Path, device: str, rank: int, ranks: int) -> Trained:
    return read(folder, device) if ranks == 1 else read(folder, device).part(rank, ranks)
