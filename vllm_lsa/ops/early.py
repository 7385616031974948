"""Options of the kernels of a decode step that may be launched before the ones ahead have ended."""

from functools import cache

import torch


@cache
def early(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of a launch, see `vllm_lsa.kernels.early`; off where the device cannot do it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}
