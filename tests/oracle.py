"""An independent forward pass of a Llama-style model in plain PyTorch, restricted to given resident sets.

Nothing here comes from vllm_lsa: weights from the HF folder, RoPE, RMSNorm and attention written out.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

Cache = list[tuple[torch.Tensor, torch.Tensor]]


class Oracle:
    """Dense prefill of a prompt, then any number of decode passes whose tokens see only the chunks of their sets."""

    def __init__(self, folder: Path, chunk_tokens: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        self.config, self.chunk = model.config, chunk_tokens
        # In float64, so that the difference that is measured is the rounding of the engine alone.
        self.weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
        self.dim = self.config.hidden_size // self.config.num_attention_heads
        theta = self.config.rope_parameters["rope_theta"]
        self.frequency = 1.0 / theta ** (torch.arange(0, self.dim, 2).float() / self.dim)

    def prefill(self, tokens: list[int], past: Cache) -> Cache:
        """K and V [t, Hkv, D] of every layer for tokens that attend to everything: those of `past`, then `tokens`."""
        cache: Cache = []
        self._forward(tokens, past, cache, None)
        return cache

    def decode(self, cache: Cache, tokens: list[int], sets: list[list[set[int]]]) -> torch.Tensor:
        """Logits [n, vocabulary] of n tokens that follow the cache.

        sets[i]: the chunks that token i attends to in each layer, or in each KV head of each layer.
        """
        return self._forward(tokens, cache, [], sets)

    def _forward(self, tokens, past, kept, sets) -> torch.Tensor:
        w, c = self.weights, self.config
        start = past[0][0].shape[0] if past else 0
        positions = torch.arange(start, start + len(tokens))
        x = F.embedding(torch.tensor(tokens), w["model.embed_tokens.weight"])
        for layer in range(c.num_hidden_layers):
            p = f"model.layers.{layer}."
            h = self._norm(x, w[p + "input_layernorm.weight"])
            q = self._rope((h @ w[p + "self_attn.q_proj.weight"].T).view(len(tokens), -1, self.dim), positions)
            k = self._rope((h @ w[p + "self_attn.k_proj.weight"].T).view(len(tokens), -1, self.dim), positions)
            v = (h @ w[p + "self_attn.v_proj.weight"].T).view(len(tokens), -1, self.dim)
            if past:
                k, v = torch.cat([past[layer][0], k]), torch.cat([past[layer][1], v])
            kept.append((k, v))
            mask = None
            if past:
                mask = torch.arange(len(k))[None] <= positions[:, None]
            if sets is not None:
                mask = self._restrict(mask, sets, layer)
            x = x + self._attend(q, k, v, mask) @ w[p + "self_attn.o_proj.weight"].T
            h = self._norm(x, w[p + "post_attention_layernorm.weight"])
            gate = F.silu(h @ w[p + "mlp.gate_proj.weight"].T) * (h @ w[p + "mlp.up_proj.weight"].T)
            x = x + gate @ w[p + "mlp.down_proj.weight"].T
        if sets is None:
            return x
        return self._norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T

    def _restrict(self, causal: torch.Tensor, sets: list[list[set[int]]], layer: int) -> torch.Tensor:
        """bool [n, t] or, with sets of KV heads, [Hq, n, t]."""
        heads = len(sets[0]) // self.config.num_hidden_layers
        keep = torch.zeros(heads, len(sets), -(-causal.shape[1] // self.chunk), dtype=torch.bool)
        for i, lanes in enumerate(sets):
            for head in range(heads):
                keep[head, i, sorted(lanes[layer * heads + head])] = True
        allowed = causal & keep.repeat_interleave(self.chunk, 2)[:, :, : causal.shape[1]]
        return allowed[0] if heads == 1 else allowed.repeat_interleave(self.config.num_attention_heads // heads, 0)

    def _attend(self, q, k, v, mask) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1).transpose(0, 1)[None] for t in (k, v))
        q = q.transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return out[0].transpose(0, 1).flatten(1)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps) * weight

    def _rope(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angle = positions[:, None].float() * self.frequency  # fp32 is part of the model's definition
        cos, sin = angle.cos()[:, None].double(), angle.sin()[:, None].double()
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
