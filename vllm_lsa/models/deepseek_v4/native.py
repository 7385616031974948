"""The native indexer's opinion of pages: its logits for the last query of each layer, over vLLM's index-key cache."""

import torch

KEY_BYTES, SCALE_BYTES = 128, 4
# Keys that are unpacked together: 16 MiB of them.
_TILE_PAGES = 512


class LastQueries:
    """The indexer's query and head weights of the last token of each request, in each c4 layer.

    queries: fp8 e4m3 [rows, layers, h, 128]. weights: fp32 [rows, layers, h], the query's scale included. Made when the
    first layer comes by, since the number of heads shows then.
    """

    def __init__(self, rows: int, layers: int) -> None:
        self._shape = (rows, layers)
        self._queries: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None

    def note(self, rows: torch.Tensor, layer: int, q: torch.Tensor, w: torch.Tensor) -> None:
        """Keep q [n, h, 128] and w [n, h] for rows int64 [n]."""
        if self._queries is None or self._weights is None:
            self._queries = torch.zeros(*self._shape, *q.shape[1:], dtype=q.dtype, device=q.device)
            self._weights = torch.zeros(*self._shape, *w.shape[1:], dtype=torch.float32, device=w.device)
        # Indexed assignment has no fp8 form.
        self._queries.view(torch.uint8)[rows, layer] = q.view(torch.uint8)
        self._weights[rows, layer] = w.float()

    def page_shares(self, row: int, keys: list[torch.Tensor], blocks: torch.Tensor) -> torch.Tensor:
        """Each page's share of a softmax over the logits of all entries, in each layer.

        keys: index keys of each layer, see `index_logits`. blocks: int64 [N], full pages. Returns fp32 [layers, N]:
        zeros for a request whose query the indexer has not made yet, because all of it was selected anyway.
        """
        if self._queries is None or self._weights is None:
            return torch.zeros(len(keys), len(blocks))
        shares = []
        for layer, cache in enumerate(keys):
            logits = index_logits(self._queries[row, layer], self._weights[row, layer], cache, blocks)
            shares.append(logits.softmax(0).view(len(blocks), -1).sum(1))
        return torch.stack(shares)


def index_logits(q: torch.Tensor, w: torch.Tensor, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """sum over heads of w * relu(q . k), for every entry of full pages.

    q: e4m3 [h, 128]. w: fp32 [h]. cache: uint8 [B, n, 132] in any stride between pages: n * 128 e4m3, then n fp32
    scales. blocks: int64 [N]. Returns fp32 [N * n], in the order of blocks.
    """
    query, entries = q.float(), cache.shape[1]
    parts = []
    for tile in blocks.split(_TILE_PAGES):
        pages = cache[tile].view(len(tile), -1)
        keys = pages[:, : entries * KEY_BYTES].contiguous().view(torch.float8_e4m3fn).float().view(-1, KEY_BYTES)
        scales = pages[:, entries * KEY_BYTES : entries * (KEY_BYTES + SCALE_BYTES)].contiguous().view(torch.float32)
        parts.append((w @ (query @ keys.T).relu_()) * scales.view(-1))
    return torch.cat(parts) if parts else torch.empty(0)
