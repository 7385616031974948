"""Engines on several GPUs of one host: how they are started there, and what their workers say of themselves."""

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
    # Ranks that wait for one another are a failure soon, not after five minutes.
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "120",
    # As `vllm serve` starts its workers.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""For the process that makes the engine, whose workers inherit it."""

ARGUMENTS: dict[str, Any] = {"disable_custom_all_reduce": True}
"""Of `vllm.LLM`: vLLM's own all-reduce sets up symmetric memory with multicast as well, so NCCL's is used."""
