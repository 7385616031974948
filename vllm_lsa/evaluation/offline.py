"""Sparse decoding offline: blocks of decode steps over a dense past, in one forward pass for many blocks.

The past's keys and values come from the dense model and only the block's own queries are restricted, so that blocks are
independent of each other. Works for any Hugging Face model whose attention is a plain softmax over all keys.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface

from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.indexes import Exact, KeyIndex, Product
from vllm_lsa.evaluation.rule import LookaheadInput, SelectionRule, demand_sets, start_set
from vllm_lsa.indexer import MemoryIndexer
from vllm_lsa.indexer.rotary import rotate

PAD = 64  # K and V of a past are padded to a multiple of this many tokens; chunk sizes divide it
_PREFILL_TOKENS = 1 << 16  # tokens of several prompts that are prefilled at once
_ATTENTION = "lsa_offline"
_NOT_PLAIN = ("sliding_window", "softcap", "s_aux", "position_bias")  # what plain softmax attention has not

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    for name in _NOT_PLAIN:
        if kwargs.get(name) is not None:
            raise LsaError(f"eval: this model's attention has {name}, which LSA does not support")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = module.lsa_owner.attend(module.layer_idx, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)


class Past:
    """What the dense model leaves of P prompts of one length.

    Attributes
    ----------
    length
        Tokens of each prompt.
    keys, values
        Per layer [P, Hkv, n, D], RoPE applied, n = length padded with zeros to a multiple of PAD.
    queries
        Per layer [P, Hq, length - queries_from, D], RoPE applied.
    hidden
        Per layer [P, length - queries_from, hidden size], the attention module's input; empty unless asked for.
    queries_from
        Position of the first query that was kept.
    """

    def __init__(self, queries_from: int) -> None:
        self.length = 0
        self.queries_from = queries_from
        self.scale = 1.0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.queries: list[torch.Tensor] = []
        self.hidden: list[torch.Tensor] = []
        self._made: dict[Hashable, Any] = {}

    @property
    def prompts(self) -> int:
        return self.keys[0].shape[0]

    def made(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`make()`, or what it returned when it was last asked for under this key: rules share what they can."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def forget(self) -> None:
        """Free what `made` keeps."""
        self._made.clear()

    def prepared(self, index: KeyIndex, layer: int, chunk_tokens: int) -> torch.Tensor:
        """What an index makes of a layer's keys."""
        key = (index, layer, chunk_tokens)
        return self.made(key, lambda: index.prepare(layer, self.keys[layer].float(), chunk_tokens))

    def before(self, layer: int, starts: torch.Tensor, tokens: int) -> torch.Tensor:
        """Queries of the `tokens` tokens before each block, fp32 [P, Hkv, r, g, tokens, D]; starts: [P, r]."""
        first = starts - tokens - self.queries_from
        queries, kv_heads = self.queries[layer], self.keys[layer].shape[1]
        index = (first.unsqueeze(-1) + torch.arange(tokens, device=first.device)).flatten(1)  # [P, r * tokens]
        taken = queries.gather(2, index[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))
        grouped = taken.float().unflatten(2, (-1, tokens)).unflatten(1, (kv_heads, -1))
        return grouped.transpose(2, 3)


