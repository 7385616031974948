"""``vllm-lsa eval``: quality at equal device bytes. Imports neither torch nor transformers before it runs."""

import argparse
from pathlib import Path
from typing import Any

from vllm_lsa.errors import LsaError

METHODS = {
    "dense": "attention to everything",
    "lsa": "trained lookahead (usage without --indexer) and demand",
    "lookahead": "trained lookahead, no demand; needs --indexer",
    "demand": "starts from the newest chunks, then demand",
    "demand_alone": "starts from forced chunks, then demand",
    "usage+demand": "starts from what was used, then demand",
    "recency": "the newest chunks",
    "recency+demand": "another name for demand",
    "random": "any chunks",
    "mean_key": "by the chunk's mean key, for the last query of a period",
    "quest": "by Quest's bound, likewise",
}
DEFAULT_CONTEXTS = [2048, 4096, 8192]
DEFAULT_METHODS = ("dense", "lsa", "lookahead", "demand", "recency", "random", "mean_key", "quest")

SERVED_STEPS = 192

_RULE_OPTIONS: dict[str, tuple[type, str]] = {
    "chunk_tokens": (int, "tokens of a chunk, a divisor of 64 (default: 16, with demand 8 or the checkpoint's)"),
    "sink_tokens": (int, "tokens at the start that are always resident (default: 16)"),
    "recency_tokens": (int, "newest tokens that are always resident (default: 128, with demand 32)"),
    "demand_chunks": (int, "chunks a lane may demand per step (default: 8)"),
    "demand_threshold": (float, "share of a step's attention mass that a demanded chunk must exceed (default: 0.002)"),
}


def _shares(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not all(0 < value <= 1 for value in values):
        raise ValueError
    return values


def _counts(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if not all(value > 0 for value in values):
        raise ValueError
    return values


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


_shares.__name__, _counts.__name__, _names.__name__ = "list of shares in (0, 1]", "list of numbers", "list of names"


def run(args: argparse.Namespace) -> int:
    if not args.text.is_dir():
        raise LsaError(f"--text {args.text} is not a folder: give one of long documents")
    from indexer_training import v4_model

    if v4_model.is_v4(args.model):
        from indexer_training import v4_eval

        return v4_eval.run(args)
    for name in v4_model.ONLY:
        if getattr(args, name, None) is not None:
            raise LsaError(f"--{name.replace('_', '-')} is of DeepSeek-V4 alone: leave it out")
    args.contexts = args.contexts or DEFAULT_CONTEXTS
    if args.documents < 0 or args.tasks < 0 or not args.documents + args.tasks:
        raise LsaError(f"--documents {args.documents} --tasks {args.tasks} leave nothing to measure: give one of them")
    bad = [context for context in args.contexts if context % 64 or context < 256]
    if bad:
        raise LsaError(f"--contexts {bad[0]} is not a multiple of 64 tokens from 256 on")
    if args.served:
        _check_served(args)
    elif args.steps is not None:
        raise LsaError(f"--steps {args.steps} is of --served: give both or neither")
    from vllm_lsa.evaluation.run import evaluate

    settings = {name: getattr(args, name) for name in (*_RULE_OPTIONS, "sets") if getattr(args, name) is not None}
    if args.served:
        from vllm_lsa.evaluation import served_report
        from vllm_lsa.evaluation.served import ServedEvaluation

        return evaluate(args, settings, ServedEvaluation, served_report.write)
    return evaluate(args, settings)


def _check_served(args: argparse.Namespace) -> None:
    """Raises LsaError on what cannot be served; fills in --steps."""
    if args.quick:
        raise LsaError("--quick is of the offline form: leave it out, or give fewer --steps with --served")
    args.steps = SERVED_STEPS if args.steps is None else args.steps
    if args.steps % 64 or args.steps < 128:
        raise LsaError(f"--steps {args.steps} is not a multiple of 64 from 128 on")
    short = min(args.contexts)
    if short - args.steps < 256:
        raise LsaError(
            f"--contexts {short} leaves {short - args.steps} tokens of prompt before --steps {args.steps}: "
            "at least 256 are needed"
        )


def add_command(subparsers: Any) -> None:
    """Adds ``eval`` to the command line."""
    text = "quality of a model at equal device bytes: documents, retrieval tasks, recall, traffic"
    parser = subparsers.add_parser("eval", help=text, description=text)
    parser.add_argument("--model", required=True, type=Path, help="folder of a Hugging Face model")
    parser.add_argument("--text", required=True, type=Path, help="folder of long documents (.txt, .md, .jsonl, …)")
    parser.add_argument(
        "--indexer", type=Path, metavar="CKPT", help="checkpoint that 'vllm-lsa train' wrote, or a shipped one's name"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the results; finished parts are not redone")
    parser.add_argument(
        "--budgets", type=_shares, default="0.10,0.135,0.16,0.20", help="device bytes, index included, over KV bytes"
    )
    parser.add_argument(
        "--contexts", type=_counts, help="tokens of a window (default: 2048,4096,8192; DeepSeek-V4: as 'train' has)"
    )
    parser.add_argument(
        "--methods", type=_names, help=f"some of {', '.join(METHODS)} (default: {', '.join(DEFAULT_METHODS)})"
    )
    parser.add_argument("--documents", type=int, default=8, help="documents to measure NLL, KL and top-1 on")
    parser.add_argument("--tasks", type=int, default=10, help="samples of each retrieval task")
    parser.add_argument("--recall", type=int, default=2, help="documents to measure recall of the lookaheads on")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the model")
    parser.add_argument("--quick", action="store_true", help="every other block of a document")
    parser.add_argument(
        "--served",
        action="store_true",
        help="through real servers (vllm serve), one for each method, budget and context: documents forced upon them "
        "token by token, beside the same offline, and tasks answered freely; no recall",
    )
    parser.add_argument(
        "--steps",
        type=int,
        help=f"with --served: tokens at the end of a document that are decoded (default: {SERVED_STEPS})",
    )
    parser.add_argument("--seconds", type=float, help="stop after so long and report what is there")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of documents and of the tasks")
    parser.add_argument("--sets", choices=["per_head", "per_layer", "shared"], help="resident sets (default: per_head)")
    parser.add_argument(
        "--engine", metavar="JSON", help="DeepSeek-V4, which vLLM runs: further arguments of vllm.LLM, an object"
    )
    parser.add_argument(
        "--native-top-p", type=float, help="DeepSeek-V4: as of 'vllm-lsa train'; 1 for the whole native top-512"
    )
    for name, (kind, help_text) in _RULE_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=help_text)
    parser.set_defaults(run=run)
