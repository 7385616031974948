"""What selections are made from: each request's last token, as the native and the memory indexer read it."""

from collections.abc import Sequence

import torch

from vllm_lsa.models.deepseek_v4.scorer import paged_logits
from vllm_lsa.ops.index_logits import KEY

_CPU = torch.device("cpu")


class LastQueries:
    """The indexer's query and head weights of the last token of each request, in each c4 layer.

    queries: fp8 e4m3 [rows, layers, h, 128]. weights: fp32 [rows, layers, h], the query's scale included. None until
    the first layer comes by, since the number of heads shows then.
    """

    def __init__(self, rows: int, layers: int, device: torch.device = _CPU) -> None:
        self._shape = (rows, layers)
        self._device = device
        self.queries: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None

    def allocate(self, heads: int, width: int = KEY) -> None:
        """What `note` would do with the first layer that comes by."""
        self.queries = torch.zeros(*self._shape, heads, width, dtype=torch.float8_e4m3fn, device=self._device)
        self.weights = torch.zeros(*self._shape, heads, dtype=torch.float32, device=self._device)

    def note(self, rows: torch.Tensor, layer: int, q: torch.Tensor, w: torch.Tensor) -> None:
        """Keep q e4m3 [n, h, 128] and w [n, h] for rows int64 [n]."""
        if self.queries is None or self.weights is None:
            self.allocate(*q.shape[1:])
        assert self.queries is not None and self.weights is not None
        # Indexed assignment has no fp8 form.
        self.queries.view(torch.uint8)[rows, layer] = q.view(torch.uint8)
        self.weights[rows, layer] = w.float()

    @torch.inference_mode()
    def forget(self, row: int) -> None:
        """The row gets another request."""
        if self.queries is not None and self.weights is not None:
            self.queries.view(torch.uint8)[row] = 0
            self.weights[row] = 0

    def shares(self, row: int, keys: Sequence[torch.Tensor], blocks: torch.Tensor, entries: int) -> torch.Tensor:
        """Each entry's share of a softmax over the logits of all, which layers can be compared by. fp32 [L, entries].

        keys: index keys of each layer, as `scorer.index_pages` takes them. blocks: int64 [n] of the request. Zeros as
        long as the indexer has made no query for anyone, because all of it was selected anyway.
        """
        if self.queries is None or self.weights is None:
            return torch.zeros(len(keys), entries, device=self._device)
        lengths = torch.full((1,), entries, device=self._device)
        return torch.cat(
            [
                paged_logits(
                    self.queries[row, layer][None],
                    self.weights[row, layer][None],
                    cache,
                    blocks[None],
                    lengths,
                    entries,
                ).softmax(1)
                for layer, cache in enumerate(keys)
            ]
        )


class LastHidden:
    """Attention's input at the last token of each request, in the layers that a memory indexer scores.

    states: fp32 [rows, layers, hidden_size], zeros for a request of which nothing was noted.
    """

    def __init__(self, rows: int, layers: Sequence[int], hidden_size: int, device: torch.device = _CPU) -> None:
        self._places = {layer: place for place, layer in enumerate(layers)}
        self.states = torch.zeros(rows, len(layers), hidden_size, device=device)

    def note(self, rows: torch.Tensor, layer: int, hidden: torch.Tensor) -> None:
        """Keep hidden [n, hidden_size], any float dtype, for rows int64 [n]. Other layers' are left alone."""
        if layer in self._places:
            self.states[rows, self._places[layer]] = hidden.float()

    @torch.inference_mode()
    def forget(self, row: int) -> None:
        """The row gets another request."""
        self.states[row] = 0

    def of(self, row: int) -> dict[int, torch.Tensor]:
        """By layer, fp32 [1, hidden_size]."""
        return {layer: self.states[row, place][None] for layer, place in self._places.items()}
