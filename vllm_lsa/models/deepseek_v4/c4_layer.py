"""What a c4 layer with LSA has on every device: what it and its parts ask vLLM to allocate, and its place there.

Classes here go in front of vLLM's own among the bases. vLLM's layers make their parts themselves, so that these change
their class afterwards, as vLLM's own CPU layer does.
"""

from dataclasses import replace
from typing import Any

from vllm.models.deepseek_v4.compressor import CompressorStateCache

from vllm_lsa.models.deepseek_v4.runtime import DeepseekV4Runtime
from vllm_lsa.models.deepseek_v4.specs import lsa_spec


class IndexKeys:
    """Index keys: vLLM allocates and pages them, and the host store follows their blocks; or they are in its pages.

    key_layers: see `lsa_spec`.
    """

    prefix: str
    key_layers: frozenset[int] | None = None

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return lsa_spec(self.prefix, super().get_kv_cache_spec(vllm_config), self.key_layers)  # type: ignore[misc]


class IndexerStateCache(CompressorStateCache):
    """State of the indexer's compressor, declared so that vLLM gives the memory of the c4 caches back."""

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return lsa_spec(self.prefix, super().get_kv_cache_spec(vllm_config))


class C4Layer:
    """A layer whose compressed keys and values are in the engine's two tiers."""

    prefix: str
    indexer: Any

    def _join(self, vllm_config: Any, keys: type) -> None:
        """Become a layer of the runtime. keys: the class of its index keys."""
        self._runtime = DeepseekV4Runtime.of(vllm_config)
        self._layer = self._runtime.add_layer(self)
        self._keeps_keys = self._runtime.keeps_keys(self)
        self.indexer.k_cache.__class__ = keys
        self.indexer.k_cache.key_layers = self._runtime.key_layers
        self.indexer.compressor.state_cache.__class__ = IndexerStateCache

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return lsa_spec(self.prefix, super().get_kv_cache_spec(vllm_config))  # type: ignore[misc]

    def c4_page_bytes(self, block_tokens: int) -> int:
        """Bytes of a page of the cache that vLLM would have made, with blocks of so many tokens."""
        spec = super().get_kv_cache_spec(self._runtime.vllm_config)  # type: ignore[misc]
        return int(replace(spec, block_size=block_tokens).page_size_bytes)
