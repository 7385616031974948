"""What kernels of a decode step read on a CUDA device, in buffers that stay where they are: graphs hold them."""

import numpy as np
import torch

from vllm_lsa.memory.device_transfers import DeviceTransfers
from vllm_lsa.models.deepseek_v4.engine import EntryPlan
from vllm_lsa.models.deepseek_v4.geometry import EntryGeometry
from vllm_lsa.models.deepseek_v4.page_tables import PageTable


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
        # Version of the set whose pages each row has; what was sent last of entries, last_token and last_row.
        self._versions = [0] * rows
        self._sent: list[np.ndarray] | None = None
        self._written = most

    def send(self, plan: EntryPlan, lane_offset: np.ndarray, transfers: DeviceTransfers) -> None:
        """Bring to the device what a step's plan changes, in the order of the stream. lane_offset: see `HostStore`."""
        decodes = len(plan.pool_rows)
        assert plan.pool_rows == list(range(decodes)), "rows that decode come first"
        pairs = self._changed_pages(plan.shown[:decodes])
        entries = np.zeros((self.rows, 1), np.int32)
        entries[:decodes, 0] = plan.entries[:decodes].numpy()
        pages, count = plan.written_pages, len(plan.written_pages)
        # A graph repeats as many as it has rows; what an earlier step wrote must not be among them.
        last = max(count, self._written)
        if last:
            page = np.zeros((plan.num_layers, last), np.int64)
            slot = np.full((plan.num_layers, last), -1, np.int32)
            page[:, :count] = pages[None, :] + lane_offset[:, None]
            slot[:, :count] = plan.written_slots
            pairs += [(self.written_page[:, :last], page), (self.written_slot[:, :last], slot)]
        self._written = count
        rows = len(plan.rows)
        token, row = np.zeros(self.rows, np.int64), np.full(self.rows, self.rows, np.int64)
        token[:rows], row[:rows] = plan.last_token.numpy(), plan.last_row.numpy()
        pairs += self._changed([entries, token, row])
        transfers.update(pairs)

    def _changed_pages(self, shown: list[PageTable]) -> list[tuple[torch.Tensor, np.ndarray]]:
        """Rows that have others' pages, or those of another version of their set, and what they are to have."""
        pairs = []
        for i, table in enumerate(shown):
            if self._versions[i] != table.version:
                assert table.slots is not None
                pages, self._versions[i] = len(table.blocks), table.version
                pairs += [(self.table[i, :pages], table.blocks), (self.slots[:, i, :pages], table.slots)]
        return pairs

    def _changed(self, values: list[np.ndarray]) -> list[tuple[torch.Tensor, np.ndarray]]:
        """Those of entries, last_token and last_row that are not on the device yet."""
        before, self._sent = self._sent, values
        pairs = list(zip((self.entries, self.last_token, self.last_row), values, strict=True))
        if before is None:
            return pairs
        return [pair for pair, old in zip(pairs, before, strict=True) if not np.array_equal(pair[1], old)]

    def clear(self) -> None:
        """For a step of no requests: nothing is read, repeated or noted."""
        self._sent = None
        self.entries.zero_()
        self.written_slot.fill_(-1)
        self.last_token.zero_()
        self.last_row.fill_(self.rows)
