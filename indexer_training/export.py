"""Writes the checkpoint folder. ``python -m indexer_training.export --out DIR``

DIR gets config.json, model.safetensors, product.safetensors and README.md; `MemoryIndexer.load(DIR)` reads it. What is
in DIR/work is not needed for that. A DeepSeek-V4's has no product tables, and beside it is joint.safetensors, the
published layout, as `PagedScorer.load` and others' programs read it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from indexer_training.distributed import Group
from indexer_training.evaluate import selected
from indexer_training.train import read_trained
from indexer_training.workspace import Workspace, log, write_tensors
from vllm_lsa.indexer import IndexerConfig, MemoryIndexer
from vllm_lsa.indexer.checkpoint import fingerprint_of
from vllm_lsa.indexer.published import inverse_frequencies

TABLES = "product.safetensors"
JOINT = "joint.safetensors"


def run(work: Workspace, group: Group) -> dict[str, Any]:
    """Put together what the steps made."""
    if not group.leads:
        return {}
    s = work.settings
    indexer, about = read_trained(work)
    recall = about["recall"]
    calibration = json.loads((work.folder("calibrate") / "calibration.json").read_text())
    metrics = json.loads((work.folder("evaluate") / "table.json").read_text())
    # How the scores alone do, before anything is demanded: the mean over all sets.
    for name, values in recall.items():
        metrics[f"recall, {name}, {about['budget']:.1%}"] = round(sum(values) / len(values), 4)
    weights = calibration["layer_weights"]
    few = selected(indexer, about)
    few.config = IndexerConfig.model_validate(
        {
            **few.config.model_dump(),
            "backbone_fingerprint": fingerprint_of(Path(s.model)),
            "thresholds": calibration["thresholds"],
            "budget_shares": calibration["budget_shares"],
            "layer_weights": weights,
            "layer_gains": about["gains"],
            "demand_index": None if s.v4 else {"kind": "product", "subspaces": s.subspaces, "file": TABLES},
            "metrics": metrics,
        }
    )
    if s.v4:
        few.save(work.out, torch.bfloat16)
        write_joint(few, work.out)
    else:
        unfinished = work.out / (TABLES + ".unfinished")
        shutil.copyfile(work.folder("calibrate") / TABLES, unfinished)
        os.replace(unfinished, work.out / TABLES)
        few.save(work.out, torch.float16)
    files = [work.out / name for name in ("config.json", "model.safetensors", TABLES, JOINT)]
    return {"layers": len(few.layers), "bytes": sum(path.stat().st_size for path in files if path.exists())}


def write_joint(indexer: MemoryIndexer, folder: Path) -> None:
    """Write the published layout, bf16. It has no room for RoPE's speeds: what reads it takes V4-Flash's."""
    layer = indexer.layers[0]
    if not torch.equal(indexer.layer(layer).inv_freq, inverse_frequencies()):
        log(f"export: RoPE is not V4-Flash's, so there is no {JOINT}: use the folder, which says how it turns")
        return
    state = indexer.state_dict()
    write_tensors(folder / JOINT, {name: x.bfloat16() for name, x in state.items() if not name.endswith(".inv_freq")})
    (folder / JOINT).chmod(0o644)  # safetensors makes files that only their owner may read


if __name__ == "__main__":
    from indexer_training.cli import step_main

    step_main("export")