class SparseModel:
    """A Hugging Face causal LM whose attention is ours: dense for a prefill, restricted by a rule for blocks.

    Raises LsaError if the folder holds no causal LM, or the model's attention is no plain softmax.
    """

    def __init__(self, model_path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.path = Path(model_path)
        self.device = torch.device(device)
        if not (self.path / "config.json").is_file():
            raise LsaError(f"{self.path} holds no config.json: give the folder of a Hugging Face model")
        try:
            config = AutoConfig.from_pretrained(self.path)
            self.model = AutoModelForCausalLM.from_pretrained(
                self.path, dtype=dtype, attn_implementation=_ATTENTION, config=config
            )
        except (OSError, ValueError, KeyError) as error:
            raise LsaError(
                f"{self.path} cannot be loaded as a causal LM: {str(error).strip().splitlines()[0]}"
            ) from None
        self.model.to(self.device).eval().requires_grad_(False)
        self._attend: Attend = self._prefill_attention
        self._past = Past(0)
        self._keep_hidden = False
        modules = {m.layer_idx: m for m in self.model.modules() if "Attention" in type(m).__name__ and _has_layer(m)}
        if sorted(modules) != list(range(self.layers)):
            raise LsaError(f"{self.path}: its attention layers are not of a kind that can be replaced")
        for module in modules.values():
            module.lsa_owner = self
            module.register_forward_pre_hook(self._see_hidden, with_kwargs=True)

    @property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def kv_heads(self) -> int:
        config = self.model.config
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        config = self.model.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The attention of the pass that is under way: [B, Hq, T, D] of query [B, Hq, T, D], key and value."""
        return self._attend(layer, query, key, value, scale)

    @contextmanager
    def _attending(self, attend: Attend) -> Iterator[None]:
        previous, self._attend = self._attend, attend
        try:
            yield
        finally:
            self._attend = previous

    # Prefill

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor, queries_from: int = 0, hidden: bool = False) -> Past:
        """Run the dense model over prompts: tokens [T] or [P, T].

        queries_from: position of the first query to keep; blocks may start `period` tokens after it. hidden: keep the
        inputs of the attention modules from there on, too.
        """
        tokens = tokens.view(-1, tokens.shape[-1])
        past = Past(queries_from)
        past.length = tokens.shape[1]
        self._past, self._keep_hidden = past, hidden
        parts: list[Past] = []
        with self._attending(self._prefill_attention):
            for rows in tokens.split(max(1, _PREFILL_TOKENS // past.length)):
                self._past = Past(queries_from)
                positions = torch.arange(past.length, device=self.device).expand(rows.shape)
                self.model.base_model(input_ids=rows.to(self.device), position_ids=positions, use_cache=False)
                parts.append(self._past)
        self._keep_hidden = False
        past.scale = parts[0].scale
        for layer in range(self.layers):
            for name in ("keys", "values", "queries", *(["hidden"] if hidden else [])):
                pieces = [getattr(part, name)[layer] for part in parts]
                getattr(past, name).append(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
                for part in parts:
                    getattr(part, name)[layer] = None  # memory of the pieces goes as the whole is made
        self._past = Past(0)
        return past

    def _prefill_attention(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        past = self._past
        padding = (0, 0, 0, -k.shape[2] % PAD)
        past.scale = scale
        past.keys.append(F.pad(k, padding) if padding[3] else k)
        past.values.append(F.pad(v, padding) if padding[3] else v)
        past.queries.append(q[:, :, past.queries_from :].clone() if past.queries_from else q)
        group = q.shape[1] // k.shape[1]
        # Repeated, since the kernels that do not hold all scores take no grouped heads in fp32.
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    def _see_hidden(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._keep_hidden:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self._past.hidden.append(hidden[:, self._past.queries_from :].clone())

    # Blocks

    @torch.no_grad()
    def decode_blocks(
        self,
        past: Past,
        tokens: torch.Tensor,
        starts: torch.Tensor,
        rule: SelectionRule | None,
        sparse_layers: Iterable[int] | None = None,
        traffic: "Traffic | None" = None,
    ) -> torch.Tensor:
        """Logits fp32 [B, W, vocabulary] of blocks that decode over the past by a rule.

        Parameters
        ----------
        past
            Of P prompts; block b belongs to prompt b // (B / P).
        tokens
            [B, W], the blocks' tokens; W at most rule.period, the first ones at `starts`.
        starts
            int64 [B] or [P, B / P] on the CPU: tokens of the past that each block sees.
        rule
            None for dense attention.
        sparse_layers
            Layers that follow the rule; the others are dense. Default: all.
        traffic
            Counts what is demanded.

        Raises
        ------
        LsaError
            A block starts before its first chunk, or before the past kept queries that the lookahead asks for.
        """
        prompts, width = past.prompts, tokens.shape[-1]
        tokens, starts = tokens.view(prompts, -1, width), starts.view(prompts, -1).cpu()
        if rule is not None:
            first = max(rule.chunk_tokens, past.queries_from + rule.period)
            if width > rule.period or PAD % rule.chunk_tokens:
                raise LsaError(f"eval: blocks of {width} tokens, chunks of {rule.chunk_tokens}: use divisors of {PAD}")
            if int(starts.min()) < first or int(starts.max()) > past.length:
                raise LsaError(f"eval: blocks may start from {first} to {past.length} here, not at {starts.tolist()}")
        layers = frozenset(range(self.layers) if sparse_layers is None else sparse_layers)
        rows = self._rows_at_once(past, width)
        logits = []
        for some, at in zip(tokens.split(rows, 1), starts.split(rows, 1), strict=True):
            block = _Block(past, at, width, rule, layers, self.device, traffic)
            positions = (at.flatten().unsqueeze(1) + torch.arange(width)).to(self.device)
            with self._attending(block.attend):
                out = self.model(
                    input_ids=some.flatten(0, 1).to(self.device), position_ids=positions, use_cache=False
                ).logits.float()
            logits.append(out.unflatten(0, (prompts, -1)))
        return torch.cat(logits, 1).flatten(0, 1) if len(logits) > 1 else logits[0].flatten(0, 1)

    def _rows_at_once(self, past: Past, width: int) -> int:
        """Blocks of each prompt in a pass: their scores, and some copies of them, must fit."""
        heads = past.queries[0].shape[1]
        values = past.prompts * heads * width * past.keys[0].shape[2]
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return max(1, int((free + cached) * 0.6) // (values * 4 * 5))
        return max(1, (1 << 26) // values)

    @torch.no_grad()
    def recall(
        self, past: Past, starts: torch.Tensor, rules: Mapping[str, SelectionRule]
    ) -> dict[str, dict[str, list[float]]]:
        """How much of what a block attends to is in the set that it starts from, for each rule, by layer.

        past: of one prompt, with its queries up to the blocks' ends. starts: int64 [B] on the CPU. The oracle is the
        set of the same size with the most true mass. Every figure is of chunks that are not forced:
        mass, oracle: share of the next period's attention mass on them that is in the set, in the oracle's set.
        chunks: share of the oracle's chunks that are in the set. at_stake: their share of all mass.
        """
        found: dict[str, dict[str, list[float]]] = {}
        exact = Exact()
        for name, rule in rules.items():
            sums = torch.zeros(5, self.layers, device=self.device)
            rows = self._rows_at_once(past, rule.period)
            for at in starts.view(1, -1).split(rows, 1):
                block = _Block(past, at, rule.period, rule, frozenset(range(self.layers)), self.device, None)
                for layer in range(self.layers):
                    sums[:, layer] += block.recall(layer, exact)
            caught, best, stake, same, size = sums.cpu()
            found[name] = {
                "mass": (caught / stake).tolist(),
                "oracle": (best / stake).tolist(),
                "chunks": (same / size).tolist(),
                "at_stake": (stake / (starts.numel() * (self.kv_heads if rule.sets == "per_head" else 1))).tolist(),
            }
        return found

    def damage(
        self,
        windows: Iterable[torch.Tensor],
        rule: SelectionRule,
        layers: Sequence[int] | None = None,
        every: int = 2,
        progress: Callable[[int], None] | None = None,
    ) -> list[float]:
        """KL(dense || sparse), nats per token, of the model with one layer sparse and the others dense, for each layer.

        windows: tokens [T] of documents; the second half of each is decoded in blocks of rule.period, every `every`th
        of them. layers: default all. progress: called with the layer's place in `layers` after each.
        """
        layers = range(self.layers) if layers is None else layers
        total, windows = [0.0] * len(layers), list(windows)
        for tokens in windows:
            half = len(tokens) // 2 // rule.period * rule.period
            starts = torch.arange(half, len(tokens) - rule.period + 1, every * rule.period)
            blocks = tokens.cpu().unfold(0, rule.period, 1)[starts]
            past = self.prefill(tokens, half - rule.period, hidden=needs_hidden(rule))
            dense = self.decode_blocks(past, blocks, starts, None)
            for i, layer in enumerate(layers):
                sparse = self.decode_blocks(past, blocks, starts, rule, sparse_layers=[layer])
                total[i] += float(kl(dense, sparse).mean()) / len(windows)
                if progress is not None:
                    progress(i)
        return total


def _has_layer(module: Any) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int)


def needs_hidden(rule: SelectionRule) -> bool:
    """Whether the rule's lookahead reads the inputs of attention modules."""
    return isinstance(rule.lookahead, MemoryIndexer) and rule.lookahead.config.input == "hidden"


def kl(dense: torch.Tensor, sparse: torch.Tensor, rows: int = 8) -> torch.Tensor:
    """KL(dense || sparse) of logits [B, W, V] in nats, fp32 [B, W]; so many rows at a time."""
    parts = []
    for a, b in zip(dense.split(rows), sparse.split(rows), strict=True):
        a, b = a.log_softmax(-1), b.log_softmax(-1)
        parts.append((a.exp() * (a - b)).sum(-1))
    return torch.cat(parts)


class Traffic:
    """Chunks that lanes asked for, over all steps of all blocks: per layer a lane's mean per step."""

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}
        self._steps: dict[int, int] = {}

    def add(self, layer: int, picked: torch.Tensor) -> None:
        """picked: chunks of each step and lane."""
        self._sums[layer] = self._sums.get(layer, 0) + picked.sum()
        self._steps[layer] = self._steps.get(layer, 0) + picked.numel()

    def per_step(self) -> list[float]:
        """Chunks of a lane per step, one for each layer that was sparse."""
        return [float(self._sums[layer]) / self._steps[layer] for layer in sorted(self._sums)]


