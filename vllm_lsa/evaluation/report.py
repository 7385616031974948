"""What ``vllm-lsa eval`` writes: results.json, quality.csv, tasks.csv, recall.csv, and pictures of both."""

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from vllm_lsa import __version__
from vllm_lsa.evaluation.quality import bootstrap, relative_nll
from vllm_lsa.indexer.model_card import aligned

Row = dict[str, Any]
_Key = TypeVar("_Key")


def facts(args: argparse.Namespace, rules: Mapping[str, Any], evaluation: Any, seconds: float) -> Row:
    """Date, machine, versions and the exact command, and what was compared."""
    device = evaluation.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"vllm-lsa": __version__, "python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in ("torch", "transformers", "numpy")}
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["vllm-lsa", *sys.argv[1:]]),
        "machine": {"device": f"{device.type}: {name}", "system": platform.platform(), "cpus": os.cpu_count()},
        "versions": versions,
        "seconds": round(seconds, 1),
        "finished": evaluation.finished,
        "notes": evaluation.notes,
        "model": {"path": str(args.model), "fingerprint": evaluation.backbone},
        "indexer": None
        if evaluation.trained is None
        else {"path": str(args.indexer), "digest": evaluation.trained.digest},
        "table_bytes": _table_bytes(evaluation.trained),
        "methods": rules,
    }


def _table_bytes(trained: Any) -> int:
    """Of the demand index's tables at 16 bits: they are there once for a model, and are not in bytes_index."""
    if trained is None or trained.tables is None:
        return 0
    t = trained.tables
    return 2 * sum(x.numel() for x in (t.to_code, t.to_query, t.mean, t.centroids))


def groups(records: Iterable[Mapping[str, Any]], kind: str, names: Sequence[str]) -> dict[tuple[Any, ...], list[Any]]:
    """Records of a kind by what they have under some names."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for record in records:
        if record["kind"] == kind:
            found.setdefault(tuple(record[name] for name in names), []).append(record)
    return found


def mean(values: Iterable[float]) -> float:
    """The mean of at least one value."""
    data = list(values)
    return sum(data) / len(data)


def quality_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each context, method and budget. Shares are of 1; dnll_percent is the mean over documents."""
    names = ("context", "budget", "method")
    documents, tasks = groups(records, "document", names), groups(records, "task", names)
    dense_right = {key[0]: _accuracy(found) for key, found in tasks.items() if key[2] == "dense"}
    rows = []
    for key in dict.fromkeys((*documents, *tasks)):
        results = [record["result"] for record in documents.get(key, [])]
        costs = results or [record["result"] for record in tasks[key]]
        resident, index = mean(c["resident"] for c in costs), costs[0]["index"]
        row: Row = dict(zip(names, key, strict=True))
        row |= {"bytes_total": resident + index, "bytes_resident": resident, "bytes_index": index}
        row |= {"documents": len(results)}
        if results:
            change = relative_nll(results)
            low, high = bootstrap(change)
            row |= {"nll": mean(r["nll"] for r in results), "dnll_percent": 100 * mean(change)}
            row |= {"dnll_low": 100 * low, "dnll_high": 100 * high}
            row |= {name: mean(r[name] for r in results) for name in ("kl", "top1")}
        if key in tasks:
            row |= {"samples": len(tasks[key]), **_accuracy(tasks[key])}
            dense = dense_right.get(key[0])
            if dense and dense["before"] + dense["inside"]:
                right = row["before"] + row["inside"]
                row["against_dense"] = right / (dense["before"] + dense["inside"])
        row["demanded_per_lane_step"] = mean(mean(c["demanded"]) if c["demanded"] else 0.0 for c in costs)
        row["demanded_bytes_per_step"] = mean(c["demanded_bytes"] for c in costs)
        rows.append(row)
    return rows


