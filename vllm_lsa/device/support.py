"""Settings that have no form on a CUDA device, refused before anything is loaded."""

from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError


def require_supported(config: LsaConfig) -> None:
    """Raises LsaError in one line that names the setting and the remedy."""
    if config.chunk_tokens not in (8, 16, 32, 64):
        raise LsaError(f"lsa.chunk_tokens={config.chunk_tokens} has no CUDA kernels: use 8, 16, 32 or 64")
    if config.policy == "quest":
        raise LsaError("lsa.indexer='quest' has no CUDA kernels: use mean_key, usage, recency, random or a checkpoint")
    if config.demand == "four_bit":
        raise LsaError("lsa.demand='four_bit' has no CUDA kernels: use mean_key, off, or a checkpoint's product")
    if config.lead:
        raise LsaError(
            f"lsa.lead={config.lead} is for a CPU: leave it out on a CUDA device, where sets are renewed in the "
            "background"
        )