class _Steps:
    """What each step of blocks that demand may choose from: chunks of the past, then those that a block writes.

    Masks are bool [P, r, W, C]: prompts, blocks, steps, chunks by their place in the text.
    """

    def __init__(self, rule: SelectionRule, starts: torch.Tensor, width: int, past_tokens: int) -> None:
        """starts: [P, r]. past_tokens: of the past that is looked at, in whole chunks."""
        chunk, device = rule.chunk_tokens, starts.device
        self.rule, self.width, self.starts = rule, width, starts
        self.first = (starts // chunk).unsqueeze(-1)  # the chunk that the block's first token is in
        self.more = width // chunk + 1
        self.at = starts.unsqueeze(-1) + torch.arange(width, device=device)  # [P, r, W], positions
        place = torch.arange(past_tokens // chunk + self.more, device=device)
        tail = (self.at // chunk).unsqueeze(-1)
        self.valid = place < tail
        recent = place >= tail - rule.recency_tokens // chunk
        forced = self.valid & ((place < rule.sink_tokens // chunk) | recent)
        self.eligible = self.valid & ~forced
        self.fixed = forced | (place == tail)

    def room(self, cpu_starts: torch.Tensor, layer: int) -> torch.Tensor:
        """Chunks that may be chosen at each step, int64 [W, P, r]."""
        at = cpu_starts + torch.arange(self.width).view(-1, 1, 1)
        return self.rule.rooms(at, layer).room.to(self.starts.device, non_blocking=True)

    def own_logits(
        self,
        index: KeyIndex,
        layer: int,
        past_keys: torch.Tensor,
        own_keys: torch.Tensor,
        q6: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Logits [P, Hkv, r, g, W, more] of the chunks from `first` on, of the block's keys [P, Hkv, r, W, D], and of
        the past's [P, Hkv, n, D] where a block begins within a chunk."""
        chunk, kv_heads, dim = self.rule.chunk_tokens, own_keys.shape[1], own_keys.shape[-1]
        place = self.first * chunk + torch.arange(self.more * chunk, device=own_keys.device)  # [P, r, more * c]
        start = self.starts.unsqueeze(-1)

        def taken(index: torch.Tensor) -> torch.Tensor:
            return index[:, None, ..., None].expand(-1, kv_heads, -1, -1, dim)

        before = taken(place.clamp(max=past_keys.shape[2] - 1)).flatten(2, 3)
        old = past_keys.gather(2, before).float().unflatten(2, place.shape[1:])
        new = own_keys.gather(3, taken((place - start).clamp(0, self.width - 1)))
        keys = torch.where((place < start)[:, None, ..., None], old, new)
        by_block = keys.transpose(1, 2).flatten(0, 1)  # [B, Hkv, more * c, D]
        queries = q6.transpose(1, 2).flatten(0, 1).flatten(2, 3)  # [B, Hkv, g * W, D]
        logits = index.chunk_logits(index.prepare(layer, by_block, chunk), queries, scale, chunk)
        return logits.unflatten(0, q6.shape[:1] + q6.shape[2:3]).transpose(1, 2).unflatten(3, q6.shape[3:5])

    def with_own(self, logits: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Logits of all chunks, [.., C]: of the past [.., N], with the block's [.., more] from `first` on."""
        at = self.first + torch.arange(self.more, device=logits.device)  # [P, r, more]
        return F.pad(logits, (0, self.more)).scatter_(-1, at[:, None, :, None, None].expand_as(own), own)

    def of_own_tokens(self, keep: torch.Tensor) -> torch.Tensor:
        """Whether each step reads each of the block's tokens, bool [P, hs, r, W, W]. keep: chunks, [P, hs, r, W, C]."""
        chunk = (self.at // self.rule.chunk_tokens)[:, None, :, None]
        return keep.gather(-1, chunk.expand(*keep.shape[:-1], -1))


class _Block:
    """One forward pass of some blocks. Inside, tensors are [P, Hkv, r, g, W, ·]: prompts, KV heads, blocks of a prompt,
    query heads of a KV head, steps; that is the order in which products with a past's keys come out."""

    def __init__(
        self,
        past: Past,
        starts: torch.Tensor,
        width: int,
        rule: SelectionRule | None,
        sparse_layers: frozenset[int],
        device: torch.device,
        traffic: Traffic | None,
    ) -> None:
        self.past, self.width, self.rule, self.traffic = past, width, rule, traffic
        self.sparse_layers = sparse_layers if rule is not None and rule.budget < 1 else frozenset()
        self.cpu_starts = starts
        self.starts = starts.to(device)
        self.causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        self.n = -(-int(starts.max()) // PAD) * PAD
        self.aligned = not bool((starts % PAD).any())
        self.ragged = bool((starts != self.n).any())
        self.before_start = torch.arange(self.n, device=device) < self.starts.unsqueeze(-1)  # [P, r, n]
        self.shared: torch.Tensor | None = None
        if self.sparse_layers:
            assert rule is not None
            self.chunk = rule.chunk_tokens
            self.aligned = not bool((starts % self.chunk).any())
            rooms = rule.rooms(starts, 0)
            place = torch.arange(self.n // self.chunk, device=device)
            full, sink, recency = (x.to(device).unsqueeze(-1) for x in (rooms.full, rooms.sink, rooms.recency))
            self.valid = place < full  # [P, r, N]
            self.forced = self.valid & ((place < sink) | (place >= full - recency))
            self.eligible = (self.valid & ~self.forced).unsqueeze(1)  # [P, 1, r, N]
            # A chunk that the block begins within is resident as one of its own, up to the block.
            within = (self.starts % self.chunk != 0).unsqueeze(-1)
            self.begun = self.valid | ((place == full) & within)
            self.fixed = self.forced | (self.begun & ~self.valid)
            self.steps = _Steps(rule, self.starts, width, self.n) if rule.demand is not None else None

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """[B, Hq, W, D] of the blocks' queries [B, Hq, W, D], keys and values [B, Hkv, W, D]."""
        past, dtype = self.past, q.dtype
        keys, values = past.keys[layer][:, :, : self.n].float(), past.values[layer][:, :, : self.n].float()
        prompts, kv_heads = keys.shape[:2]
        shape = (prompts, kv_heads, self.starts.shape[1], q.shape[1] // kv_heads, self.width)

        def inner(x: torch.Tensor) -> torch.Tensor:  # [B, H, W, D] -> [P, Hkv, r, g, W, D]
            return x.float().unflatten(0, (prompts, -1)).unflatten(2, (kv_heads, -1)).transpose(1, 2)

        q6, own_keys, own_values = inner(q), inner(k).flatten(3, 4), inner(v).flatten(3, 4)
        scaled = (q6 * scale).contiguous()
        scores = (scaled.flatten(2, 4) @ keys.mT).view(*shape, self.n)
        own = (scaled.flatten(3, 4) @ own_keys.mT).view(*shape, self.width).masked_fill_(~self.causal, -torch.inf)
        if layer in self.sparse_layers:
            keep = self._sets(layer, q6, scores, own_keys, scale)  # [P, hs, r, W, N or more]
            past_keep = keep[..., : self.n // self.chunk]
            if self.steps is not None:  # its later chunks are the block's own
                past_keep = past_keep & self.begun[:, None, :, None]
            scores.unflatten(-1, (-1, self.chunk)).masked_fill_(~past_keep[:, :, :, None, ..., None], -torch.inf)
            if self.steps is not None:
                own.masked_fill_(~self.steps.of_own_tokens(keep)[:, :, :, None], -torch.inf)
            if not self.aligned:
                scores.masked_fill_(~self.before_start[:, None, :, None, None], -torch.inf)
        elif self.ragged:
            scores.masked_fill_(~self.before_start[:, None, :, None, None], -torch.inf)
        top = torch.maximum(scores.amax(-1, keepdim=True), own.amax(-1, keepdim=True))
        scores.sub_(top).exp_()
        own.sub_(top).exp_()
        total = scores.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)
        out = (scores.flatten(2, 4) @ values).view(*shape, -1)
        out += (own.flatten(3, 4) @ own_values).view_as(out)
        return (out / total).transpose(1, 2).flatten(2, 3).flatten(0, 1).to(dtype)

    def _sets(
        self, layer: int, q6: torch.Tensor, scores: torch.Tensor, own_keys: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Chunks that each step of each lane reads, bool [P, 1 or Hkv, r, W, N]; with demand those that the block
        writes follow. scores: of the past's true keys. own_keys: of the block, [P, Hkv, r, W, D]."""
        rule, steps = self.rule, self.steps
        assert rule is not None
        room = rule.rooms(self.cpu_starts, layer).room
        most = 0 if rule.lookahead == "none" else int(room.max())
        scored = self._shared(scale) if rule.sets == "shared" else self._expected(layer, scores, scale)
        member = start_set(scored, self.eligible, room.to(self.starts.device, non_blocking=True), most)
        if steps is None:
            if self.traffic is not None:
                self.traffic.add(layer, room.new_zeros(self.width))
            return (member > 0).logical_or_(self.fixed.unsqueeze(1)).unsqueeze(3).expand(-1, -1, -1, self.width, -1)
        assert rule.demand is not None
        if isinstance(rule.demand, Exact):
            logits = scores.unflatten(-1, (-1, self.chunk)).logsumexp(-1)
        else:
            prepared = self._prepared(rule.demand, layer)
            logits = rule.demand.chunk_logits(prepared, q6.flatten(2, 4), scale, self.chunk).view(*q6.shape[:-1], -1)
        written = steps.own_logits(rule.demand, layer, self.past.keys[layer], own_keys, q6, scale)
        logits = steps.with_own(logits, written).masked_fill_(~steps.valid[:, None, :, None], -torch.inf)
        mass = self._lanes(logits.softmax(-1).mean(3)).movedim(3, 0).contiguous()  # [W, P, hs, r, N + more]
        usage = self._lanes(self._usage(layer, scale)) if rule.carry_usage else scored
        lanes, more = mass.shape[1:-1], (0, mass.shape[-1] - member.shape[-1])
        keep, picked = demand_sets(
            mass,
            steps.eligible.movedim(2, 0).unsqueeze(2),
            F.pad(member.expand(*lanes, -1), more).contiguous(),
            F.pad(usage.expand(*lanes, -1), more).contiguous(),
            steps.room(self.cpu_starts, layer).unsqueeze(2).expand(mass.shape[:-1]),
            chunks=rule.demand_chunks,
            threshold=rule.demand_threshold,
            decay=rule.decay,
        )
        if self.traffic is not None:
            self.traffic.add(layer, picked)
        return keep.movedim(0, 3).logical_or_(steps.fixed.unsqueeze(1))

    def _prepared(self, index: KeyIndex, layer: int) -> torch.Tensor:
        whole = self.past.prepared(index, layer, self.chunk)
        per_token = whole.shape[2] == self.past.keys[layer].shape[2]
        return whole[:, :, : self.n if per_token else self.n // self.chunk]

    def _share(self, logits: torch.Tensor) -> torch.Tensor:
        """Shares of attention mass over full chunks, [P, Hkv, r, W, N], mean over a KV head's query heads."""
        return logits.masked_fill(~self.valid[:, None, :, None, None], -torch.inf).softmax(-1).mean(3)

    def _lanes(self, shares: torch.Tensor) -> torch.Tensor:
        """Shares per KV head as shares per lane."""
        assert self.rule is not None
        return shares if self.rule.sets == "per_head" else shares.mean(1, keepdim=True)

    def _cached(self, name: Hashable, layer: int, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`make()`, which depends on the past and these blocks alone: rules of other budgets share it."""
        key = (name, layer, self.chunk, self.width, tuple(self.cpu_starts.flatten().tolist()))
        return self.past.made(key, make)

    def _before(self, layer: int, index: KeyIndex, tokens: int, scale: float) -> torch.Tensor:
        """Logits [P, Hkv, r, g, tokens, N] that an index gives to queries before the blocks."""
        queries = self.past.before(layer, self.starts, tokens)
        prepared = self._prepared(index, layer)
        return index.chunk_logits(prepared, queries.flatten(2, 4), scale, self.chunk).view(*queries.shape[:-1], -1)

    def _usage(self, layer: int, scale: float, mean: bool = False) -> torch.Tensor:
        """Usage after the last period by the demand index, or by the lookahead's own, [P, Hkv, r, N]."""
        assert self.rule is not None
        index, period = self.rule.demand or self.rule.lookahead_index or Exact(), self.rule.period
        decay = 1.0 if mean else self.rule.decay

        def make() -> torch.Tensor:
            shares = self._share(self._before(layer, index, period, scale))  # [P, Hkv, r, period, N]
            if decay == 1:
                return shares.mean(3)
            ages = torch.arange(period - 1, -1, -1, device=shares.device)
            return (shares * (decay ** ages.float()).unsqueeze(-1)).amax(3)

        return self._cached(("usage", index, period, decay), layer, make)

    def _expected(self, layer: int, scores: torch.Tensor | None, scale: float) -> torch.Tensor:
        """What the lookahead expects of each chunk in the block, [P, 1 or Hkv, r, N]; scores: for the oracle."""
        rule, prompts = self.rule, self.past.prompts
        assert rule is not None
        lookahead = rule.lookahead
        blocks, n = self.valid.shape[1:]
        place = torch.arange(n, device=self.valid.device)
        if lookahead in ("newest", "none"):
            return (place * 1e-9).expand(prompts, 1, blocks, n)
        if lookahead == "random":
            return self._random(layer, place) * 1e-9
        if lookahead in ("usage", "usage_mean"):
            return self._lanes(self._usage(layer, scale, mean=lookahead == "usage_mean"))
        if lookahead == "oracle":
            assert scores is not None
            shares = self._share(scores.unflatten(-1, (-1, self.chunk)).logsumexp(-1))
            return self._lanes(shares.mean(3))
        if isinstance(lookahead, str):
            index = rule.lookahead_index
            assert index is not None

            def make() -> torch.Tensor:
                logits = self._before(layer, index, 1, scale).squeeze(4)
                # As the engine's policies do: the maximum over the heads of a lane.
                shares = logits.masked_fill(~self.valid[:, None, :, None], -torch.inf).softmax(-1).amax(3)
                return shares if rule.sets == "per_head" else shares.amax(1, keepdim=True)

            return self._cached((lookahead, rule.sets == "per_head"), layer, make)
        if isinstance(lookahead, MemoryIndexer):
            if layer in lookahead.layers:
                return self._cached(
                    (lookahead, rule.lookahead_index, rule.demand, rule.sets),
                    layer,
                    lambda: self._trained(layer, lookahead, scale),
                )
            # A layer that training left out has nothing better than what was used.
            return self._lanes(self._usage(layer, scale)) if rule.demand else (place * 1e-9).expand_as(self.eligible)
        hidden = self._hidden(layer) if self.past.hidden else None
        queries = self.past.before(layer, self.starts, rule.period)
        usage = self._usage(layer, scale)
        given = LookaheadInput(layer, queries, hidden, self.starts, usage, self._mean_keys(layer), self.valid)
        return lookahead(given)

    def recall(self, layer: int, exact: Exact) -> torch.Tensor:
        """Sums over lanes for `SparseModel.recall`: mass caught, the oracle's, at stake; chunks in common, chosen."""
        rule = self.rule
        assert rule is not None
        if not self.sparse_layers:
            raise LsaError("eval: recall is of budgets below 1")
        scale, period = self.past.scale, rule.period

        def make() -> torch.Tensor:
            queries = self.past.before(layer, self.starts + period, period)
            logits = exact.chunk_logits(self._prepared(exact, layer), queries.flatten(2, 4), scale, self.chunk)
            return self._share(logits.view(*queries.shape[:-1], -1)).mean(3)

        true = self._lanes(self._cached(("next", period), layer, make)).masked_fill(~self.eligible, 0)
        rooms = rule.rooms(self.cpu_starts, layer)
        room, most = rooms.room.to(self.starts.device), int(rooms.room.max())
        expected = self._shared(scale) if rule.sets == "shared" else self._expected(layer, None, scale)
        chosen = start_set(expected.expand_as(true), self.eligible, room, most)
        best = start_set(true, self.eligible, room, most)
        sums = [(true * chosen).sum(), (true * best).sum(), true.sum(), (chosen * best).sum(), best.sum()]
        return torch.stack(sums)

    def _hidden(self, layer: int) -> torch.Tensor:
        """Input of the attention module at the token before each block, [P, r, hidden size]."""
        at = (self.starts - 1 - self.past.queries_from).unsqueeze(-1)
        return self.past.hidden[layer].gather(1, at.expand(-1, -1, self.past.hidden[layer].shape[-1]))

    def _mean_keys(self, layer: int) -> torch.Tensor:
        """[P, Hkv, N, D], of the true keys, or of those that a trained lookahead's index knows."""
        rule = self.rule
        assert rule is not None
        index = rule.lookahead_index
        if isinstance(rule.lookahead, MemoryIndexer) and isinstance(index, Product):
            keys = self._prepared(index, layer)
        else:
            keys = self.past.keys[layer][:, :, : self.n].float()
        return keys.unflatten(2, (-1, self.chunk)).mean(3)

    def _trained(self, layer: int, indexer: MemoryIndexer, scale: float) -> torch.Tensor:
        """Shares that a trained scorer expects, [P, 1 or Hkv, r, N]; of the shared form its logits."""
        assert self.rule is not None
        config, scorer = indexer.config, indexer.layer(layer)
        per_head = self.rule.sets == "per_head" or config.usage
        keys = self._mean_keys(layer).transpose(1, 2)  # [P, N, Hkv, D]
        usage = self._usage(layer, scale).transpose(1, 2) if config.usage else None  # [P, r, Hkv, N]
        out = []
        for prompt, starts in enumerate(self.starts):
            last = starts - 1
            if config.input == "hidden":
                x = self._hidden(layer)[prompt]
            else:
                queries = self.past.queries[layer][prompt, :, last - self.past.queries_from].transpose(0, 1)
                x = rotate(queries.float() / config.attention_scaling, last, scorer.inv_freq, config.rope, inverse=True)
                x = x.flatten(1)
            middle = starts + self.rule.period // 2  # where the queries of the block are on average
            if per_head:
                used = None if usage is None else usage[prompt]
                counts = None if usage is None else starts // self.chunk
                logits = scorer.head_logits(x, keys[prompt], middle, used, counts).transpose(0, 1)
            else:
                of_heads = keys[prompt] if config.kv_heads > 1 else keys[prompt].mean(1)
                logits = indexer.logits(layer, x, of_heads, middle).unsqueeze(0)
            logits = logits.masked_fill(~self.valid[prompt], -torch.inf)
            out.append(logits if config.kind == "shared" else logits.softmax(-1))
        return self._lanes(torch.stack(out)) if per_head else torch.stack(out)

    def _random(self, layer: int, place: torch.Tensor) -> torch.Tensor:
        """Uniform in [0, 1), the same for a start, layer, KV head and chunk however blocks are batched."""
        assert self.rule is not None
        heads = self.past.keys[0].shape[1] if self.rule.sets == "per_head" else 1
        head = torch.arange(heads, device=place.device).view(1, -1, 1, 1)
        x = self.starts[:, None, :, None] * 1000003 + layer * 7919 + head * 104729 + place * 15485863
        for factor in (0x45D9F3B, 0x119DE1F3):
            x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
        return ((x ^ (x >> 16)) & 0xFFFFFF).float() / (1 << 24)

    def _shared(self, scale: float) -> torch.Tensor:
        """What all layers start from together: the lookahead's expectations of the layers, combined."""
        rule = self.rule
        assert rule is not None
        if self.shared is None:
            layers: Sequence[int] = range(len(self.past.keys))
            mode = "or"
            if isinstance(rule.lookahead, MemoryIndexer):
                layers, mode = rule.lookahead.layers, rule.lookahead.config.ensemble
                if rule.lookahead.config.kind == "shared":
                    logits = {layer: self._expected(layer, None, scale) for layer in layers}
                    self.shared = rule.lookahead.ensemble(logits)
                    return self.shared
            votes = torch.stack([self._expected(layer, None, scale) for layer in layers])
            self.shared = votes.amax(0) if mode == "or" else votes.mean(0)
        return self.shared
