"""Several indexes side by side in one cell."""

from collections.abc import Sequence

import torch

from vllm_lsa.indexer.base import ChunkIndex

_ALIGN = 16


class IndexLayout:
    """Cells that hold the cells of several indexes one after the other; equal indexes share theirs.

    Each part, and so the whole, is padded to a multiple of 16 bytes, which suits loads of any dtype. An empty layout
    has cells of 16 unused bytes, since vLLM cannot page nothing.
    """

    def __init__(self, indexes: Sequence[ChunkIndex]) -> None:
        self._begin: dict[ChunkIndex, int] = {}
        end = 0
        for index in indexes:
            if index not in self._begin:
                self._begin[index] = end
                end += -(-index.cell_bytes // _ALIGN) * _ALIGN
        self.cell_bytes = max(end, _ALIGN)

    def encode(self, keys: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """Cells uint8 [n, Hkv, cell_bytes] of full chunks of a layer's keys [n, Hkv, C, D]; the padding is 0."""
        if len(self._begin) == 1:
            (index,) = self._begin
            if index.cell_bytes == self.cell_bytes:
                return index.encode(keys, layer)
        cells = torch.zeros(*keys.shape[:2], self.cell_bytes, dtype=torch.uint8, device=keys.device)
        for index in self._begin:
            self.part(cells, index).copy_(index.encode(keys, layer))
        return cells

    def part(self, cells: torch.Tensor, index: ChunkIndex) -> torch.Tensor:
        """The bytes of one index, uint8 [..., index.cell_bytes], a view of cells [..., cell_bytes].

        Raises KeyError if the layout does not hold the index.
        """
        begin = self._begin[index]
        return cells[..., begin : begin + index.cell_bytes]
