"""One step as the device engine runs it."""

from dataclasses import dataclass, field

import torch

from vllm_lsa.device.history import History
from vllm_lsa.device.state import DeviceRows
from vllm_lsa.residency.plan import Row


@dataclass
class PrefillPlan:
    """Rows that attend to their whole history.

    rows, histories: one each. page0: int64 [t], page in lane 0 of each of the step's tokens, -1 where it is no
    prompt's; offset: int32 [t], in the chunk. whole: chunks that the step fills from first to last, as (first token,
    block, chunk in the block), int32 [m] each; begun: those that an earlier step began, as (page in lane 0 int64,
    block, chunk).
    last_token, query_row: int64 [rows], where the last query is and where it goes.
    """

    rows: list[Row]
    histories: list[History]
    page0: torch.Tensor
    offset: torch.Tensor
    whole: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    begun: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    last_token: torch.Tensor
    query_row: torch.Tensor


@dataclass
class DevicePlan:
    """rows: the decode rows, padding included: views of buffers that keep their addresses. requests: names of those
    that are real, in order. demands: whether any of them may ask for chunks: none does where all rows are whole.
    """

    rows: DeviceRows
    prefill: PrefillPlan | None = None
    requests: list[str] = field(default_factory=list)
    demands: bool = True
