"""What the settings of `LsaConfig` mean for DeepSeek-V4, and which have no meaning there."""

from typing import Any

from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.models.deepseek_v4.memory_indexer import checkpoint_path
from vllm_lsa.models.deepseek_v4.selection import TOP_K
from vllm_lsa.models.deepseek_v4.specs import C4_TOKENS, PAGE_ENTRIES

PAGE_TOKENS = C4_TOKENS * PAGE_ENTRIES
TOP_K_TOKENS = C4_TOKENS * TOP_K
INDEXERS = ("native", "exact", "recency", "random", "keep_all")
"""Training-free policies for c4 pages. native: the model's own indexer, asked with the last query of each layer. exact:
begun likewise, and in every step the model's own indexer chooses from all pages, those on the host included; on a CPU
what it chose changes the set, on a CUDA device sets stay for a cycle and what they lack passes through.

Besides them a memory indexer, by its path."""

_DEFAULTS: dict[str, Any] = {
    "indexer": "native",
    "sets": "shared",
    "demand": "off",
    "chunk_tokens": PAGE_TOKENS,
    "sink_tokens": PAGE_TOKENS,
    # What the native top-k must be able to choose from in any case.
    "recency_tokens": TOP_K_TOKENS,
}
_ONLY: dict[str, tuple[Any, ...]] = {
    "indexer": INDEXERS,
    "sets": ("shared",),
    "demand": ("off",),
    "lookahead": ("indexer",),
    "chunk_tokens": (PAGE_TOKENS,),
}
_WITHOUT_MEANING = ("demand_chunks", "demand_threshold")


def for_deepseek_v4(config: LsaConfig) -> LsaConfig:
    """The configuration with V4's values for what was not set.

    Raises LsaError, in one line, for a setting that V4 cannot follow.
    """
    given, checkpoint = config.model_fields_set, checkpoint_path(config.indexer)
    if checkpoint is not None and config.chunk_tokens == C4_TOKENS:
        given = given - {"chunk_tokens"}  # what it scores, which `LsaConfig` takes from it; pages are what moves
    config = config.model_copy(update={name: value for name, value in _DEFAULTS.items() if name not in given})
    for name, allowed in _ONLY.items():
        value = getattr(config, name)
        if value not in allowed and not (name == "indexer" and checkpoint is not None):
            more = ", or a memory indexer's .pt, .safetensors or folder" if name == "indexer" else ""
            raise LsaError(
                f"lsa.{name}={value!r} does not work with DeepSeek-V4: use "
                f"{' or '.join(repr(choice) for choice in allowed)}{more}"
            )
    for name in _WITHOUT_MEANING:
        if name in given:
            raise LsaError(f"lsa.{name}={getattr(config, name)!r} has no meaning with DeepSeek-V4: leave it out")
    for name in ("sink_tokens", "recency_tokens"):
        if getattr(config, name) % PAGE_TOKENS:
            raise LsaError(
                f"lsa.{name}={getattr(config, name)} is not a multiple of {PAGE_TOKENS}, the tokens of a page of "
                "DeepSeek-V4: round it up"
            )
    # Exact chooses from everything.
    if config.indexer != "exact" and config.sink_tokens + config.recency_tokens < TOP_K_TOKENS:
        raise LsaError(
            f"lsa.sink_tokens={config.sink_tokens} + lsa.recency_tokens={config.recency_tokens} may keep less than the "
            f"{TOP_K} entries that DeepSeek-V4's own indexer picks: raise them to {TOP_K_TOKENS} tokens together"
        )
    return config
