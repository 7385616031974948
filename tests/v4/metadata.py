"""Torch versions of the Triton kernels that build V4's metadata: the stock CPU build has no Triton.

Called with the kernel's own arguments, in its order (`vllm.triton_utils.dispatcher`); `*_ptr` are tensors.
"""

from collections.abc import Callable
from typing import Any

import torch

_MLA = "vllm.v1.attention.backends.mla"


def token_request_mapping(
    query_start_loc: torch.Tensor,
    output: torch.Tensor,
    num_reqs: int,
    num_mapped: int,
    num_tokens: int,
    num_warps: int = 4,
) -> None:
    """output int32 [num_tokens]: the request of each token, 0 from num_mapped on; query_start_loc int32 [R + 1].

    vllm/v1/attention/ops/metadata.py:24.
    """
    tokens = torch.arange(num_tokens, dtype=query_start_loc.dtype)
    requests = torch.searchsorted(query_start_loc[1 : num_reqs + 1], tokens, right=True).clamp(max=num_reqs - 1)
    output[:num_tokens] = requests.masked_fill(tokens >= num_mapped, 0)


def compressed_slot_mapping(
    compressed_slot_mapping_ptr: torch.Tensor,
    slot_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    block_table_ptr: torch.Tensor,
    block_table_stride: int,
    block_size: int,
    dcp_world_size: int,
    cp_interleave: int,
    COMPRESS_RATIO: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """Slots int64 [T] of the compressed states that tokens complete, PAD_ID elsewhere.

    vllm/v1/attention/backends/mla/compressor_utils.py:48.
    """
    assert dcp_world_size == 1
    starts, lengths = query_start_loc_ptr.tolist(), seq_lens_ptr.tolist()
    for request, table in enumerate(block_table_ptr):
        begin, end = starts[request], starts[request + 1]
        positions = torch.arange(end - begin) + lengths[request] - (end - begin)
        valid = ((positions + 1) % COMPRESS_RATIO == 0) & (slot_mapping_ptr[begin:end] != PAD_ID)
        state = positions[valid] // COMPRESS_RATIO
        slots = torch.full((end - begin,), PAD_ID)
        slots[valid] = table[state // block_size].long() * block_size + state % block_size
        compressed_slot_mapping_ptr[begin:end] = slots


def prefill_gather_lens(
    prefill_gather_lens_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    replay_start_ptr: torch.Tensor,
    num_prefills: int,
    num_decodes: int,
    window_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Tokens int32 [num_prefills] whose window states a prompt reads.

    vllm/v1/attention/backends/mla/sparse_swa.py:340.
    """
    requests = slice(num_decodes, num_decodes + num_prefills)
    queries = query_start_loc_ptr.diff()[requests]
    visible = (seq_lens_ptr[requests] - queries - replay_start_ptr[requests]).clamp(min=0)
    prefill_gather_lens_ptr[:num_prefills] = queries + visible.clamp(max=window_size - 1)


def swa_indices_and_lens(
    swa_indices_ptr: torch.Tensor,
    swa_indices_stride: int,
    swa_lens_ptr: torch.Tensor,
    window_size: int,
    index_width: int,
    left_visible_ptr: torch.Tensor,
    right_visible_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    token_to_req_indices_ptr: torch.Tensor,
    is_valid_token_ptr: torch.Tensor,
    block_table_ptr: torch.Tensor,
    block_table_stride: int,
    block_size: int,
    replay_start_ptr: torch.Tensor,
    token_offset: int,
    HAS_IMAGE: bool,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """Slots of each token's window, int32 [T, 1, width], and their number, int32 [T].

    Nothing on the CPU reads them: `DeepseekV4CPUAttention.forward_mqa` works the window out itself
    (vllm/models/deepseek_v4/cpu/cpu_sparse.py:590). Marked as none, so that a reader would be noticed.
    vllm/v1/attention/backends/mla/sparse_swa.py:1042.
    """
    swa_indices_ptr.fill_(-1)
    swa_lens_ptr.fill_(0)


def prefill_chunk(
    query_start_loc_ptr: torch.Tensor,
    uncompressed_seq_lens_ptr: torch.Tensor,
    cu_compressed_seq_lens_ptr: torch.Tensor,
    row_start_cu_compressed_seq_lens_ptr: torch.Tensor,
    token_to_seq_ptr: torch.Tensor,
    cu_compressed_seq_len_ks_ptr: torch.Tensor,
    cu_compressed_seq_len_ke_ptr: torch.Tensor,
    query_slice_start: int,
    query_slice_stop: int,
    DCP_RANK: int,
    DCP_WORLD: int,
    DCP_INTERLEAVE: int,
    BLOCK_SIZE: int,
    COMPRESS_RATIO: int,
) -> None:
    """First and last compressed state that each query row may see, int32 [rows], and each state's request.

    vllm/v1/attention/backends/mla/indexer.py:497.
    """
    assert DCP_WORLD == 1
    starts, lengths = query_start_loc_ptr.tolist(), uncompressed_seq_lens_ptr.tolist()
    bounds, row_starts = cu_compressed_seq_lens_ptr.tolist(), row_start_cu_compressed_seq_lens_ptr.tolist()
    for request in range(len(lengths)):
        begin, end = max(starts[request], query_slice_start), min(starts[request + 1], query_slice_stop)
        if begin < end:
            rows = slice(begin - query_slice_start, end - query_slice_start)
            seen = torch.arange(begin, end) + lengths[request] - starts[request + 1] + 1
            cu_compressed_seq_len_ks_ptr[rows] = row_starts[request]
            cu_compressed_seq_len_ke_ptr[rows] = (row_starts[request] + seen // COMPRESS_RATIO).int()
        token_to_seq_ptr[bounds[request] : bounds[request + 1]] = request


KERNELS: dict[str, Callable[..., Any]] = {
    "vllm.v1.attention.ops.metadata._token_request_mapping_kernel": token_request_mapping,
    f"{_MLA}.compressor_utils.CompressedSlotMappingKernel.kernel": compressed_slot_mapping,
    f"{_MLA}.sparse_swa.ComputePrefillMetadataKernel.kernel": prefill_gather_lens,
    f"{_MLA}.sparse_swa.ComputeSWAIndicesAndLensKernel.kernel": swa_indices_and_lens,
    f"{_MLA}.indexer.BuildPrefillChunkMetadataKernel.kernel": prefill_chunk,
}
