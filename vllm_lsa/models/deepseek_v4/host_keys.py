"""The native indexer of a c4 layer whose index keys have left the device.

Prompts score the keys in the host store, as they do in vLLM's own cache otherwise; rows of one token score those of
their resident pages in the pool, which is all that they are shown in any case.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.forward_context import get_forward_context

from vllm_lsa.models.deepseek_v4.scorer import PagedScorer, model_layers
from vllm_lsa.models.deepseek_v4.specs import C4_TOKENS


def key_layers(scorer: PagedScorer | None, compress_ratios: Sequence[int]) -> frozenset[int]:
    """Layers of the model whose index keys stay on the device where those of the others do not.

    Those that the memory indexer scores; without one the first, whose blocks say where the others' keys are.
    """
    if scorer is not None:
        return frozenset(model_layers(scorer.layers, compress_ratios).values())
    return frozenset([list(compress_ratios).index(C4_TOKENS)])


def score(
    attention: Any,
    metadata: Any,
    decode_keys: torch.Tensor,
    decode_table: torch.Tensor,
    hidden_states: torch.Tensor,
    q: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Fill `topk_indices_buffer`. metadata: of the index keys that stay. decode_keys: uint8 [n, entries, 132], in which
    decode_table int32 [rows, W] finds the pages of rows of one token. Others: of the step's tokens."""
    indexer = attention.indexer
    cache, known = indexer.k_cache, get_forward_context().attn_metadata
    store = cache.kv_cache
    tokens = metadata.num_decode_tokens
    try:
        if metadata.num_prefills:
            known[cache.prefix] = replace(metadata, num_decodes=0, decode=None)
            indexer.indexer_op(hidden_states, q, None, weights)
        if metadata.num_decodes:
            # After the prompts, since the operator first clears the rows that it is given.
            decode = replace(metadata.decode, block_table=decode_table)
            known[cache.prefix] = replace(metadata, num_prefills=0, prefill=None, decode=decode)
            cache.kv_cache = decode_keys
            indexer.indexer_op(hidden_states[:tokens], q[:tokens], None, weights[:tokens])
    finally:
        cache.kv_cache = store
        known[cache.prefix] = metadata
