"""What the backbone does with each window, once for all later steps. ``python -m indexer_training.capture --out DIR``

Makes capture/window_*.safetensors. L layers, S cycles, N chunks, F = heads · head size, K chunks kept:

    query          fp16 [L, S, F]        the layer's own last query before the cycle, without RoPE
    keys           fp16 [L, N, Hkv, D]   mean key of each chunk, with RoPE
    next_chunk, next_mass, next_rest     `Masses` [L, S, Hkv, ..]: share of the attention of the window from there on
    last_chunk, last_mass, last_rest     the same for usage in the period before it
    query_moment   fp32 [L, Hkv, D, D]   mean of q qᵀ over tokens and the group's heads
    key_sum        fp32 [L, Hkv, D]
    key_sample     fp16 [L, Hkv, n, D]   keys of random tokens

and capture/model.safetensors: inv_freq, float64 [L, dims / 2]; its metadata hold how the model rotates.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from indexer_training import masses
from indexer_training.backbone import Backbone
from indexer_training.distributed import Group
from indexer_training.settings import Settings
from indexer_training.workspace import Workspace, progress, write_tensors
from vllm_lsa.indexer.rotary import RopeConfig, rotate

# Blocks of queries that are scored at once: a GPU wants few large products, a CPU small ones in its caches.
_TOGETHER = {"cuda": 16, "cpu": 2}


class Recorder:
    """Dense causal attention that notes down what training needs, layer by layer, for one window."""

    def __init__(self, settings: Settings, backbone: Backbone, window: int) -> None:
        self.settings = settings
        self.rotary = backbone.rotary
        self.rope = RopeConfig.model_validate({"style": self.rotary.style, "dims": self.rotary.dims})
        self.window = window
        self.layers: list[dict[str, torch.Tensor]] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Of one layer; query [Hq, T, D], key and value [Hkv, T, D], RoPE applied. Returns [Hq, T, D]."""
        assert layer == len(self.layers), "layers come in order"
        q, k = query.float(), key.float()
        record = {**self._masses(q, k, scale), **self._moments(q, k, layer)}
        ends = torch.tensor(self.settings.starts, device=q.device) - 1
        last = q[:, ends].transpose(0, 1) / self.rotary.scaling
        speeds = self.rotary.inv_freq[layer].to(q.device)
        record["query"] = rotate(last, ends, speeds, self.rope, inverse=True).flatten(1).half()
        record["keys"] = k.unflatten(1, (-1, self.settings.chunk_tokens)).mean(2).transpose(0, 1).half()
        self.layers.append({name: x.cpu() for name, x in record.items()})
        # Repeated, since the kernels that do not hold all scores take no grouped heads in fp32.
        key, value = (x.repeat_interleave(len(query) // len(key), 0) for x in (key, value))
        return F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, scale=scale)[0]

    def _masses(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
        s = self.settings
        starts, kv_heads = s.starts, len(k)
        upcoming, last = (torch.zeros(len(starts), kv_heads, s.chunks, device=q.device) for _ in range(2))
        # Blocks of one period: each is the last one of the cycle after it, and part of the windows of those before.
        blocks = range(starts[0] - s.period, starts[-1] + s.window, s.period)
        for at in range(0, len(blocks), _TOGETHER[q.device.type]):
            some = torch.tensor(blocks[at : at + _TOGETHER[q.device.type]])
            begin, end = int(some[0]), int(some[-1]) + s.period
            logits = masses.chunk_logits(q[:, begin:end], k[:, :end], scale, s.chunk_tokens, begin)
            logits = logits.unflatten(2, (len(some), s.period))
            n = logits.shape[-1]

            def cycles(of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                """Numbers of the cycles that start there, and which of the blocks they are."""
                number = torch.div(of - starts[0], s.period, rounding_mode="floor")
                which = torch.nonzero((number >= 0) & (number < len(starts))).flatten()
                return number[which], which

            number, which = cycles(some + s.period)
            last[number, :, :n] = masses.last_usage(logits, s.usage_decay)[which]
            for before in range(0, s.window, s.period):
                begins = some - before
                number, which = cycles(begins)
                shares = masses.next_mass(logits, (begins // s.chunk_tokens).clamp(min=1).to(q.device))
                upcoming[number, :, :n] += shares[which] * (s.period / s.window)
        counts = torch.tensor(starts, device=q.device) // s.chunk_tokens
        found = {
            kind: masses.sparse(values, s.kept, s.chunks - 1, counts)
            for kind, values in (("next", upcoming), ("last", last))
        }
        return {f"{kind}_{part}": x for kind, each in found.items() for part, x in each._asdict().items()}

    def _moments(self, q: torch.Tensor, k: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        s = self.settings
        kv_heads, tokens, dim = k.shape
        grouped = q.reshape(kv_heads, -1, dim)
        count = min(tokens, -(-s.key_sample // s.documents))
        generator = torch.Generator().manual_seed((s.seed * 10007 + self.window) * 1009 + layer)
        chosen = torch.randperm(tokens, generator=generator)[:count].to(k.device)
        return {
            "query_moment": grouped.transpose(1, 2) @ grouped / grouped.shape[1],
            "key_sum": k.sum(1),
            "key_sample": k[:, chosen].half(),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Of all layers."""
        return {name: torch.stack([record[name] for record in self.layers]) for name in self.layers[0]}


def run(work: Workspace, group: Group) -> dict[str, Any]:
    """Run the backbone over the windows that are not captured yet."""
    s = work.settings
    if s.v4:
        from indexer_training import v4_capture

        return v4_capture.run(work, group)
    mine = list(group.mine(range(s.documents)))
    left = [i for i in mine if not work.shard("capture", i).exists()]
    model_file = work.folder("capture") / "model.safetensors"
    if not left and (model_file.exists() or not group.leads):
        return {}
    backbone = Backbone(Path(s.model), s.torch_device(), s.dtype)
    if group.leads:
        r = backbone.rotary
        about = {"scaling": r.scaling, "style": r.style, "dims": r.dims}
        write_tensors(model_file, {"inv_freq": r.inv_freq}, {"rotary": json.dumps(about)})
    for i in progress(left, "capture", group, " windows", len(mine) - len(left)):
        recorder = Recorder(s, backbone, i)
        backbone.run(load_file(work.shard("data", i))["tokens"], recorder.attend)
        write_tensors(work.shard("capture", i), recorder.tensors())
    return {"bytes": sum(path.stat().st_size for path in work.folder("capture").glob("window_*.safetensors"))}


if __name__ == "__main__":
    from indexer_training.cli import step_main

    step_main("capture")
