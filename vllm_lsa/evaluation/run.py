"""The work of ``vllm-lsa eval``: every method at every budget and context, one record for each finished part."""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation import report
from vllm_lsa.evaluation.command import DEFAULT_METHODS
from vllm_lsa.evaluation.indexes import Product
from vllm_lsa.evaluation.methods import Trained, at_total, load_trained, make_rules
from vllm_lsa.evaluation.offline import SparseModel
from vllm_lsa.evaluation.quality import (
    DocumentQuality,
    SuiteQuality,
    Window,
    hidden_needed,
    make_windows,
    pair_tasks,
    prompts_at_once,
    read_texts,
)
from vllm_lsa.evaluation.rule import SelectionRule
from vllm_lsa.evaluation.suite import Task, make_suite
from vllm_lsa.indexer import MemoryIndexer
from vllm_lsa.indexer.fingerprint import fingerprint_of

RECORDS = "records.jsonl"
RECALL_LOOKAHEADS = ("newest", "usage", "trained")


class Cell(NamedTuple):
    """A method at a budget: total bytes over KV bytes. rule: None for dense."""

    method: str
    budget: float
    rule: SelectionRule | None


class Records:
    """Finished parts of runs into one folder, a line of JSON each, by a hash of all that decides them."""

    def __init__(self, folder: Path) -> None:
        """Raises LsaError if the folder cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / RECORDS
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise LsaError(f"--out {folder} cannot be written: {error.strerror}") from None
        if text and not text.endswith("\n"):
            self._file.write("\n")  # a run was killed while it wrote a line
        self._found: dict[str, dict[str, Any]] = {}
        for line in text.splitlines():
            try:
                record = json.loads(line)
                self._found[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                continue

    @staticmethod
    def key(what: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]

    def get(self, what: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a part, if it is finished."""
        return self._found.get(self.key(what))

    def put(self, what: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Store a finished part at once."""
        record = {"key": self.key(what), **what, "result": dict(result)}
        self._found[record["key"]] = record
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Stopped(Exception):
    """The time given by --seconds is over."""


class Evaluation:
    """One run: what to measure, what is there already."""

    def __init__(self, args: argparse.Namespace, settings: Mapping[str, Any]) -> None:
        self.args = args
        self.begun = time.monotonic()
        device = pick_device(args.device)
        names = args.methods or [m for m in DEFAULT_METHODS if m != "lookahead" or args.indexer]
        self.model = SparseModel(args.model, device, getattr(torch, args.dtype))
        self.trained: Trained | None = load_trained(args.indexer, args.model, device) if args.indexer else None
        self.rules = make_rules(names, self.trained, dict(settings))
        self.names = list(dict.fromkeys(names))
        self.backbone = fingerprint_of(args.model)
        self.notes: list[str] = []
        self.cells = list(self._make_cells())
        self.records = Records(args.out)
        self.hidden = hidden_needed([cell.rule for cell in self.cells if cell.rule is not None])
        self.finished = False
        self.parts: list[dict[str, Any]] = []  # all that was asked for

    def _make_cells(self) -> Iterator[Cell]:
        yield Cell("dense", 1.0, None)
        for name in self.names:
            for budget in self.args.budgets if name != "dense" else ():
                rule = at_total(self.rules[name], budget, self.model.head_dim)
                if rule is not None:
                    yield Cell(name, budget, rule)
                else:
                    share = self.rules[name].index_share(self.model.head_dim)
                    self.notes.append(f"{name} at {budget:g}: left out, its index alone takes {share:.3f}")

    def what(self, kind: str, cell: Cell, context: int, part: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that decides a part's result."""
        rule, trained = cell.rule, self.trained
        # What does not use the checkpoint stays when another one is given.
        uses = rule is not None and (isinstance(rule.lookahead, MemoryIndexer) or isinstance(rule.demand, Product))
        return {
            "kind": kind, "method": cell.method, "budget": cell.budget, "context": context, **part,
            "rule": rule.describe() if rule is not None else None, "backbone": self.backbone,
            "trained": trained.digest if trained is not None and uses else None, "dtype": self.args.dtype,
        }  # fmt: skip

    def check_time(self) -> None:
        if self.args.seconds is not None and time.monotonic() - self.begun > self.args.seconds:
            raise Stopped

    def check_contexts(self) -> None:
        """Raises LsaError if a context is longer than the model takes."""
        longest = getattr(self.model.model.config, "max_position_embeddings", None)
        if longest is not None and max(self.args.contexts) > longest:
            raise LsaError(f"--contexts {max(self.args.contexts)}: this model takes at most {longest} tokens")

    def run(self) -> None:
        """Measure what is not there yet. Sets `finished` unless time ran out."""
        args = self.args
        tokenizer = self.model.tokenizer()
        texts = read_texts(args.text, args.seed)
        self.check_contexts()
        jobs: list[tuple[str, int, Any]] = []
        for context in args.contexts:
            windows = make_windows(texts, tokenizer, context, args.documents) if args.documents else []
            if len(windows) < args.documents:
                self.notes.append(f"context {context}: {len(windows)} of {args.documents} documents are long enough")
            jobs += [("document", context, (i, window)) for i, window in enumerate(windows)]
            if args.tasks:
                suite = make_suite(args.seed, tokenizer, context, [text for _, text in texts], args.tasks)
                pairs = pair_tasks(suite)
                size = prompts_at_once(self.model, context)
                jobs += [("tasks", context, pairs[i : i + size]) for i in range(0, len(pairs), size)]
        todo = []
        for job in jobs:
            parts = list(self._parts(*job))
            self.parts += [what for _, whats in parts for what in whats]
            todo.append((job, [(cell, whats) for cell, whats in parts if any(not self.records.get(w) for w in whats)]))
        total = sum(len(missing) for _, missing in todo)
        bar = tqdm(total=total, unit="part", desc="eval", disable=not total, mininterval=1)
        try:
            for (kind, context, item), missing in todo:
                if missing:
                    self.check_time()
                    measure = self._documents if kind == "document" else self._tasks
                    bar.set_postfix_str(f"{context} tokens, {kind}")
                    measure(context, item, missing, bar)
            self.finished = True
        except (Stopped, KeyboardInterrupt):
            self.notes.append("stopped before the end: give the same command again to go on")
        finally:
            bar.close()
            self.records.close()

    def _parts(self, kind: str, context: int, item: Any) -> Iterator[tuple[Cell, list[dict[str, Any]]]]:
        """The parts of a job: each cell, and what it is to find out."""
        if kind == "document":
            place, window = item
            part = self._window_part(place, window)
            for cell in self.cells:
                yield cell, [self.what("document", cell, context, part)]
            if place < self.args.recall:
                for cell in self._recall_cells():
                    yield cell, [self.what("recall", cell, context, part)]
            return
        for cell in self.cells:
            yield cell, [self.what("task", cell, context, self.task_part(pair)) for pair in item]

    def _window_part(self, place: int, window: Window) -> dict[str, Any]:
        every = 2 if self.args.quick else 1
        return {"document": window.name, "tokens": window.digest, "every": every, "offset": place % every}

    def task_part(self, pair: Sequence[Task]) -> dict[str, Any]:
        """Which sample of the suite, in a record."""
        digest = hashlib.sha256(str(pair[0].tokens).encode()).hexdigest()[:12]
        return {"task": pair[0].name, "sample": pair[0].index, "tokens": digest}

    def _recall_cells(self) -> Iterator[Cell]:
        """Lookaheads at each budget, with what the method lsa has else (or the first that there is)."""
        if not self.rules:
            return
        base = self.rules.get("lsa") or next(iter(self.rules.values()))
        for name in RECALL_LOOKAHEADS:
            lookahead: Any = name if name != "trained" else self.trained and self.trained.indexer
            if lookahead is not None:
                rule = replace(base, lookahead=lookahead)
                for budget in self.args.budgets:
                    cell_rule = at_total(rule, budget, self.model.head_dim)
                    if cell_rule is not None and cell_rule.budget < 1:
                        yield Cell(name, budget, cell_rule)

    def _documents(self, context: int, item: Any, missing: list[tuple[Cell, list[dict[str, Any]]]], bar: Any) -> None:
        place, window = item
        part = self._window_part(place, window)
        quality = DocumentQuality(self.model, window, part["every"], part["offset"], self.hidden)
        for cell, (what,) in missing:
            self.check_time()
            if what["kind"] == "document":
                self.records.put(what, quality.measure(cell.rule))
            else:
                assert cell.rule is not None
                self.records.put(what, quality.recall({cell.method: cell.rule})[cell.method])
            bar.update()

    def _tasks(self, context: int, item: Any, missing: list[tuple[Cell, list[dict[str, Any]]]], bar: Any) -> None:
        quality = SuiteQuality(self.model, item, self.hidden)
        for cell, whats in missing:
            self.check_time()
            for what, result in zip(whats, quality.measure(cell.rule), strict=True):
                self.records.put(what, result)
            bar.update()

    def results(self) -> list[dict[str, Any]]:
        """Records of what was asked for, as far as it is there."""
        found = (self.records.get(what) for what in self.parts)
        return [record for record in found if record is not None]


def pick_device(name: str) -> torch.device:
    """The device called `name`, or the best one for auto. Raises LsaError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LsaError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


Write = Callable[[Path, Mapping[str, Any], Sequence[Mapping[str, Any]]], str]


def evaluate(
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    make: Callable[[argparse.Namespace, Mapping[str, Any]], Evaluation] = Evaluation,
    write: Write = report.write,
) -> int:
    """Measure, write the reports, print the table. Exit status 0, also when time ran out. Raises LsaError."""
    evaluation = make(args, settings)
    for note in evaluation.notes:
        print(f"vllm-lsa: {note}", file=sys.stderr)
    shown = len(evaluation.notes)
    evaluation.run()
    for note in evaluation.notes[shown:]:
        print(f"vllm-lsa: {note}", file=sys.stderr)
    rules = {name: rule.describe() for name, rule in evaluation.rules.items()}
    facts = report.facts(args, rules, evaluation, time.monotonic() - evaluation.begun)
    print(write(args.out, facts, evaluation.results()))
    return 0
