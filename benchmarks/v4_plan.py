"""What a decoding request of DeepSeek-V4-Flash holds on the device, from the specs of its caches; without vLLM.

tests/test_v4_planning.py asks vLLM's own planner, and tests/test_v4_stack.py compares. What reading a prompt takes for
a while, 3.1 GiB with or without LSA, is in neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_lsa.models.deepseek_v4 import specs as v4
from vllm_lsa.models.deepseek_v4.selection import page_count

GIB = 1 << 30
C4_LAYERS, C128_LAYERS, PLAIN_LAYERS = 21, 20, 2
C4_PAGE, KEY_PAGE, C128_PAGE, STATE_PAGE = 37440, 8640, 1728, 32832
"""Bytes of a page, padding included."""
SCORED = (10, 12, 20)
"""c4 layers that the published memory indexer scores."""
_ROUNDING_MIB = {"stock": 6.25, "lsa": 4.2, "keys on host": 11.45}
"""What vLLM's equal blocks add to the pages of a request, however long: windows and states do not fill theirs."""


@dataclass(frozen=True)
class CacheSpec:
    """What `v4.request_bytes` reads of a KVCacheSpec. block_size: tokens of a page."""

    block_size: int
    page_size_bytes: int
    tokens_per_state: int = 1
    sliding_window: int | None = None


def stock_specs() -> Mapping[str, CacheSpec]:
    """Every cache of the model, by vLLM's names: 43 layers, c4 and c128 in turn behind two plain ones."""
    specs: dict[str, CacheSpec] = {}
    for layer in range(PLAIN_LAYERS + C4_LAYERS + C128_LAYERS):
        name = f"model.layers.{layer}.attn"
        specs[f"{name}.swa_cache"] = CacheSpec(64, C4_PAGE, sliding_window=128)
        if layer < PLAIN_LAYERS:
            continue
        if layer % 2 == 0:
            specs[name] = CacheSpec(256, C4_PAGE, tokens_per_state=4)
            specs[f"{name}.compressor.state_cache"] = CacheSpec(4, STATE_PAGE, sliding_window=8)
            specs[f"{name}.indexer.k_cache"] = CacheSpec(256, KEY_PAGE)
            specs[f"{name}.indexer.compressor.state_cache"] = CacheSpec(4, KEY_PAGE, sliding_window=8)
        else:
            specs[name] = CacheSpec(256, C128_PAGE, tokens_per_state=128)
            specs[f"{name}.compressor.state_cache"] = CacheSpec(8, STATE_PAGE, sliding_window=128)
    return specs


def request_gib(tokens: int, resident: int | None = None, keys_on_host: bool = False) -> float:
    """GiB of a request on the device: in stock vLLM, or with LSA and slots for `resident` pages of all c4 layers.

    keys_on_host: index keys too are on the host, but for those of the scored layers and of resident pages.
    """
    stock = kept = stock_specs()
    form = "stock"
    if resident is not None:
        kept = v4.lsa_specs(stock, v4.SCORER_LAYERS if keys_on_host else None)
        form = "keys on host" if keys_on_host else "lsa"
    pool = (resident or 0) * sum(spec.page_size_bytes for name, spec in stock.items() if name not in kept)
    return (sum(v4.request_bytes(kept, tokens).values()) + pool + _ROUNDING_MIB[form] * 2**20) / GIB


def resident_pages(tokens: int, budget: float) -> tuple[int, int]:
    """(pages that a request of `tokens` tokens keeps resident, pages that it has)."""
    pages = page_count(tokens // v4.C4_TOKENS)
    return -int(-pages * budget // 1), pages
