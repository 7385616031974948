"""What one step's attention needs to know, laid out as the kernels read it."""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_lsa.residency.requests import Request
from vllm_lsa.residency.resident_set import ResidentSet
from vllm_lsa.residency.usage import Usage


@dataclass
class Row:
    """A request's place in the batch: its tokens are [start, start + length) of the step's tokens."""

    request: Request
    start: int
    length: int


@dataclass
class DecodeRow:
    """A row that attends to a resident set. Where `usage` is given, it may take in chunks that are not in it.

    caps: int64 [lanes], most chunks that each lane may hold; None where there is no limit. blocks: int64, the request's
    blocks on the device; given with usage.
    """

    request: Request
    resident: ResidentSet
    usage: Usage | None
    caps: np.ndarray | None
    blocks: torch.Tensor | None


@dataclass
class StepPlan:
    """One step, t tokens, n decode rows, g lanes a layer.

    num_tokens: t. token_offset: int32 [t * g], position in the chunk. token_page: int64 [t * g], host page in layer 0.
    token_slot: int32 [layers, t * g], slot or -1. Tokens come one after the other, each with its g lanes.
    decodes: the n decode rows; decode_token: int64 [n], their tokens. table: int32 [layers, n * g, W], counts: int32
    [layers, n * g], first_len: int32 [layers, n * g] as `paged_decode_attention` reads them, one layer at a time.
    prefills: rows that attend to their whole history.
    complete_token: int64 [m, C], tokens of chunks that this step fills from first to last; complete_block,
    complete_chunk: int64 [m + p], block ids and chunks in the block; the last p began in an earlier step and are read
    from complete_page, int64 [p], pages in lane 0.
    last_token, last_row: int64 [rows], last token of each row and its row in the query buffer.
    """

    num_tokens: int
    token_offset: torch.Tensor
    token_page: torch.Tensor
    token_slot: torch.Tensor
    decodes: list[DecodeRow]
    decode_token: torch.Tensor
    table: torch.Tensor
    counts: torch.Tensor
    first_len: torch.Tensor
    prefills: list[Row]
    complete_token: torch.Tensor
    complete_block: torch.Tensor
    complete_chunk: torch.Tensor
    complete_page: np.ndarray
    last_token: torch.Tensor
    last_row: torch.Tensor
