"""What kernels count on a CUDA device, read after the fact: nobody waits for the answer."""

import torch


class DeviceCounts:
    """``on_device``: int64 [n], which kernels add to."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.on_device = torch.zeros(size, dtype=torch.int64, device=device)
        self._on_gpu = device.type == "cuda"
        self._copied = torch.zeros(size, dtype=torch.int64, pin_memory=self._on_gpu)
        self._arrived: torch.cuda.Event | None = None
        self._seen = [0] * size

    @torch.inference_mode()
    def read(self) -> list[int]:
        """The counts as they were when an earlier call asked for them, as far as the stream has come since; asks again.
        On a CPU as they are."""
        if not self._on_gpu:
            return list(map(int, self.on_device.tolist()))
        if self._arrived is None or self._arrived.query():
            self._seen = list(map(int, self._copied.tolist()))
            self._copied.copy_(self.on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return self._seen
