"""What tells which chunks matter: indexes of every chunk's keys, and the trained memory indexer that queries them."""

from vllm_lsa.indexer.indexer_config import IndexerConfig
from vllm_lsa.indexer.memory_indexer import LayerIndexer, MemoryIndexer

__all__ = ["IndexerConfig", "LayerIndexer", "MemoryIndexer"]