def _accuracy(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of samples that are right in each variant, all tasks together."""
    results = [record["result"]["right"] for record in records]
    return {variant: mean(float(right[variant]) for right in results) for variant in ("before", "inside")}


def task_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each context, method, budget, task and variant."""
    rows = []
    for key, found in groups(records, "task", ("context", "budget", "method", "task")).items():
        for variant in ("before", "inside"):
            row: Row = dict(zip(("context", "budget", "method", "task"), key, strict=True))
            right = [float(record["result"]["right"][variant]) for record in found]
            low, high = bootstrap(right)
            row |= {"variant": variant, "samples": len(right), "right": mean(right), "low": low, "high": high}
            row["values_right"] = mean(record["result"]["share"][variant] for record in found)
            rows.append(row)
    return rows


def recall_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each context, lookahead, budget and layer; shares of 1, see `SparseModel.recall`."""
    rows = []
    for key, found in groups(records, "recall", ("context", "budget", "method")).items():
        results = [record["result"] for record in found]
        for layer in range(len(results[0]["mass"])):
            row: Row = dict(zip(("context", "budget", "lookahead"), key, strict=True)) | {"layer": layer}
            row |= {name: mean(r[name][layer] for r in results) for name in ("mass", "oracle", "chunks", "at_stake")}
            rows.append(row)
    return rows


def traffic_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Chunks that a lane demands per step, one row for each context, method, budget and layer."""
    rows = []
    for key, found in groups(records, "document", ("context", "budget", "method")).items():
        layers = [record["result"]["demanded"] for record in found if record["result"]["demanded"]]
        for layer in range(len(layers[0]) if layers else 0):
            row: Row = dict(zip(("context", "budget", "method"), key, strict=True))
            rows.append(row | {"layer": layer, "chunks_per_step": mean(each[layer] for each in layers)})
    return rows


def write(folder: Path, about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Write all files; the table of quality as text."""
    tables = {
        "quality": quality_rows(records),
        "tasks": task_rows(records),
        "recall": recall_rows(records),
        "traffic": traffic_rows(records),
    }
    (folder / "results.json").write_text(json.dumps({**about, **tables}, indent=1) + "\n", encoding="utf-8")
    origin = origin_line(about)
    for name, rows in tables.items():
        write_csv(folder / f"{name}.csv", rows, origin)
    drawn = draw(folder, tables, about)
    lines = aligned(_text_table(tables["quality"])) if tables["quality"] else ["nothing was measured"]
    lines.append(f"in {folder}: results.json, {', '.join(f'{name}.csv' for name in tables)}{drawn}")
    return "\n".join(lines)


def origin_line(about: Mapping[str, Any]) -> str:
    """The first line of each CSV file."""
    return f"# {about['date']}; {about['machine']['device']}; {about['versions']}; {about['command']}"


def write_csv(path: Path, rows: Sequence[Row], origin: str) -> None:
    """Rows as a CSV file, after `origin`, a line that says where they come from."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(origin + "\n")
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})


def _text_table(rows: Sequence[Row]) -> list[list[str]]:
    def show(row: Row, name: str, form: str) -> str:
        return format(row[name], form) if name in row else ""

    table = [["context", "bytes", "method", "actual", "index", "dNLL %", "95 %", "KL", "top-1", "before", "inside"]]
    table[0] += ["vs dense", "chunks/step", "MB/step"]
    for row in sorted(rows, key=lambda row: (row["context"], row["budget"] % 1, row.get("dnll_percent", 0))):
        interval = f"{row['dnll_low']:+.2f}…{row['dnll_high']:+.2f}" if "dnll_low" in row else ""
        table.append(
            [
                str(row["context"]), f"{row['budget']:g}", row["method"], f"{row['bytes_total']:.3f}",
                f"{row['bytes_index']:.3f}", show(row, "dnll_percent", "+.2f"), interval, show(row, "kl", ".4f"),
                show(row, "top1", ".4f"), show(row, "before", ".3f"), show(row, "inside", ".3f"),
                show(row, "against_dense", ".3f"), f"{row['demanded_per_lane_step']:.2f}",
                f"{row['demanded_bytes_per_step'] / 1e6:.2f}",
            ]
        )  # fmt: skip
    return table


# Pictures


def draw(folder: Path, tables: Mapping[str, Sequence[Row]], about: Mapping[str, Any]) -> str:
    """Draw quality.png and recall.png, as far as there are rows; their names, or why there are none."""
    try:
        import matplotlib
    except ImportError:
        return "; no pictures: matplotlib is not here (pip install matplotlib)"
    matplotlib.use("Agg")
    names = ""
    caption = f"{about['model']['path']}, {about['machine']['device']}, {about['date']}"
    if any(row["method"] != "dense" for row in tables["quality"]):
        _draw_quality(folder / "quality.png", tables["quality"], caption)
        names += ", quality.png"
    if tables["recall"]:
        _draw_recall(folder / "recall.png", tables["recall"], caption)
        names += ", recall.png"
    return names


