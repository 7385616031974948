"""The kernels of a c4 layer of DeepSeek-V4 as `benchmarks.v4_stack` calls them: vLLM's on a GPU, and their twins.

Only the index logits are not vLLM's: its kernel for them is DeepGEMM's, which does not load on torch 2.11. Stock and
LSA both use `vllm_lsa.ops.index_logits`.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from benchmarks.v4_caches import entry_view
from tests.v4.pages import read_mla
from vllm_lsa.models.deepseek_v4.selection import TOP_K
from vllm_lsa.models.deepseek_v4.specs import PAGE_ENTRIES

HEADS, HEAD_DIM, WINDOW = 64, 512, 128
SCALE = HEAD_DIM**-0.5


class Kernels(Protocol):
    """What follows the index logits in a layer."""

    def plan(self) -> Any:
        """What the attention of all layers of one step shares."""

    def top_k(self, logits: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor, max_len: int) -> None:
        """Numbers of the 512 highest logits fp32 [B, N] of each row, int32 [B, 512]; -1 where there are fewer.

        lengths: int32 [B, 1]. max_len: tokens that vLLM knows the longest request to have.
        """

    def remap(self, chosen: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of the pages in table int32 [B, W] for chosen int32 [B, 512], and how many of each row are valid."""

    def attend(
        self, q: torch.Tensor, window: torch.Tensor, window_entries: torch.Tensor, window_lengths: torch.Tensor,
        pages: torch.Tensor, entries: torch.Tensor, counts: torch.Tensor, sink: torch.Tensor, plan: Any,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Attention of q bf16 [B, 64, 512] over entries int32 [B, K] of window pages and of c4 pages, uint8 [n,
        C4_PAGE]. counts, window_lengths: int32 [B], how many of a row's entries count. sink: fp32 [64]. out: as q."""


class VllmKernels:
    """The calls that vLLM 0.32 makes on sm_90 in a decode step (nvidia/flashmla.py, sparse_attn_indexer.py)."""

    def __init__(self, rows: int, device: torch.device, top_k: str = "auto") -> None:
        """top_k: vLLM's sparse_indexer_topk_backend; auto is what V4 uses."""
        from vllm.model_executor.layers.indexer_topk import get_indexer_topk
        from vllm.v1.attention.ops import flashmla
        from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

        supported, why = flashmla.is_flashmla_sparse_supported()
        if not supported:
            sys.exit(f"benchmarks.v4_stack needs FlashMLA's sparse decode: {why}")
        if not is_workspace_manager_initialized():
            init_workspace_manager(device)
        self._flashmla, self._top_k = flashmla, get_indexer_topk(top_k)
        self._remap = _cache_utils().compute_global_topk_indices_and_lens
        self._rows = torch.arange(rows, dtype=torch.int32, device=device)
        self._valid = torch.ones(rows, dtype=torch.bool, device=device)

    def plan(self) -> Any:
        return self._flashmla.get_mla_metadata()[0]

    def top_k(self, logits: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor, max_len: int) -> None:
        self._top_k(logits, lengths, 1, out, TOP_K, max_len)

    def top_k_name(self, logits: torch.Tensor) -> str:
        return str(self._top_k.resolve_backend(logits, TOP_K, len(logits)))

    def remap(self, chosen: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._remap(chosen, self._rows, table, PAGE_ENTRIES, self._valid)

    def attend(
        self, q: torch.Tensor, window: torch.Tensor, window_entries: torch.Tensor, window_lengths: torch.Tensor,
        pages: torch.Tensor, entries: torch.Tensor, counts: torch.Tensor, sink: torch.Tensor, plan: Any,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        self._flashmla.flash_mla_with_kvcache(
            q=q.unsqueeze(1),
            k_cache=entry_view(window).unsqueeze(-2),
            block_table=None,
            head_dim_v=HEAD_DIM,
            tile_scheduler_metadata=plan,
            cache_seqlens=None,
            is_fp8_kvcache=True,
            indices=window_entries.unsqueeze(1),
            topk_length=window_lengths,
            softmax_scale=SCALE,
            attn_sink=sink,
            extra_k_cache=entry_view(pages).unsqueeze(-2),
            extra_indices_in_kvcache=entries.unsqueeze(1),
            extra_topk_length=counts,
            out=out.unsqueeze(1),
        )


class NaiveKernels:
    """The same in plain PyTorch, fp32."""

    def plan(self) -> None:
        return None

    def top_k(self, logits: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor, max_len: int) -> None:
        behind = torch.arange(logits.shape[1], device=logits.device) >= lengths
        values, chosen = logits.masked_fill(behind, -torch.inf).topk(min(TOP_K, logits.shape[1]), dim=1)
        out.fill_(-1)
        out[:, : chosen.shape[1]] = chosen.masked_fill(values == -torch.inf, -1)

    def remap(self, chosen: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        page = table.long().gather(1, chosen.clamp(min=0).long() // PAGE_ENTRIES)
        entries = (page * PAGE_ENTRIES + chosen % PAGE_ENTRIES).masked_fill(chosen < 0, -1)
        return entries.int(), (chosen >= 0).sum(1).int()

    def attend(
        self, q: torch.Tensor, window: torch.Tensor, window_entries: torch.Tensor, window_lengths: torch.Tensor,
        pages: torch.Tensor, entries: torch.Tensor, counts: torch.Tensor, sink: torch.Tensor, plan: Any,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        for row in range(len(q)):
            read = (
                (window, window_entries[row, : int(window_lengths[row])]),
                (pages, entries[row, : int(counts[row])]),
            )
            states = torch.cat([read_mla(memory, PAGE_ENTRIES, at[at >= 0].long()) for memory, at in read])
            states = states.to(q.device)  # on the CPU until here
            scores = SCALE * q[row].float() @ states.T
            shares = torch.cat([scores, sink.unsqueeze(1)], dim=1).softmax(1)[:, :-1]  # the sink has no value
            out[row] = (shares @ states).to(out.dtype)


def _cache_utils() -> ModuleType:
    """vLLM's cache_utils of V4, without the package around it, which imports the whole model and what that needs."""
    name = "vllm.models.deepseek_v4"
    if name not in sys.modules:
        spec = importlib.util.find_spec("vllm")
        assert spec is not None and spec.origin is not None
        package = ModuleType(name)
        package.__path__ = [str(Path(spec.origin).parent / "models" / "deepseek_v4")]
        sys.modules[name] = package
    return importlib.import_module(f"{name}.common.ops.cache_utils")
