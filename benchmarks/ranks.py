"""Engines on several GPUs of one host: how they are started there, and what their workers say of themselves."""

from dataclasses import dataclass
from typing import Any

ENVIRONMENT = {
    # NVLink multicast stays off: a program that uses it can put GPUs that others share out of service. NCCL, torch's
    # symmetric memory and NVSHMEM each have a switch of their own, and vLLM one for each all-reduce that would ask.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0",
    # One host, which need not have a network.
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    # Ranks that wait for one another are a failure soon, not after five minutes.
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "90",
    # As `vllm serve` starts its workers.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""For the process that makes the engine, whose workers inherit it."""

ARGUMENTS: dict[str, Any] = {"disable_custom_all_reduce": True}
"""Of `vllm.LLM`: vLLM's own all-reduce sets up symmetric memory with multicast as well, so NCCL's is used."""


@dataclass
class Report:
    """Of one rank. counts: counters of LSA up to the step before last, none for stock. footprint: see
    `TieredEngine.footprint`, None for stock. demands: whether it takes chunks in between selections. device_used:
    bytes of its GPU in use.
    """

    counts: dict[str, float]
    footprint: tuple[int, int, int] | None
    demands: bool
    device_used: int


def report(worker: Any, wait: bool = False) -> Report:
    """What a worker says of itself, when its GPU is done if it is to wait for that: for `LLM.collective_rpc`."""
    import torch

    from benchmarks.engines import lsa_engine

    if wait:
        torch.cuda.synchronize()
    engine = lsa_engine()
    free, total = torch.cuda.mem_get_info()
    if engine is None:
        return Report({}, None, False, total - free)
    return Report(dict(engine.counted()), engine.footprint(), engine.config.demand != "off", total - free)


def skip_prompt_attention(worker: Any) -> None:
    """`engines.skip_prompt_attention` in a worker: for `LLM.collective_rpc`."""
    from benchmarks import engines

    engines.skip_prompt_attention()


def difference(after: list[Report], before: list[Report], name: str) -> float:
    """By how much a counter grew, mean over ranks: each counts what it does itself."""
    return sum(a.counts.get(name, 0) - b.counts.get(name, 0) for a, b in zip(after, before, strict=True)) / len(after)
