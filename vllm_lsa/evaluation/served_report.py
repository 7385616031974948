"""What ``vllm-lsa eval --served`` writes: served.json, served.csv, served_documents.csv, served_tasks.csv."""

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_lsa.evaluation.quality import BLOCK, bootstrap
from vllm_lsa.evaluation.report import Row, groups, mean, origin_line, write_csv
from vllm_lsa.indexer.model_card import aligned

_CELL = ("context", "budget", "method")
_DECODED = slice(1, None)  # of a served document's tokens; the prefill predicted the first
_ABOUT_SERVER = ("resident", "index", "footprint", "demanded", "missed")


def document_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each document, context, method and budget that was served; as far as measured, offline beside it.

    The first period is apart, since a server that has just prefilled knows nothing of usage, where the offline form
    starts from that of the prompt's end: every column that is of it begins with first_. nll, offline_nll: nats per
    token. difference: served less offline; abs_difference: the mean over tokens of its size; largest_difference.
    dense_nll, offline_dense_nll: of the dense model. top1, offline_top1: share of tokens that agree with the dense
    model of the same form.
    """
    served = _results(records, "served document")
    offline = _results(records, "offline document")
    rows = []
    for key, result in served.items():
        row: Row = dict(zip((*_CELL, "document"), key[:4], strict=True))
        row["tokens"] = len(result["nll"]) - 1
        dense, beside, dense_beside = served.get(_dense(key)), offline.get(key), offline.get(_dense(key))
        for prefix, part in (("first_", slice(None, BLOCK)), ("", slice(BLOCK, None))):
            nll, best = result["nll"][_DECODED][part], result["best"][_DECODED][part]
            found: Row = {"nll": mean(nll)}
            if dense is not None:
                found["dense_nll"] = mean(dense["nll"][_DECODED][part])
                found["top1"] = _agreement(best, dense["best"][_DECODED][part])
            if beside is not None:
                gaps = [a - b for a, b in zip(nll, beside["nll"][part], strict=True)]
                found |= {"offline_nll": mean(beside["nll"][part]), "difference": mean(gaps)}
                found |= {"abs_difference": mean(map(abs, gaps)), "largest_difference": max(map(abs, gaps))}
            if beside is not None and dense_beside is not None:
                found["offline_dense_nll"] = mean(dense_beside["nll"][part])
                found["offline_top1"] = _agreement(beside["best"][part], dense_beside["best"][part])
            row |= {prefix + name: value for name, value in found.items()}
        rows.append(row | {name: result[name] for name in _ABOUT_SERVER})
    return rows


def _results(records: Sequence[Mapping[str, Any]], kind: str) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    found = groups(records, kind, (*_CELL, "document", "tokens"))
    return {key: of_one[0]["result"] for key, of_one in found.items()}


def _dense(key: tuple[Any, ...]) -> tuple[Any, ...]:
    context, _, _, *document = key
    return (context, 1.0, "dense", *document)


def _agreement(best: Sequence[int], dense: Sequence[int]) -> float:
    return mean(float(a == b) for a, b in zip(best, dense, strict=True))


def task_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each context, method, budget, task and variant: share of samples that were answered."""
    rows = []
    names = (*_CELL, "task", "variant")
    for key, found in groups(records, "served task", names).items():
        right = [float(record["result"]["right"]) for record in found]
        low, high = bootstrap(right)
        row: Row = dict(zip(names, key, strict=True))
        rows.append(row | {"samples": len(right), "right": mean(right), "low": low, "high": high})
    return rows


def method_rows(documents: Sequence[Row], tasks: Sequence[Row]) -> list[Row]:
    """One row for each context, method and budget: means over documents, and over the samples of all tasks.

    dnll_percent, offline_dnll_percent: NLL over the dense NLL of the same form, less 1, with intervals over documents;
    with first_ they are of the first period, see `document_rows`. answered_ and a variant: share of samples.
    """
    rows = []
    for key in dict.fromkeys(tuple(row[name] for name in _CELL) for row in (*documents, *tasks)):
        row: Row = dict(zip(_CELL, key, strict=True))
        here = [r for r in documents if tuple(r[name] for name in _CELL) == key]
        if here:
            row |= {"documents": len(here), **{name: mean(r[name] for r in here) for name in _ABOUT_SERVER}}
        for prefix in ("", "first_") if here else ():
            for form in ("", "offline_"):
                nll, dense = f"{prefix}{form}nll", f"{prefix}{form}dense_nll"
                change = [100 * (r[nll] / r[dense] - 1) for r in here if nll in r and dense in r]
                if change:
                    row[f"{prefix}{form}dnll_percent"] = mean(change)
                    row[f"{prefix}{form}dnll_low"], row[f"{prefix}{form}dnll_high"] = bootstrap(change)
            for name in ("nll", "offline_nll", "difference", "abs_difference", "top1", "offline_top1"):
                if values := [r[prefix + name] for r in here if prefix + name in r]:
                    row[prefix + name] = mean(values)
        answered: dict[str, list[Row]] = {}
        for r in tasks:
            if tuple(r[name] for name in _CELL) == key:
                answered.setdefault(r["variant"], []).append(r)
        for variant, of_variant in answered.items():
            samples = sum(r["samples"] for r in of_variant)
            row["samples"] = samples
            row[f"answered_{variant}"] = sum(r["right"] * r["samples"] for r in of_variant) / samples
        rows.append(row)
    return rows


def write(folder: Path, about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Write all files; the table of methods as text."""
    documents, tasks = document_rows(records), task_rows(records)
    tables = {"served": method_rows(documents, tasks), "served_documents": documents, "served_tasks": tasks}
    about = {**about, "versions": {**about["versions"], "vllm": metadata.version("vllm")}}
    (folder / "served.json").write_text(json.dumps({**about, **tables}, indent=1) + "\n", encoding="utf-8")
    for name, rows in tables.items():
        write_csv(folder / f"{name}.csv", rows, origin_line(about))
    lines = aligned(_text_table(tables["served"])) if tables["served"] else ["nothing was measured"]
    return "\n".join([*lines, f"in {folder}: served.json, {', '.join(f'{name}.csv' for name in tables)}"])


_COLUMNS = {
    "context": ("context", ""), "bytes": ("budget", "g"), "method": ("method", ""), "resident": ("resident", ".3f"),
    "index": ("index", ".3f"), "dNLL %": ("dnll_percent", "+.2f"), "offline": ("offline_dnll_percent", "+.2f"),
    "apart": ("difference", "+.1e"), "a token": ("abs_difference", ".1e"), "top-1": ("top1", ".3f"),
    "offline ": ("offline_top1", ".3f"), "first: dNLL %": ("first_dnll_percent", "+.2f"),
    "offline  ": ("first_offline_dnll_percent", "+.2f"), "a token ": ("first_abs_difference", ".1e"),
    "prompt": ("answered_prompt", ".3f"), "before": ("answered_before", ".3f"), "inside": ("answered_inside", ".3f"),
    "chunks/step": ("demanded", ".2f"),
}  # fmt: skip


def _text_table(rows: Sequence[Row]) -> list[list[str]]:
    ordered = sorted(rows, key=lambda row: (row["context"], row["budget"] % 1, row.get("dnll_percent", 0)))
    cells = [[format(row[name], form) if name in row else "" for name, form in _COLUMNS.values()] for row in ordered]
    return [list(_COLUMNS), *cells]
