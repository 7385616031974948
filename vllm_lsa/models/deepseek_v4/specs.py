"""What DeepSeek-V4's layers ask vLLM to allocate when the compressed KV of the c4 layers lives on the host.

vLLM packs caches of one kind side by side in a block, and one pool of equal blocks serves all kinds, so a block is as
wide as the widest group. In stock V4 that group is c4, index keys and c128 together (1,002,240 B on V4-Flash). Without
c4 it would be the states of the compressors, which vLLM keeps whole because two page sizes alternate in them (870,912
B): nothing would be gained. States of the indexer's compressors that ask for a window of their own end that
alternation, vLLM splits what remains of the states, and a block is index keys and c128 (216,000 B).
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

from vllm_lsa.errors import LsaError

C4_TOKENS = 4
"""Tokens of a c4 entry."""
PAGE_ENTRIES = 64
"""Entries of a page: 256 tokens of c4."""
SCORER_LAYERS = (22, 26, 42)
"""Layers of V4-Flash whose index keys the published memory indexer scores: c4 layers 10, 12 and 20 (lsa.md §2)."""

_LAYER = re.compile(r"\blayers\.(\d+)\.")


class Cache(Enum):
    """The kinds of cache that V4's layers have."""

    WINDOW = "sliding window"
    C4 = "c4"
    C128 = "c128"
    INDEX_KEYS = "index keys"
    STATE = "compressor state"
    INDEX_STATE = "indexer's compressor state"


def cache_kind(name: str, spec: Any) -> Cache:
    """The kind of the cache called `name`, as vLLM names V4's, with this KVCacheSpec. Raises LsaError on another one.

    Names end in .swa_cache, .indexer.k_cache, .indexer.compressor.state_cache, .compressor.state_cache, or nothing
    (the compressed KV of the layer).
    """
    for end, kind in (
        (".swa_cache", Cache.WINDOW),
        (".indexer.k_cache", Cache.INDEX_KEYS),
        (".indexer.compressor.state_cache", Cache.INDEX_STATE),
        (".compressor.state_cache", Cache.STATE),
    ):
        if name.endswith(end):
            return kind
    tokens = getattr(spec, "tokens_per_state", None)
    if tokens not in (C4_TOKENS, 128):
        raise LsaError(f"{name} is no cache of DeepSeek-V4 that LSA knows ({type(spec).__name__}): serve without LSA")
    return Cache.C4 if tokens == C4_TOKENS else Cache.C128


def lsa_spec(name: str, spec: Any, key_layers: Collection[int] | None = None) -> Any | None:
    """The KVCacheSpec that the cache `name` declares with LSA instead of `spec`; None: vLLM allocates nothing for it.

    key_layers: layers of the model whose index keys stay on the device; None for all. Raises LsaError on a cache that
    is not V4's.
    """
    kind = cache_kind(name, spec)
    if kind is Cache.C4:
        return None
    if kind is Cache.INDEX_KEYS and key_layers is not None and layer_of(name) not in key_layers:
        return None
    if kind is Cache.INDEX_STATE:
        # One token more than the compressor reads: the state is kept a little longer, and read as before.
        return replace(spec, sliding_window=2 * C4_TOKENS + 1)
    return spec


def lsa_specs(specs: Mapping[str, Any], key_layers: Collection[int] | None = None) -> dict[str, Any]:
    """`lsa_spec` of every cache of a model, {name: KVCacheSpec}, those that remain. Raises LsaError as it does."""
    changed = {name: lsa_spec(name, spec, key_layers) for name, spec in specs.items()}
    return {name: spec for name, spec in changed.items() if spec is not None}


def layer_of(name: str) -> int:
    """The model's layer that the cache called `name` belongs to. Raises LsaError if the name has none."""
    match = _LAYER.search(name)
    if match is None:
        raise LsaError(f"{name} names no layer: a cache of DeepSeek-V4 is called …layers.<number>.…")
    return int(match[1])


def block_bytes(specs: Mapping[str, Any]) -> int:
    """Bytes that a block needs at the least: the pages of all caches that grow with a request."""
    return sum(spec.page_size_bytes for name, spec in specs.items() if _grows(cache_kind(name, spec)))


def block_width(specs: Mapping[str, Any]) -> int:
    """Bytes of a block as vLLM makes them of `specs` if it splits them well: `block_bytes`, or the widest page."""
    return max(block_bytes(specs), *(spec.page_size_bytes for spec in specs.values()))


def specs_of(groups: Iterable[Any]) -> dict[str, Any]:
    """{name: KVCacheSpec} of all caches in vLLM's groups (KVCacheGroupSpec)."""
    specs: dict[str, Any] = {}
    for group in groups:
        of_layers = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        specs |= {name: of_layers.get(name, group.kv_cache_spec) for name in group.layer_names}
    return specs


def require_split(specs: Mapping[str, Any], groups: Iterable[Any]) -> None:
    """Raises LsaError if vLLM's groups (KVCacheGroupSpec) of `specs` make blocks wider than they must be.

    Another vLLM may group in another way than `block_width` says, and would then silently give back less memory than
    was asked for.
    """
    least = block_width(specs)
    widest = max(sum(specs[name].page_size_bytes for name in group.layer_names) for group in groups)
    if widest > least:
        raise LsaError(
            f"vLLM plans KV cache blocks of {widest} bytes where LSA needs {least}, so the host store would save less "
            "than it should: use vLLM 0.32, or serve without LSA"
        )


def request_blocks(specs: Mapping[str, Any], groups: Iterable[Any], tokens: int) -> int:
    """Blocks that one request of `tokens` tokens holds while it decodes, all groups together."""
    return sum(_pages(specs[group.layer_names[0]], tokens) for group in groups)


def request_bytes(specs: Mapping[str, Any], tokens: int) -> dict[Cache, int]:
    """Bytes of the pages that one decoding request of `tokens` tokens has, by kind of cache.

    What blocks add because their groups are not equally wide is not in it: see `request_blocks`.
    """
    total: dict[Cache, int] = {}
    for name, spec in specs.items():
        kind = cache_kind(name, spec)
        total[kind] = total.get(kind, 0) + _pages(spec, tokens) * spec.page_size_bytes
    return total


def pool_bytes(specs: Mapping[str, Any], tokens: int, share: float, key_layers: Collection[int] | None = None) -> int:
    """Bytes of the resident pages of one request: `share` of its pages in every c4 layer, rounded up.

    specs: those of stock vLLM. key_layers: see `lsa_spec`; the other layers need the index keys of resident pages,
    since the native indexer scores those at every step.
    """
    kept = lsa_specs(specs, key_layers)
    pages = 0
    for name, spec in specs.items():
        if name not in kept:
            pages += -int(-_pages(spec, tokens) * share // 1) * spec.page_size_bytes
    return pages


def _grows(kind: Cache) -> bool:
    return kind in (Cache.C4, Cache.C128, Cache.INDEX_KEYS)


def _pages(spec: Any, tokens: int) -> int:
    """Blocks of one group with this spec that a request holds when the last of its `tokens` tokens is computed."""
    newest = tokens - 1
    window = getattr(spec, "sliding_window", None)
    oldest = 0 if window is None else max(0, newest - window + 1)
    return newest // spec.block_size - oldest // spec.block_size + 1
