"""The pages that a request's rows choose from, laid out once for as long as its resident set stays what it is."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vllm_lsa.models.deepseek_v4.geometry import EntryGeometry
from vllm_lsa.residency.requests import Request


@dataclass(frozen=True)
class PageTable:
    """n pages of a request, in order.

    blocks: int32 [n]. slots: int32 [L, n], where they are in the pool, -1 for none; None for a row that reads the
    store. full: full pages of the request among them. tail: number of the request's last page; None if that is not
    among them. version: of the resident set that this was made of, see `ResidentSet`; 0 without one. complete: whether
    all have slots.
    """

    blocks: np.ndarray
    slots: np.ndarray | None
    full: int
    tail: int | None
    version: int = 0
    complete: bool = False

    def entries(self, geometry: EntryGeometry, tokens: int) -> int:
        """Entries on these pages when the request has so many tokens."""
        last = 0 if self.tail is None else geometry.num_entries(tokens) - self.tail * geometry.entries
        return self.full * geometry.entries + last


class PageTables:
    """The table of each request that goes by a set, made again when the set has another version.

    Block lists need no watching: a set gets a new page's block with the page, and a request whose blocks are replaced
    starts over with a new set.
    """

    def __init__(self, make: Callable[[Request], PageTable], check: bool) -> None:
        """make: a request's table from its resident set. check: make it at every step and compare."""
        self._make = make
        self._check = check
        self._tables: dict[Request, PageTable] = {}

    def of(self, request: Request, version: int) -> PageTable:
        """A request's table. version: of its resident set. Raises RuntimeError if a check fails."""
        table = self._tables.get(request)
        if table is None or table.version != version:
            table = self._tables[request] = self._make(request)
        elif self._check:
            made = self._make(request)
            same = (table.full, table.tail) == (made.full, made.tail) and np.array_equal(table.blocks, made.blocks)
            if not same or not np.array_equal(table.slots, made.slots):  # type: ignore[arg-type]
                raise RuntimeError(f"the resident set of {request.id} has changed unnoticed")
        return table

    def forget(self, request: Request) -> None:
        """The request has left, if it was here."""
        self._tables.pop(request, None)
