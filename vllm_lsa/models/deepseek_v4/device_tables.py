"""What kernels of a decode step read on a CUDA device, in buffers that stay where they are: graphs hold them."""

import numpy as np
import torch

from vllm_lsa.memory.device_transfers import DeviceTransfers
from vllm_lsa.models.deepseek_v4.engine import EntryPlan
from vllm_lsa.models.deepseek_v4.geometry import EntryGeometry


class DeviceTables:
    """Of L c4 layers, at most B rows that decode, W pages of a row, M pages that a step writes to.

    table: int32 [B, W], blocks of index keys that each row chooses from, in order. entries: int32 [B, 1], entries
    there, 0 for rows that no request has. slots: int32 [L, B, W], their pages' slots in the pool; with S staging pages
    for each row int32 [L, B, W + S], these behind, and -1 before for what is not resident. written_page: int64
    [L, M] and written_slot: int32 [L, M], pages of the host store to repeat in the pool, -1 for none. last_token,
    last_row: int64 [B], last token of each row of the batch, prompts included, and its row in the buffers of queries;
    row B takes what has no request.
    """

    def __init__(
        self,
        geometry: EntryGeometry,
        rows: int,
        width: int,
        most_tokens: int,
        device: torch.device,
        staging: np.ndarray | None = None,
    ) -> None:
        """width: pages of the longest request. most_tokens: of a step. staging: int64 [B * S], pages of the pool."""
        layers, most = geometry.num_layers, most_tokens // geometry.block_tokens + 2 * rows
        self.rows = rows

        def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.table = full(0, rows, width)
        self.entries = full(0, rows, 1)
        behind = np.empty((rows, 0)) if staging is None else staging.reshape(rows, -1)
        self.slots = full(0, layers, rows, width + behind.shape[1])
        self.slots[:, :, width:] = torch.from_numpy(behind.astype(np.int32)).to(device)
        self.written_page = full(0, layers, most, dtype=torch.int64)
        self.written_slot = full(-1, layers, most)
        self.last_token = full(0, rows, dtype=torch.int64)
        self.last_row = full(rows, rows, dtype=torch.int64)
        # What was sent last: between two cycles most steps change lengths alone.
        self._sent: tuple[np.ndarray, np.ndarray] | None = None
        self._written = most

    def send(self, plan: EntryPlan, lane_offset: np.ndarray, transfers: DeviceTransfers) -> None:
        """Bring a step's plan to the device, in the order of the stream. lane_offset: see `HostStore`."""
        decodes = len(plan.pool_rows)
        assert plan.pool_rows == list(range(decodes)), "rows that decode come first"
        table, slots = plan.table[:decodes].numpy(), plan.slots[:, :decodes].numpy().astype(np.int32)
        width = table.shape[1]
        if width and (self._sent is None or not _same(self._sent, (table, slots))):
            transfers.update([(self.table[:decodes, :width], table), (self.slots[:, :decodes, :width], slots)])
            self._sent = table.copy(), slots
        entries = np.zeros((self.rows, 1), np.int32)
        entries[:decodes, 0] = plan.entries[:decodes].numpy()
        pages, count = plan.written_pages, len(plan.written_pages)
        # A graph repeats as many as it has rows; what an earlier step wrote must not be among them.
        last = max(count, self._written)
        page, slot = np.zeros((len(slots), last), np.int64), np.full((len(slots), last), -1, np.int32)
        page[:, :count] = pages[None, :] + lane_offset[:, None]
        slot[:, :count] = plan.written_slots
        self._written = count
        rows = len(plan.rows)
        token, row = np.zeros(self.rows, np.int64), np.full(self.rows, self.rows, np.int64)
        token[:rows], row[:rows] = plan.last_token.numpy(), plan.last_row.numpy()
        pairs: list[tuple[torch.Tensor, np.ndarray]] = [
            (self.entries, entries),
            (self.last_token, token),
            (self.last_row, row),
        ]
        if last:
            pairs += [(self.written_page[:, :last], page), (self.written_slot[:, :last], slot)]
        transfers.update(pairs)

    def clear(self) -> None:
        """For a step of no requests: nothing is read, repeated or noted."""
        self.entries.zero_()
        self.written_slot.fill_(-1)
        self.last_token.zero_()
        self.last_row.fill_(self.rows)


def _same(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
