"""The persistent buffers that LSA's kernels read and write: the rows of a step, and the resident sets of requests.

Their addresses never change, so a CUDA graph that was captured once serves every later step. Two kinds of decode rows:

- a *whole* row keeps all of its chunks. Which slot holds a chunk is looked up by its host page, in `slot_of`, so that
  requests with a common prefix share slots;
- a row *on a budget* has a set in `DeviceSets`: for each lane a list of (chunk, slot) entries. The kernels change it.

A *host page* is a row of the host store: of (block b, lane l, chunk c of the block) it is
``(b * lanes + l) * chunks_per_block + c``; chunk i of a request is in its block ``i // chunks_per_block``.
"""

from dataclasses import dataclass

import torch

from vllm_lsa.memory.geometry import KVGeometry

PAGE = 64
"""Entries of a state page: sets are paged like K and V are, so that short requests take little."""


@dataclass
class DeviceRows:
    """The decode rows of a step, n of them; those past the batch are padding.

    token: int32 [n], the row's token in q, k, v and out. length: int32 [n], tokens in the cache after this step, the
    row's own included; 0 for padding, which kernels skip. state: int32 [n], row of `DeviceSets`, -1 for a whole row.
    query_row: int32 [n], row of the buffer of last queries. block_table: int32 [n, B], block ids.
    """

    token: torch.Tensor
    length: torch.Tensor
    state: torch.Tensor
    query_row: torch.Tensor
    block_table: torch.Tensor

    def first(self, n: int) -> "DeviceRows":
        """The first n rows, views."""
        return DeviceRows(self.token[:n], self.length[:n], self.state[:n], self.query_row[:n], self.block_table[:n])


@dataclass
class DeviceTails:
    """Where the rows' tokens go, looked up once for all layers. page: int64 [n], host page in lane 0. slot: int32
    [n, lanes], -1 for none.
    """

    page: torch.Tensor
    slot: torch.Tensor

    @classmethod
    def empty(cls, rows: int, geometry: KVGeometry, device: torch.device) -> "DeviceTails":
        return cls(
            page=torch.zeros(rows, dtype=torch.int64, device=device),
            slot=torch.full((rows, geometry.num_lanes), -1, dtype=torch.int32, device=device),
        )


@dataclass
class DeviceSets:
    """Resident sets of the requests on a budget. Entry or chunk e of a row's lane is at ``[page, lane, e % PAGE]`` of
    the paged buffers, with ``page = pages[row, e // PAGE]``.

    pages: int32 [rows, P], state pages of each row.
    counts: int32 [rows, lanes], entries in use. The entries from there up to what the row owns are spare: their slots
    belong to the lane and hold nothing, but what a step's demand brought until the end of the step.
    caps: int32 [rows, lanes], most entries that the lane may use after a step.
    room: int32 [rows, lanes], most chunks that the demand of a step may bring: the lane owns a slot more for each.
    chunk, slot: int32 [pages, lanes, PAGE], by entry. The last entry in use is the tail, the chunk that the row's next
    token goes to; the others are full, in no order. A slot of -1 says that the chunk is read from its host page.
    held: uint8 [pages, lanes, PAGE], by chunk: 1 where it is in the set.
    usage: fp32 [pages, lanes, PAGE], by chunk: see `residency.usage`.
    """

    pages: torch.Tensor
    counts: torch.Tensor
    caps: torch.Tensor
    room: torch.Tensor
    chunk: torch.Tensor
    slot: torch.Tensor
    held: torch.Tensor
    usage: torch.Tensor

    @classmethod
    def empty(
        cls, rows: int, row_pages: int, num_pages: int, geometry: KVGeometry, device: torch.device
    ) -> "DeviceSets":
        """rows: requests on a budget at a time. row_pages: state pages of the longest one. num_pages: in all."""

        def paged(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(num_pages, geometry.num_lanes, PAGE, dtype=dtype, device=device)

        def per_row(width: int) -> torch.Tensor:
            return torch.zeros(rows, width, dtype=torch.int32, device=device)

        return cls(
            pages=per_row(row_pages),
            counts=per_row(geometry.num_lanes),
            caps=per_row(geometry.num_lanes),
            room=per_row(geometry.num_lanes),
            chunk=paged(torch.int32),
            slot=paged(torch.int32),
            held=paged(torch.uint8),
            usage=paged(torch.float32),
        )

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values())

    def by_chunk(self, row: int, paged: torch.Tensor, count: int) -> torch.Tensor:
        """A row's values of a buffer by chunk, [lanes, count]."""
        return paged[self.pages[row, : -(-count // PAGE)].long()].transpose(0, 1).flatten(1)[:, :count]


NEXT = 8
"""Most chunks of a lane that are on their way at a time when a set is renewed in the background; a power of two."""


@dataclass
class DeviceRefresh:
    """How sets come to what was selected for their cycle while decoding goes on; see `ops.resident_rows.refresh`.

    target: uint8 [pages, lanes, PAGE], by chunk: 1 where the selection keeps it. selected: int32 [rows], chunks that
    the selection knew of. chunk, slot: int32 [rows, lanes, NEXT], what is on its way, -1 for none, and slots of the
    lane's that are in no list, -1 where it has fewer. victims: int32 [n, lanes, NEXT], scratch. copy_page: int64 and
    copy_slot: int32 [n, lanes, NEXT], what to copy now, -1 for nothing. brought: int64 [1], chunks since the start.
    """

    target: torch.Tensor
    selected: torch.Tensor
    chunk: torch.Tensor
    slot: torch.Tensor
    victims: torch.Tensor
    copy_page: torch.Tensor
    copy_slot: torch.Tensor
    brought: torch.Tensor

    @classmethod
    def empty(cls, rows: int, num_pages: int, geometry: KVGeometry, device: torch.device) -> "DeviceRefresh":
        """For as many sets as decode rows."""

        def per_row(dtype: torch.dtype) -> torch.Tensor:
            return torch.full((rows, geometry.num_lanes, NEXT), -1, dtype=dtype, device=device)

        return cls(
            target=torch.zeros(num_pages, geometry.num_lanes, PAGE, dtype=torch.uint8, device=device),
            selected=torch.zeros(rows, dtype=torch.int32, device=device),
            chunk=per_row(torch.int32),
            slot=per_row(torch.int32),
            victims=per_row(torch.int32),
            copy_page=per_row(torch.int64),
            copy_slot=per_row(torch.int32),
            brought=torch.zeros(1, dtype=torch.int64, device=device),
        )
