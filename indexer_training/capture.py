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
from collections import deque
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
        unused, starts = s.chunks - 1, s.starts
        found: dict[str, list[torch.Tensor]] = {
            f"{kind}_{part}": [] for kind in ("next", "last") for part in masses.Masses._fields
        }

        def note(kind: str, values: torch.Tensor) -> None:
            for part, x in masses.sparse(values, s.kept, unused)._asdict().items():
                found[f"{kind}_{part}"].append(x)

        # Blocks of one period: each is the last one of the cycle after it, and part of the window of those before.
        ahead: deque[torch.Tensor] = deque(maxlen=s.window // s.period)
        for begin in range(starts[0] - s.period, starts[-1] + s.window, s.period):
            end = begin + s.period
            logits = masses.chunk_logits(q[:, begin:end], k[:, :end], scale, s.chunk_tokens, begin)
            if end in starts:
                note("last", masses.last_usage(logits, s.usage_decay))
            ahead.append(logits)
            start = end - s.window
            if start in starts:
                shares = [masses.next_mass(x, start // s.chunk_tokens) for x in ahead]
                note("next", torch.stack(shares).mean(0))
        return {name: torch.stack(x) for name, x in found.items()}

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
