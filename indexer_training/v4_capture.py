"""The capture of DeepSeek-V4, by vLLM itself: its own attention, indexer and caches, in a process of its own.

Makes capture/window_*.safetensors as `capture` does, and what is asked of them is the same; a chunk is a c4 entry of 4
tokens. L c4 layers, C candidates, S cycles, N entries, K entries kept:

    query          bf16 [C, S, F]       the attention module's input at the token before the cycle
    keys           uint8 [C, N, 132]    index keys as they are cached: 128 e4m3 and an fp32 scale
    next_chunk, next_mass, next_rest    `Masses` [L, S, 1, ..]: how many of the window's tokens an entry is golden for
                                        (see `Recorder`), as a share of all; of entries that are whole at the cycle
    last_chunk, last_mass, last_rest    the same for the period before it

and capture/model.safetensors: inv_freq, float64 [32], and the native indexers' weights l<layer>.wq_a, q_norm, wq_b and
weights_proj of the candidates, bf16.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from indexer_training.cli import die_with_parent
from indexer_training.distributed import Group
from indexer_training.settings import Settings, read_settings
from indexer_training.v4_model import read_engine
from indexer_training.workspace import Workspace, progress
from vllm_lsa.errors import LsaError

_REFUSAL = "refusal.unfinished"  # what the other process was asked to tell
_ALSO = 64  # tokens that a step takes beside the window
# What torchrun says is about this process's group, not about vLLM's.
_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_", "LOCAL_", "ROLE_", "TORCHELASTIC_")


def run(work: Workspace, group: Group) -> dict[str, Any]:
    """Capture the windows that are not captured yet; the leading process alone, since V4 takes all GPUs anyway."""
    if not group.leads:
        return {}
    folder = work.folder("capture")
    if left(work) or not (folder / "model.safetensors").exists():
        environment = {name: x for name, x in os.environ.items() if not name.startswith(_LAUNCHER)}
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # a kill ends the engine as well
        environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        program = [sys.executable, "-m", "indexer_training.v4_capture", str(work.out)]
        code = subprocess.run(program, env=environment).returncode
        refusal = folder / _REFUSAL
        if code and refusal.exists():
            raise LsaError(refusal.read_text(encoding="utf-8"))
        if code:
            raise LsaError(
                f"capture: vLLM ended with status {code} on {work.settings.model}; above is why. --engine gives it "
                "further arguments, such as tensor_parallel_size"
            )
    size = sum(path.stat().st_size for path in folder.glob("window_*.safetensors"))
    engine = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    return {"bytes": size, "engine_peak_rss_mib": engine}


def left(work: Workspace) -> list[int]:
    """Windows that are not captured yet."""
    return [i for i in range(work.settings.captured) if not work.shard("capture", i).exists()]


def engine_arguments(settings: Settings) -> dict[str, Any]:
    """What `vllm.LLM` is told."""
    arguments: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "skip_tokenizer_init": True,
        "enforce_eager": True,  # the hook is Python
        "enable_prefix_caching": False,  # every token must come by
        "max_model_len": settings.context + 1,
        "max_num_seqs": 1,
        "worker_extension_cls": "indexer_training.v4_recorder.CaptureWorker",
    }
    if settings.torch_device() == "cpu":  # vLLM takes V4's prompts in chunks only where the CPU has AMX
        arguments["max_num_batched_tokens"] = settings.context + _ALSO
    return {**arguments, **read_engine(settings.engine)}


def tokens_of(work: Workspace, window: int) -> list[int]:
    """Those of a window to train with; behind them come those of held-out documents."""
    s = work.settings
    held_out = work.folder("data") / f"heldout_{window - s.documents:05d}.safetensors"
    path = work.shard("data", window) if window < s.documents else held_out
    # Held-out windows have a token more, for models whose loss is measured.
    return [int(token) for token in load_file(path)["tokens"][: s.context]]


def capture(work: Workspace) -> None:
    """Run vLLM over the windows that are left, in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_arguments(work.settings))
    llm.collective_rpc("lsa_capture_open", args=(str(work.out),))
    parameters = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    windows = left(work)
    done = work.settings.captured - len(windows)
    for i in progress(windows, "capture", Group("capture", "cpu"), " windows", done):
        tokens = tokens_of(work, i)
        llm.collective_rpc("lsa_capture_begin")
        llm.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)
        llm.collective_rpc("lsa_capture_write", args=(i,))


def main(out: Path) -> int:
    """The other process."""
    die_with_parent()
    work = Workspace(out, Settings.model_validate(read_settings(out)))
    try:
        capture(work)
    except LsaError as error:
        (work.folder("capture") / _REFUSAL).write_text(str(error), encoding="utf-8")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
