"""Attention mass of chunks: from queries and keys, stored sparsely, and read back."""

import math
from typing import NamedTuple

import torch


class Masses(NamedTuple):
    """Shares of attention mass of chunks, the largest one by one. Leading dimensions are free: layers, cycles, heads.

    chunk: integers [..., K], in descending order of mass; places that are not used hold the last chunk of the
    window, which no cycle can choose, with mass 0. mass: fp16 [..., K]. rest: fp16 [...], of all other chunks together.
    """

    chunk: torch.Tensor
    mass: torch.Tensor
    rest: torch.Tensor


def chunk_logits(query: torch.Tensor, keys: torch.Tensor, scale: float, chunk_tokens: int, first: int) -> torch.Tensor:
    """Log of the attention mass of chunks, fp32 [Hkv, G, P, n], unnormalised; -inf for chunks after a query.

    query: [Hkv · G, P, D], at positions first, first + 1, …. keys: [Hkv, T, D], with T = first + P, n = T /
    chunk_tokens. A chunk that a query sees only in part counts with that part.
    """
    kv_heads, tokens, _ = keys.shape
    rows = query.shape[1]
    q = query.float().reshape(kv_heads, -1, query.shape[-1])
    logits = (q @ keys.float().transpose(-1, -2)).mul_(scale).view(kv_heads, -1, rows, tokens)
    later = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    logits[..., first:].masked_fill_(later, -math.inf)
    return logits.view(kv_heads, -1, rows, tokens // chunk_tokens, chunk_tokens).logsumexp(-1)


def next_mass(logits: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Mean over queries and heads of the shares of mass among the first chunks of each block.

    logits: [Hkv, G, R, P, n], `chunk_logits` of R blocks. limits: [R], how many chunks count. Returns [R, Hkv, n].
    """
    after = torch.arange(logits.shape[-1], device=logits.device) >= limits[:, None]
    return logits.masked_fill(after[:, None], -math.inf).softmax(-1).mean((1, 3)).transpose(0, 1)


def last_usage(logits: torch.Tensor, decay: float) -> torch.Tensor:
    """How much chunks were used in the steps of each block, mean over heads: [R, Hkv, n] of [Hkv, G, R, P, n].

    As serving does it, ``usage ← max(decay · usage, mass)`` per step; with decay 1 the mean over the steps instead.
    """
    mass = logits.softmax(-1).mean(1).transpose(0, 1)
    if decay == 1:
        return mass.mean(2)
    ages = torch.arange(mass.shape[2] - 1, -1, -1, device=mass.device)
    return (mass * (decay ** ages.float())[:, None]).amax(2)


def sparse(mass: torch.Tensor, kept: int, unused: int, counts: torch.Tensor | None = None) -> Masses:
    """The `kept` largest of mass [..., n]. unused: the chunk that fills places there is nothing for.

    counts: [S] for mass [S, Hkv, n], how many of the chunks there are; all by default.
    """
    n = mass.shape[-1]
    top, index = mass.topk(min(kept, n), -1)
    rest = (mass.sum(-1) - top.sum(-1)).clamp(min=0) if n > kept else torch.zeros_like(top[..., 0])
    if counts is not None:
        index = index.masked_fill(index >= counts[:, None, None], unused)
        rest = rest.masked_fill(counts[:, None] <= kept, 0)
    if n < kept:
        shape = (*mass.shape[:-1], kept - n)
        top = torch.cat([top, top.new_zeros(shape)], -1)
        index = torch.cat([index, index.new_full(shape, unused)], -1)
    dtype = torch.int16 if unused < 1 << 15 else torch.int32
    return Masses(index.to(dtype), top.half(), rest.half())


def dense(masses: Masses, counts: torch.Tensor, chunks: int) -> torch.Tensor:
    """Mass of every chunk, fp32 [S, Hkv, chunks]; what is not known one by one is spread evenly. counts: [S], of past.

    Chunks from counts on hold nothing that means something.
    """
    unknown = (counts - masses.chunk.shape[-1]).clamp(min=1)
    level = masses.rest.float() / unknown[:, None]
    out = level.unsqueeze(-1).expand(*level.shape, chunks).clone()
    return out.scatter_(-1, masses.chunk.long(), masses.mass.float())


def dense_mean(masses: Masses, counts: torch.Tensor, chunks: int) -> torch.Tensor:
    """Mass of every chunk, mean over layers and KV heads: fp32 [S, chunks] of masses [L, S, Hkv, K]. See `dense`."""
    total = torch.zeros(len(counts), chunks, device=masses.mass.device)
    for layer in range(len(masses.chunk)):  # one at a time: all of a large model would take gigabytes
        total += dense(Masses(*(x[layer] for x in masses)), counts, chunks).mean(1)
    return total / len(masses.chunk)


def forced(counts: torch.Tensor, chunks: int, sink_chunks: int, recent_chunks: int) -> torch.Tensor:
    """Chunks that are not to be learned, bool [S, chunks]: those always kept, and those that are not past yet."""
    n = torch.arange(chunks, device=counts.device)
    return (n < sink_chunks) | (n >= counts[:, None] - recent_chunks)


def top_share(mass: torch.Tensor, rest: torch.Tensor, p: float) -> torch.Tensor:
    """The fewest of mass [..., K], in descending order, that hold the share p of all, rest [...] included: bool."""
    mass = mass.float()
    total = mass.sum(-1, keepdim=True) + rest.float().unsqueeze(-1)
    before = mass.cumsum(-1) - mass
    # All of it means all, whatever the sums are rounded to.
    return (mass > 0) & ((before < p * total) | (p >= 1))
