"""Writes the checkpoint folder. ``python -m indexer_training.export --out DIR``

DIR gets config.json, model.safetensors, product.safetensors and README.md; `MemoryIndexer.load(DIR)` reads it. What is
in DIR/work is not needed for that.
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
from indexer_training.workspace import Workspace
from vllm_lsa.indexer import IndexerConfig
from vllm_lsa.indexer.checkpoint import fingerprint_of

TABLES = "product.safetensors"


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
            "demand_index": {"kind": "product", "subspaces": s.subspaces, "file": TABLES},
            "metrics": metrics,
        }
    )
    unfinished = work.out / (TABLES + ".unfinished")
    shutil.copyfile(work.folder("calibrate") / TABLES, unfinished)
    os.replace(unfinished, work.out / TABLES)
    few.save(work.out, torch.float16)
    size = sum((work.out / name).stat().st_size for name in ("config.json", "model.safetensors", TABLES))
    return {"layers": len(few.layers), "bytes": size}


if __name__ == "__main__":
    from indexer_training.cli import step_main

    step_main("export")
