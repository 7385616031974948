"""``vllm-lsa train``: all steps of training, one after the other; and the command line of each single step.

Imports neither torch nor transformers before a step runs.
"""

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from vllm_lsa.errors import LsaError

# Steps that share a process. Training has one to itself, so that no backbone is in its memory.
PROCESSES = (("data", "capture", "label"), ("train",), ("calibrate", "evaluate", "export"))
_PR_SET_PDEATHSIG = 1
_FAILED = 2


def add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for each setting of `settings.Settings`; what is not given stays out of the namespace."""
    from indexer_training.settings import Settings, choices_of

    parser.add_argument("--out", required=True, type=Path, help="folder of the run, and of the checkpoint it makes")
    for name, field in Settings.model_fields.items():
        option = "--" + name.replace("_", "-")
        default = field.get_default()
        shown = "" if default is None or field.is_required() or isinstance(default, tuple) else f" ({default})"
        about: dict[str, Any] = {"help": f"{field.description}{shown}", "default": argparse.SUPPRESS}
        kind: Any = field.annotation
        if kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, **about)
        elif get_origin(kind) is tuple:
            parser.add_argument(option, type=get_args(kind)[0], nargs="+", **about)
        elif choices := choices_of(name):
            parser.add_argument(option, choices=choices, **about)
        else:
            parser.add_argument(option, type=kind, metavar=kind.__name__.upper(), **about)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    from indexer_training.settings import Settings

    return {name: value for name, value in vars(args).items() if name in Settings.model_fields}


def die_with_parent() -> None:
    """If the process above this one is killed outright, this one must not go on writing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _in_fork(steps: Sequence[str], out: Path, settings: Any) -> int:
    """Run steps in a process of their own: its memory is its own, and goes back when it ends. Its exit status.

    A fork instead of a new program, so that torch is imported once.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_with_parent()
            if os.getppid() == parent:
                code = _steps(steps, out, settings)
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _steps(steps: Sequence[str], out: Path, settings: Any) -> int:
    from indexer_training.workspace import run_step

    try:
        for step in steps:
            run_step(step, out, settings)
    except LsaError as error:
        print(f"vllm-lsa: {error}", file=sys.stderr)
        return _FAILED
    return 0


def _prepare(args: argparse.Namespace) -> tuple[Any, Any]:
    """The settings, stored, and the lock on the folder."""
    from indexer_training.documents import SUFFIXES, find_files
    from indexer_training.settings import resolve, write_settings
    from indexer_training.workspace import Workspace

    leads = os.environ.get("RANK", "0") == "0"
    settings = resolve(args.out, _given(args))
    for name, folder in (("text", settings.text), ("heldout", settings.heldout)):
        if folder and not (Path(folder).is_dir() and find_files(Path(folder))):
            raise LsaError(f"--{name} {folder} is no folder with documents: {', '.join(SUFFIXES)} are read")
    lock = None
    if leads:
        lock = Workspace(args.out, settings).lock()
        write_settings(args.out, settings)
    return settings, lock


def run(args: argparse.Namespace) -> int:
    """All steps."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    settings, lock = _prepare(args)
    import torch  # noqa: F401 - once for all processes

    for steps in PROCESSES:
        code = _in_fork(steps, args.out, settings)
        if code:
            return code if code > 0 else 1
    if lock is not None:
        lock.close()
        print(f"the checkpoint is in {args.out}: 'vllm-lsa inspect {args.out}' shows it")
    return 0


def step_main(step: str, argv: Sequence[str] | None = None) -> None:
    """The program of one step. Exits with 0, or 2 after an LsaError, which is printed as one line."""
    parser = argparse.ArgumentParser(prog=f"python -m indexer_training.{step}")
    add_settings(parser)
    args = parser.parse_args(argv)
    try:
        settings, _lock = _prepare(args)
    except LsaError as error:
        print(f"vllm-lsa: {error}", file=sys.stderr)
        sys.exit(_FAILED)
    sys.exit(_steps([step], args.out, settings))


def add_command(subparsers: Any) -> None:
    """Adds ``train`` to the command line."""
    parser = subparsers.add_parser("train", help="train a memory indexer and a demand index for a model")
    add_settings(parser)
    parser.set_defaults(run=run)
