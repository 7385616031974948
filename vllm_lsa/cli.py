"""The command ``vllm-lsa``."""

import argparse
import sys
from collections.abc import Sequence

from indexer_training import cli as training
from vllm_lsa import __version__, doctor, inspect_checkpoint
from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation import command as evaluation

# Each has add_command(subparsers), which sets `run`: namespace -> exit status.
COMMANDS = (doctor, inspect_checkpoint, training, evaluation)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; its exit status, or 2 after an LsaError, which is printed as one line."""
    parser = argparse.ArgumentParser(prog="vllm-lsa", description="Lookahead Sparse Attention for vLLM")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add_command(subparsers)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except LsaError as error:
        print(f"vllm-lsa: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
