"""What is noted of DeepSeek-V4 while vLLM runs it over a window: a hook on its c4 layers, in vLLM's worker.

vLLM mixes `CaptureWorker` into its worker class (``worker_extension_cls``). Under tensor parallelism every rank has the
indexer and the hidden states whole, and rank 0 does all of it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from indexer_training.masses import Masses, sparse, top_share
from indexer_training.settings import Settings, read_settings
from indexer_training.v4_model import V4Shape
from indexer_training.workspace import Workspace, write_tensors
from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.packed_keys import keys_of_pages, unpack_keys
from vllm_lsa.models.deepseek_v4.scorer import index_pages
from vllm_lsa.models.deepseek_v4.specs import C4_TOKENS, PAGE_ENTRIES, layer_of

# Values of q·k that are held at a time.
_AT_ONCE = 1 << 25
Query = tuple[torch.Tensor, torch.Tensor]


class Recorder:
    """Hidden states, index keys and golden entries of one window of text.

    L c4 layers, C candidates, S cycles, N entries. An entry is golden for a token if it is among the fewest of the
    native top-k that hold `native_top_p` of the softmax over the native logits of these (where there are fewer than k,
    the indexer makes none and all are golden). A cycle at token t knows the entries that are whole there, n < t / 4,
    whatever tokens of its window choose besides.
    """

    def __init__(self, settings: Settings, layers: int) -> None:
        self.settings = settings
        s, entries = settings, settings.chunks
        self.counts = torch.tensor(s.starts) // s.chunk_tokens
        cycles = len(self.counts)
        self.upcoming, self.last = (torch.zeros(layers, cycles, entries, dtype=torch.int32) for _ in range(2))
        self.hidden: dict[int, list[torch.Tensor | None]] = {layer: [None] * cycles for layer in s.candidates}
        self.keys = torch.zeros(layers, entries, 132, dtype=torch.uint8)
        self.written = torch.zeros(layers, entries, dtype=torch.bool)

    def note(
        self,
        layer: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        query: Query | None,
        chosen: torch.Tensor,
        keys: torch.Tensor,
    ) -> None:
        """A step of a layer: t tokens at positions int64 [t], in order.

        hidden: [t, F], the attention module's input. query: the native indexer's, e4m3 or float [t, h, 128] and fp32
        [t, h]; None where it chose everything without asking. chosen: integers [t, K], entries, -1 for none. keys:
        packed uint8 [m, 132] of the m entries that the step completed, those of tokens with (position + 1) % 4 = 0.
        """
        s = self.settings
        where = positions.cpu()
        complete = where[(where + 1) % s.chunk_tokens == 0] // s.chunk_tokens
        inside = complete < s.chunks
        self.keys[layer, complete[inside]] = keys.cpu()[inside]
        self.written[layer, complete[inside]] = True
        if layer in self.hidden:
            cycle, rest = (where + 1 - s.starts[0]) // s.period, (where + 1 - s.starts[0]) % s.period
            for row in torch.nonzero((rest == 0) & (cycle >= 0) & (cycle < len(s.starts))).flatten().tolist():
                self.hidden[layer][int(cycle[row])] = hidden[row].cpu()
        golden = self._golden(layer, query, chosen).cpu()
        block = torch.div(where - s.starts[0], s.period, rounding_mode="floor")
        self._count(self.last[layer], block + 1, golden)
        for before in range(s.window // s.period):
            self._count(self.upcoming[layer], block - before, golden)

    def _count(self, counted: torch.Tensor, cycle: torch.Tensor, golden: torch.Tensor) -> None:
        """One more of counted int32 [S, N] for each golden [t, K] entry that is past at its token's cycle [t]."""
        cycles, entries = counted.shape
        rows = (cycle >= 0) & (cycle < cycles)
        cycle, golden = cycle[rows].unsqueeze(1), golden[rows].long()
        known = (golden >= 0) & (golden < self.counts[cycle])
        flat = (cycle * entries + golden)[known]
        counted.view(-1).scatter_add_(0, flat, torch.ones(len(flat), dtype=torch.int32))

    def _golden(self, layer: int, query: Query | None, chosen: torch.Tensor) -> torch.Tensor:
        """chosen with -1 for those that are not golden, in another order."""
        p = self.settings.native_top_p
        if query is None or p >= 1:
            return chosen
        q, weights = query
        # Entries come in order, and those of this step are there: no token chooses one behind them.
        count = int(self.written[layer].sum())
        keys = unpack_keys(self.keys[layer, :count].to(q.device)).T
        parts = []
        step = max(1, _AT_ONCE // max(1, q.shape[1] * count))
        for begin in range(0, len(q), step):
            some = slice(begin, begin + step)
            index = chosen[some].long()
            products = (q[some].float().flatten(0, 1) @ keys).relu().unflatten(0, (-1, q.shape[1]))
            logits = torch.einsum("thn,th->tn", products, weights[some].float())
            own = logits.gather(1, index.clamp(min=0)).masked_fill(index < 0, -torch.inf)
            mass, order = own.softmax(1).sort(dim=1, descending=True)
            golden = top_share(mass, mass.new_zeros(len(mass)), p)
            parts.append(index.gather(1, order).masked_fill(~golden, -1))
        return torch.cat(parts)

    def tensors(self) -> dict[str, torch.Tensor]:
        """As `v4_capture` says. Raises LsaError if vLLM has left out a part of the window."""
        s = self.settings
        missing = [layer for layer, rows in self.hidden.items() if any(x is None for x in rows)]
        if missing or not bool(self.written.all()):
            raise LsaError(
                "capture: vLLM did not run the whole window through every c4 layer in this process: use vLLM 0.32 "
                "without pipeline or context parallelism"
            )
        found: dict[str, torch.Tensor] = {
            "query": torch.stack([torch.stack([x for x in rows if x is not None]) for rows in self.hidden.values()]),
            "keys": self.keys[list(s.candidates)],
        }
        for name, counted in (("next", self.upcoming), ("last", self.last)):
            shares = counted / counted.sum(-1, keepdim=True).clamp(min=1)
            by_layer = [sparse(x.unsqueeze(1), s.kept, s.chunks - 1, self.counts) for x in shares]
            for part in Masses._fields:
                found[f"{name}_{part}"] = torch.stack([getattr(x, part) for x in by_layer])
        return found


def native_weights(attention: Any) -> dict[str, torch.Tensor]:
    """The native indexer's wq_a [R, F], q_norm [R], wq_b [h · 128, R] and weights_proj [h, F] of a c4 layer, bf16.

    By what the layers give for unit vectors, which is exact and asks nothing of how the weights are stored: fp8 blocks,
    or packed for the CPU's products.
    """
    norm = attention.q_norm.weight

    def columns(linear: Callable[[torch.Tensor], Any], width: int) -> torch.Tensor:
        out = linear(torch.eye(width, dtype=torch.bfloat16, device=norm.device))
        return (out[0] if isinstance(out, tuple) else out).T.contiguous()

    indexer = attention.indexer
    return {
        "wq_a": columns(attention._fused_wqa_wkv_gemm, attention.hidden_size)[: len(norm)],
        "q_norm": norm.detach().bfloat16(),
        "wq_b": columns(indexer.wq_b, len(norm)),
        "weights_proj": columns(indexer.weights_proj, attention.hidden_size),
    }


def require_rope(attention: Any, shape: V4Shape) -> None:
    """Raises LsaError unless vLLM turns index keys as `shape.inverse_frequencies` say."""
    table = attention.indexer_rotary_emb.cos_sin_cache.float().cpu()
    at = torch.tensor([1, 77, 1000])
    angle = at.unsqueeze(1) * shape.inverse_frequencies()
    if not torch.allclose(table[at], torch.cat([angle.cos(), angle.sin()], 1).float(), atol=1e-3):
        raise LsaError(
            f"--model {shape.name}: its c4 layers rotate in another way than YaRN, so it cannot be trained for"
        )


class CaptureWorker:
    """What vLLM's worker can do besides. The driver calls these by name on all ranks, see `v4_capture`."""

    rank: int
    get_model: Callable[[], Any]
    _lsa_work: "Workspace | None"
    _lsa_recorder: "Recorder | None"
    _lsa_layers: int

    def lsa_capture_open(self, out: str) -> None:
        """Hook the c4 layers, and write capture/model.safetensors. Raises LsaError on a model that is not known."""
        self._lsa_work = self._lsa_recorder = None
        if self.rank:
            return
        settings = Settings.model_validate(read_settings(Path(out)))
        self._lsa_work = Workspace(Path(out), settings)
        shape = V4Shape.read(Path(settings.model))
        attentions = c4_attentions(self.get_model())
        if len(attentions) != shape.layers:
            raise LsaError(
                f"--model {settings.model}: vLLM made {len(attentions)} of its {shape.layers} c4 layers in this "
                "process: leave pipeline parallelism out of --engine"
            )
        if any(attention.indexer.use_fp4_kv for attention in attentions):
            raise LsaError(
                "capture: index keys in MXFP4 are not known here: give --engine "
                """'{"attention_config": {"indexer_kv_dtype": "fp8"}}'"""
            )
        self._lsa_layers = shape.layers
        weights: dict[str, torch.Tensor] = {"inv_freq": shape.inverse_frequencies()}
        with torch.inference_mode():
            for layer in settings.candidates:
                require_rope(attentions[layer], shape)
                found = native_weights(attentions[layer])
                weights |= {f"l{layer}.{name}": x for name, x in found.items()}
        about = json.dumps({"style": "interleaved", "dims": 64})
        write_tensors(self._lsa_work.folder("capture") / "model.safetensors", weights, {"rotary": about})
        for layer, attention in enumerate(attentions):
            self._lsa_watch(layer, attention)

    def lsa_capture_begin(self) -> None:
        """A new window begins."""
        if self._lsa_work is not None:
            self._lsa_recorder = Recorder(self._lsa_work.settings, self._lsa_layers)

    def lsa_capture_write(self, window: int) -> None:
        """Write what was noted since."""
        if self._lsa_work is not None and self._lsa_recorder is not None:
            write_tensors(self._lsa_work.shard("capture", window), self._lsa_recorder.tensors())
            self._lsa_recorder = None

    def _lsa_watch(self, layer: int, attention: Any) -> None:
        """Look at what a c4 layer is given and chooses, after its attention; nothing is changed."""
        from vllm.forward_context import get_forward_context

        stock = attention._sparse_indexer_and_attn

        def sparse_indexer_and_attn(
            hidden_states: torch.Tensor,
            index_q: torch.Tensor | None,
            index_q_scale: torch.Tensor | None,
            index_weights: torch.Tensor | None,
            q: torch.Tensor,
            kv: torch.Tensor,
            positions: torch.Tensor,
            out: Any,
        ) -> None:
            stock(hidden_states, index_q, index_q_scale, index_weights, q, kv, positions, out)
            metadata = get_forward_context().attn_metadata
            if self._lsa_recorder is None or not isinstance(metadata, Mapping):
                return
            cache = attention.indexer.k_cache
            about = metadata[cache.prefix]
            rows = slice(about.num_decode_tokens + about.num_prefill_tokens)
            query = None if index_q is None or index_weights is None else (index_q[rows], index_weights[rows])
            where = positions[rows]
            slots = about.slot_mapping[rows][(where + 1) % C4_TOKENS == 0]
            if bool((slots < 0).any()):
                raise LsaError(
                    "capture: index keys are shared out over ranks: leave context parallelism out of --engine"
                )
            chosen = attention.topk_indices_buffer[rows]
            self._lsa_recorder.note(layer, where, hidden_states[rows], query, chosen, keys_at(cache.kv_cache, slots))

        attention._sparse_indexer_and_attn = sparse_indexer_and_attn


def c4_attentions(model: Any) -> list[Any]:
    """The attention modules of vLLM's DeepSeek-V4 that have an indexer, in the model's order."""
    found = [
        m for m in model.modules() if getattr(m, "indexer", None) is not None and hasattr(m, "topk_indices_buffer")
    ]
    return sorted(found, key=lambda attention: layer_of(attention.prefix))


def keys_at(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Packed keys uint8 [m, 132] at slots int64 [m] of an index-key cache (see `index_pages`)."""
    pages, place = (slots // PAGE_ENTRIES).unique(return_inverse=True)
    return keys_of_pages(index_pages(cache)[pages])[place * PAGE_ENTRIES + slots % PAGE_ENTRIES]
