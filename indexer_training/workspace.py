"""The folder of a run: what each step has made in it, and how a step is run so that a kill at any point is harmless."""

import fcntl
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from indexer_training.settings import STEPS, Settings
from vllm_lsa.errors import LsaError

if TYPE_CHECKING:
    import torch

    from indexer_training.distributed import Group

_PATIENCE = 20  # seconds for the processes of a run that was killed to be gone


class Workspace:
    """OUT: the checkpoint's files, run.json, and work/STEP/ for each step.

    A file appears under its name whole or not at all. A step whose folder has done.json is complete.
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        self.out = out
        self.settings = settings

    def folder(self, step: str) -> Path:
        """What a step makes; created here."""
        path = self.out / "work" / step
        path.mkdir(parents=True, exist_ok=True)
        return path

    def shard(self, step: str, window: int) -> Path:
        """The tensors that a step makes of one window."""
        return self.folder(step) / f"window_{window:05d}.safetensors"

    def is_done(self, step: str) -> bool:
        """Whether it is complete. Raises LsaError if that was with other settings."""
        path = self.out / "work" / step / "done.json"
        if not path.exists():
            return False
        if json.loads(path.read_text())["settings"] != self.settings.hash_of(step):
            raise LsaError(f"{path.parent} was made with other settings: give another --out, or delete {path.parent}")
        return True

    def require(self, step: str) -> None:
        """Raises LsaError unless the steps before this one are complete."""
        for earlier in STEPS[: STEPS.index(step)]:
            if not self.is_done(earlier):
                raise LsaError(
                    f"{self.out}: {step} needs what {earlier} makes: run python -m indexer_training.{earlier} --out "
                    f"{self.out} first"
                )

    def finish(self, step: str, facts: Mapping[str, Any]) -> None:
        """Mark a step as complete and note in run.json what it cost."""
        write_json(self.folder(step) / "done.json", {"settings": self.settings.hash_of(step), **facts})
        done = {
            name: json.loads(path.read_text())
            for name in STEPS
            if (path := self.out / "work" / name / "done.json").exists()
        }
        seconds = sum(entry["seconds"] for entry in done.values())
        write_json(self.out / "run.json", {"seconds": round(seconds, 1), "steps": done})

    def lock(self) -> IO[str]:
        """Keeps other runs out while the file that is returned is open. Raises LsaError if one is in the folder."""
        path = self.out / "work" / "lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LsaError(f"--out {self.out} is in use by another run: wait for it, or give another") from None
                time.sleep(0.1)


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def write_tensors(path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file whole or not at all. metadata: one entry at most, since the order of more varies."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    values = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    save_file(values, unfinished, metadata=metadata)
    os.replace(unfinished, path)


def progress(items: Iterable[Any], step: str, group: "Group", unit: str, done: int = 0) -> Iterator[Any]:
    """The items, with a bar of the leading process. done: items that an earlier call has seen to."""
    from tqdm import tqdm

    items = list(items)
    return iter(
        tqdm(items, desc=step, unit=unit, initial=done, total=done + len(items), disable=not group.leads, miniters=1)
    )


def peak_memory() -> int:
    """The most memory that this process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def log(message: str) -> None:
    """One line for the person who watches, past a progress bar."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


def run_step(step: str, out: Path, settings: Settings) -> None:
    """Do one step, with the other processes of the run, unless it is done. Raises LsaError in one line."""
    import torch

    from indexer_training.distributed import Group

    if settings.torch_device() != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(settings.torch_device())
        # Measurements are left alone: they add no fractions in an order that varies, and would be slower.
        torch.use_deterministic_algorithms(step in ("capture", "train"), warn_only=True)
    group = Group(step, settings.torch_device())
    work = Workspace(out, settings)
    begin = time.monotonic()
    if group.leads:
        work.require(step)
    if group.agree(group.leads and work.is_done(step)):
        if group.leads:
            log(f"{step}: done before")
        group.close()
        return
    resumed = (out / "work" / step).exists()
    if group.leads:
        for left in work.folder(step).glob("*.unfinished"):
            left.unlink()
    group.barrier()
    module = importlib.import_module(f"indexer_training.{step}")
    facts = module.run(work, group) or {}
    group.barrier()
    if group.leads:
        seconds = round(time.monotonic() - begin, 2)
        on_gpu = settings.torch_device() != "cpu"
        device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
        cost = {"seconds": seconds, "resumed": resumed, "peak_rss_mib": peak_memory(), "device": device}
        work.finish(step, {**cost, "processes": group.size, **facts})
        log(f"{step}: {seconds:.1f} s, at most {peak_memory()} MiB of memory")
    group.barrier()
    group.close()