def _draw_quality(path: Path, rows: Sequence[Row], caption: str) -> None:
    """For each context: what each method loses, and retrieval, against bytes."""
    from matplotlib import pyplot

    contexts = sorted({row["context"] for row in rows})
    measures = [("dnll_percent", "ΔNLL, %"), ("before", "right, question before"), ("inside", "right, question inside")]
    measures = [(name, label) for name, label in measures if any(name in row for row in rows)]
    figure, axes = pyplot.subplots(
        len(measures),
        len(contexts),
        squeeze=False,
        figsize=(5 * len(contexts), 3.6 * len(measures)),
        sharex="col",
        layout="constrained",
    )
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name != "dense"]
    colours = {name: f"C{i}" for i, name in enumerate(methods)}
    for column, context in enumerate(contexts):
        here = [row for row in rows if row["context"] == context]
        for line, (name, label) in enumerate(measures):
            axis = axes[line][column]
            dense = [row[name] for row in here if row["method"] == "dense" and name in row]
            if dense:
                axis.axhline(dense[0], color="black", linewidth=1, linestyle=":", label="dense")
            for method in methods:
                found = [row for row in here if row["method"] == method and name in row]
                if not found:
                    continue
                found.sort(key=lambda row: row["bytes_total"])
                x, y = [row["bytes_total"] for row in found], [row[name] for row in found]
                style = {"marker": "o", "markersize": 3, "color": colours[method], "label": method}
                if name == "dnll_percent":
                    below = [row[name] - row["dnll_low"] for row in found]
                    above = [row["dnll_high"] - row[name] for row in found]
                    axis.errorbar(x, y, yerr=(below, above), elinewidth=0.7, capsize=2, **style)
                else:
                    axis.plot(x, y, **style)
            if name == "dnll_percent":
                axis.set_yscale("symlog", linthresh=1)
                axis.yaxis.set_major_formatter(pyplot.ScalarFormatter())
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            if line == 0:
                axis.set_title(f"{context} tokens")
        axes[-1][column].set_xlabel("device bytes (resident + index) / KV bytes")
    axes[0][-1].legend(fontsize=7)
    _save(figure, path, caption)


def _draw_recall(path: Path, rows: Sequence[Row], caption: str) -> None:
    """For each context and lookahead a heat map: layers across, budgets up."""
    from matplotlib import pyplot

    contexts = sorted({row["context"] for row in rows})
    lookaheads = [*dict.fromkeys(row["lookahead"] for row in rows), "oracle"]
    layers = 1 + max(row["layer"] for row in rows)
    figure, axes = pyplot.subplots(
        len(lookaheads),
        len(contexts),
        squeeze=False,
        figsize=(2 + (2 + 0.12 * layers) * len(contexts), 1.6 * len(lookaheads) + 1),
        layout="constrained",
    )
    picture = None
    for column, context in enumerate(contexts):
        for line, lookahead in enumerate(lookaheads):
            name = "oracle" if lookahead == "oracle" else "mass"
            here = [
                row
                for row in rows
                if row["context"] == context and row["lookahead"] == (lookaheads[0] if name == "oracle" else lookahead)
            ]
            budgets = sorted({row["budget"] for row in here})
            values = [
                [row[name] for row in sorted(here, key=lambda r: r["layer"]) if row["budget"] == b] for b in budgets
            ]
            axis = axes[line][column]
            if values:
                picture = axis.imshow(values, vmin=0, vmax=1, aspect="auto", origin="lower", cmap="viridis")
            axis.set_yticks(range(len(budgets)), [f"{budget:g}" for budget in budgets], fontsize=7)
            axis.set_title(f"{lookahead}, {context} tokens", fontsize=8)
        axes[-1][column].set_xlabel("layer")
    if picture is not None:
        figure.colorbar(picture, ax=axes, label="recalled share of the next period's mass\noutside forced chunks")
    _save(figure, path, caption)


def _save(figure: Any, path: Path, caption: str) -> None:
    from matplotlib import pyplot

    figure.supxlabel(caption, fontsize=6, color="grey", x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
