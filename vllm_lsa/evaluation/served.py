"""``vllm-lsa eval --served``: the same methods and budgets through the decode path of real servers.

A server for each method, budget and context. Documents are forced upon it token by token, and measured offline beside
that; tasks are answered freely.
"""

import argparse
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.quality import BLOCK, Window, make_windows, pair_tasks, read_texts
from vllm_lsa.evaluation.run import Cell, Evaluation, Stopped
from vllm_lsa.evaluation.served_requests import answered_task, forced_document
from vllm_lsa.evaluation.served_settings import pool_gib, served_settings
from vllm_lsa.evaluation.suite import WINDOW, Task, make_suite
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.serving.client import FORCING
from vllm_lsa.serving.progress import Status
from vllm_lsa.serving.server import Server, signals_raise

WHOLE = "prompt"
"""The variant of a task whose prompt is all prefilled, as a user's is; the others are those of the suite."""


class ServedEvaluation(Evaluation):
    """One run against servers. Its records are of other kinds than those of the offline form, in the same file."""

    def __init__(self, args: argparse.Namespace, settings: Mapping[str, Any]) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise LsaError("--served starts `vllm serve`, and vllm is not installed here: install vllm 0.32")
        super().__init__(args, settings)
        self.tokenizer = self.model.tokenizer()

    def _make_cells(self) -> Iterator[Cell]:
        for cell in super()._make_cells():
            try:
                self._settings(cell)
            except LsaError as error:
                if self.args.methods:  # asked for by name
                    raise
                if (note := str(error)) not in self.notes:
                    self.notes.append(note)
                continue
            yield cell

    def _settings(self, cell: Cell) -> dict[str, Any]:
        if cell.rule is None:
            return {}
        return served_settings(cell.method, cell.rule, None if self.trained is None else self.trained.path.resolve())

    def _geometry(self, cell: Cell) -> KVGeometry:
        assert cell.rule is not None
        heads, chunk = self.model.kv_heads, cell.rule.chunk_tokens
        return KVGeometry(
            num_layers=self.model.layers,
            num_q_heads=self.model.model.config.num_attention_heads,
            num_kv_heads=heads,
            head_dim=self.model.head_dim,
            dtype=getattr(torch, self.args.dtype),
            block_tokens=chunk,
            chunk_tokens=chunk,
            layer_lanes=heads if cell.rule.sets == "per_head" else 1,
        )

    def server(self, cell: Cell, context: int) -> Server:
        """A server, not yet started, for requests of up to `context` tokens that decode by the cell's rule."""
        log = self.args.out / "logs" / f"{cell.method}-{cell.budget:g}-{context}.log"
        lsa = None
        if cell.rule is not None:
            shortest = context - max(self.args.steps, WINDOW)
            pool = pool_gib(self._geometry(cell), cell.rule.budget, shortest, context)
            lsa = {**self._settings(cell), "device_pool_gib": pool}
        return Server(
            self.args.model, "LSA" if lsa else None, log, context, dtype=self.args.dtype, lsa=lsa,
            arguments=["--logits-processors", FORCING],
            environment={"VLLM_USE_V2_MODEL_RUNNER": "0"},  # whose logits processors have another form
        )  # fmt: skip

    # What there is to do

    def run(self) -> None:
        """Measure what is not there yet. Sets `finished` unless time ran out or it was interrupted."""
        args = self.args
        texts = read_texts(args.text, args.seed)
        self.check_contexts()
        plan: list[tuple[int, list[Window], list[tuple[Task, ...]]]] = []
        for context in args.contexts:
            windows = make_windows(texts, self.tokenizer, context, args.documents) if args.documents else []
            if len(windows) < args.documents:
                self.notes.append(f"context {context}: {len(windows)} of {args.documents} documents are long enough")
            pairs = []
            if args.tasks:
                suite = make_suite(args.seed, self.tokenizer, context, [text for _, text in texts], args.tasks)
                pairs = pair_tasks(suite)
            plan.append((context, windows, pairs))
            for cell in self.cells:
                for kind in ("served", "offline"):
                    self.parts += [self._of_window(kind, cell, context, window) for window in windows]
                self.parts += [self._of_task(cell, context, task, name) for task, name, _ in variants(pairs)]
        try:
            with signals_raise():
                for context, windows, pairs in plan:
                    for window in windows:
                        self._offline(context, window)
                    for cell in self.cells:
                        self._served(cell, context, windows, pairs)
            self.finished = True
        except (Stopped, KeyboardInterrupt):
            self.notes.append("stopped before the end: give the same command again to go on")
        finally:
            self.records.close()

    def _of_window(self, kind: str, cell: Cell, context: int, window: Window) -> dict[str, Any]:
        part = {"document": window.name, "tokens": window.digest, "steps": self.args.steps}
        return self.what(f"{kind} document", cell, context, part)

    def _of_task(self, cell: Cell, context: int, task: Task, variant: str) -> dict[str, Any]:
        return self.what("served task", cell, context, {**self.task_part([task]), "variant": variant})

    # Offline, over a dense past

    def _offline(self, context: int, window: Window) -> None:
        """NLL and best tokens of what a server decodes, in blocks over a dense past."""
        every = [(cell, self._of_window("offline", cell, context, window)) for cell in self.cells]
        missing = [(cell, what) for cell, what in every if not self.records.get(what)]
        if not missing:
            return
        prompt = context - self.args.steps
        starts = torch.arange(prompt, context, BLOCK)
        blocks = window.tokens.unfold(0, BLOCK, 1)
        status = Status(f"offline, {window.name}, {context} tokens")
        past = self.model.prefill(window.tokens[:context], prompt - BLOCK, self.hidden)
        for cell, what in missing:
            self.check_time()
            status.show(f"{cell.method} {cell.budget:g}")
            logits = self.model.decode_blocks(past, blocks[starts], starts, cell.rule).flatten(0, 1)
            labels = blocks[starts + 1].flatten().to(logits.device)
            nll = F.cross_entropy(logits, labels, reduction="none")
            # Without the last: a server of this context does not get to it.
            self.records.put(what, {"nll": nll.tolist()[:-1], "best": logits.argmax(-1).tolist()[:-1]})
        status.clear()

    # Served

    def _served(self, cell: Cell, context: int, windows: Sequence[Window], pairs: Sequence[tuple[Task, ...]]) -> None:
        documents = [(self._of_window("served", cell, context, window), window) for window in windows]
        tasks = [(self._of_task(cell, context, task, name), task, start) for task, name, start in variants(pairs)]
        documents = [job for job in documents if not self.records.get(job[0])]
        tasks = [job for job in tasks if not self.records.get(job[0])]
        if not documents and not tasks:
            return
        self.check_time()
        title = f"{cell.method} {cell.budget:g}, {context} tokens"
        print(title, flush=True)
        with self.server(cell, context) as server:
            status = Status(title)
            lanes = self._geometry(cell).num_lanes if cell.rule is not None else 1
            prompt = context - self.args.steps
            for i, (what, window) in enumerate(documents):
                self.check_time()
                status.show(f"document {i + 1} of {len(documents)}")
                tokens = window.tokens[:context].tolist()
                self.records.put(what, forced_document(server, tokens[:prompt], tokens[prompt:], lanes))
            for i, (what, task, start) in enumerate(tasks):
                self.check_time()
                status.show(f"task {i + 1} of {len(tasks)}")
                self.records.put(what, answered_task(server, task, start, self.tokenizer))
            status.clear()


def variants(pairs: Sequence[tuple[Task, ...]]) -> Iterator[tuple[Task, str, int]]:
    """Each sample's task, the name of a variant, and how much of its prompt is prefilled: shortest prompts first, so
    that the others find them in the prefix cache."""
    for pair in pairs:
        found = [(task, task.variant, task.window_start) for task in pair]
        found.append((pair[0], WHOLE, len(pair[0].prompt_tokens)))
        yield from sorted(found, key=lambda variant: variant[2])
