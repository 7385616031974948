"""A small table of quality on held-out documents, by the offline evaluation. ``python -m indexer_training.evaluate``

Makes evaluate/table.json: rows of the checkpoint's evaluation table.
"""

import json
from typing import Any

import torch
from safetensors.torch import load_file

from indexer_training.backbone import quiet
from indexer_training.calibrate import rule_of
from indexer_training.distributed import Group
from indexer_training.train import read_trained
from indexer_training.workspace import Workspace, log, progress, write_json
from vllm_lsa.indexer import MemoryIndexer
from vllm_lsa.indexer.product import ProductTables


def selected(indexer: MemoryIndexer, about: dict[str, Any]) -> MemoryIndexer:
    """The same scorers, of those layers alone and combined as recall.json says."""
    layers: list[int] = about["layers"]
    changes = {"layers": tuple(layers), "ensemble": about.get("ensemble", indexer.config.ensemble)}
    config = indexer.config.model_copy(update=changes)
    speeds = torch.stack([indexer.layer(layer).inv_freq for layer in layers])
    few = MemoryIndexer(config, speeds.cpu())
    few.load_state_dict({name: x for name, x in indexer.state_dict().items() if name in few.state_dict()})
    return few.requires_grad_(False).eval()


def rules(work: Workspace) -> dict[str, Any]:
    """What is compared, by the names of rows."""
    from vllm_lsa.evaluation.indexes import Product

    s = work.settings
    device = s.torch_device()
    indexer, about = read_trained(work)
    trained = selected(indexer, about).to(device)
    tables = ProductTables.load(work.folder("calibrate") / "product.safetensors").to(device)
    calibration = json.loads((work.folder("calibrate") / "calibration.json").read_text())
    weights = calibration["layer_weights"]
    found = {}
    for budget in s.evaluate_budgets:
        common = {"demand": Product(tables), "layer_weights": None if weights is None else tuple(weights)}
        for name, lookahead in (("trained", trained), ("usage", "usage"), ("newest", "newest")):
            rule = rule_of(s, budget, lookahead=lookahead, **common)
            share = rule.index_share(indexer.config.head_dim)
            found[f"{name}, {budget:.1%} + index {share:.1%}"] = rule
    return found


def measure(model: Any, tokens: torch.Tensor, compared: dict[str, Any], period: int, every: int) -> dict[str, Any]:
    """Loss, KL and agreement of each rule against the dense model, on the second half of tokens [T + 1]."""
    from vllm_lsa.evaluation.offline import Traffic, kl

    context = len(tokens) - 1
    half = context // 2 // period * period
    starts = torch.arange(half, context - period + 1, every * period)
    blocks, labels = (x.unfold(0, period, 1)[starts] for x in (tokens[:-1], tokens[1:]))
    past = model.prefill(tokens[:-1], half - period)

    def loss(logits: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten().to(logits.device)))

    dense = model.decode_blocks(past, blocks, starts, None)
    found: dict[str, Any] = {"dense": {"loss": loss(dense)}}
    for name, rule in compared.items():
        traffic = Traffic()
        sparse = model.decode_blocks(past, blocks, starts, rule, traffic=traffic)
        demanded = traffic.per_step()
        found[name] = {
            "loss": loss(sparse),
            "kl": float(kl(dense, sparse).mean()),
            "top-1": float((dense.argmax(-1) == sparse.argmax(-1)).float().mean()),
            "demanded": sum(demanded) / max(1, len(demanded)),
        }
    return found


def table(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over documents, as rows."""
    dense = sum(x["dense"]["loss"] for x in found) / len(found)
    rows: dict[str, Any] = {"dense": {"loss": round(dense, 4)}}
    for name in (name for name in found[0] if name != "dense"):
        mean = {key: sum(x[name][key] for x in found) / len(found) for key in found[0][name]}
        rows[name] = {
            "loss": round(mean["loss"], 4),
            "loss, % more": round(100 * (mean["loss"] / dense - 1), 3),
            "KL": round(mean["kl"], 5),
            "top-1": round(mean["top-1"], 4),
            "demanded": round(mean["demanded"], 3),
        }
    return rows


def run(work: Workspace, group: Group) -> dict[str, Any]:
    """Measure the windows that are not measured yet."""
    if not group.leads:
        return {}
    s = work.settings
    folder = work.folder("evaluate")
    if not s.evaluate:
        log("evaluate: --no-evaluate, so the table has what training measured alone")
        write_json(folder / "table.json", {})
        return {}
    if s.v4:
        from indexer_training import v4_evaluate

        return v4_evaluate.run(work, group)
    from vllm_lsa.evaluation.offline import SparseModel

    model, compared, found = None, rules(work), []
    for i in progress(range(s.heldout_documents), "evaluate", group, " windows"):
        path = folder / f"heldout_{i:05d}.json"
        if not path.exists():
            quiet()
            model = model or SparseModel(s.model, s.torch_device(), getattr(torch, s.dtype))
            tokens = load_file(work.folder("data") / f"heldout_{i:05d}.safetensors")["tokens"].long()
            write_json(path, measure(model, tokens, compared, s.period, s.measure_every))
        found.append(json.loads(path.read_text()))
    rows = table(found)
    write_json(folder / "table.json", rows)
    return {"documents": len(found)}


if __name__ == "__main__":
    from indexer_training.cli import step_main

    step_main("evaluate")
